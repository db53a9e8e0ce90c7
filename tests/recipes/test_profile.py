"""What a profile measures, what follows from it, and that it goes on where it was."""

import pytest

pytest.importorskip("hydra")
from hydra import compose, initialize
from omegaconf import OmegaConf
from rich.console import Console

from lightning_easyscale.planning import Configuration, Exchange, Link, Measurement, Profile
from lightning_easyscale.simulation import JobSpec, build_jobs
from recipes._config import ConfigError
from recipes._profile_config import check, counts, read_pace, register
from recipes._profile_runs import (
    Measurer,
    concluded,
    fit_exchange,
    fit_speeds,
    planned,
    prediction_errors,
    single_devices,
)
from recipes.profile import measure

register()
WORKLOAD = {"name": "mnist_conv", "batch_size": 8}


def configure(*overrides):
    with initialize(version_base="1.3", config_path="../../conf"):
        config = compose("profile", overrides=["file=none.json", *overrides])
        return OmegaConf.to_object(config)


def speeds(**seconds):
    rows = [Measurement("mnist_conv", t, k, 8, s) for t, s in seconds.items() for k in ("D1", "D2")]
    return Profile("p", "test", tuple(rows))


def test_every_size_is_measured_alone_on_every_type():
    conf = configure('devices="v100:2,t4:1"', "num_ests=[1,4]")
    keys = [w.key[1:] for w in single_devices(conf, WORKLOAD)]
    assert len(keys) == len(set(keys)) == 8
    assert ("D2", 8, ("t4",), (4,)) in keys


def test_planned_configurations_are_those_that_are_worth_having():
    conf = configure('devices="v100:2,t4:2"', "num_ests=[4]", "levels=[d1+d2]")
    found = {(w.devices, w.ests_per_device) for w in planned(conf, WORKLOAD, speeds(v100=1.0, t4=2.6))}
    v, t = "v100", "t4"
    assert found == {
        ((v, v), (2, 2)),
        ((t, t), (2, 2)),
        ((v, t), (3, 1)),
        ((v, t, t), (2, 1, 1)),
    }  # with two V100 a T4 brings nothing: an EST takes 2.6 there, two take 2 on each V100
    conf = configure('devices="v100:2,t4:2"', "num_ests=[4]", "levels=[d1]")
    assert all(len(set(w.devices)) == 1 for w in planned(conf, WORKLOAD, speeds(v100=1.0, t4=2.6)))


def test_speeds_and_link_are_recovered_from_what_they_generate():
    link = Link(0.002, 5e8)
    configurations = [
        Configuration("mnist_conv", "D1", 8, ("v100",), (a,), 0.03 + 0.1 * a, (0.03 + 0.1 * a,)) for a in (1, 2, 4)
    ]
    sizes = {"mnist_conv": 1e6}
    exchanges = tuple(Exchange(b, k, link.ring_seconds(b, k)) for b in (1e4, 1e6, 1e7) for k in (2, 3))
    for k in (2, 4):
        seconds = 0.03 + 0.1 * 4 / k
        whole = seconds + link.ring_seconds(sizes["mnist_conv"], k)
        configurations.append(Configuration("mnist_conv", "D1", 8, ("v100",) * k, (4 // k,) * k, whole, (seconds,) * k))
    row = next(m for m in fit_speeds(configurations) if m.workload == "mnist_conv")
    assert (row.seconds, row.fixed_seconds) == pytest.approx((0.1, 0.03))
    fit = fit_exchange(exchanges)
    assert fit is not None
    assert (fit.link.latency_s, fit.link.bytes_per_s) == pytest.approx((0.002, 5e8), rel=1e-3)
    profile = concluded(Profile("p", "test", (), configurations=tuple(configurations), exchanges=exchanges), sizes)
    assert profile.link == fit.link
    assert max(map(abs, prediction_errors(profile))) < 1e-3


def test_one_size_alone_gives_proportional_speeds():
    (row,) = fit_speeds([Configuration("w", "D1", 8, ("v100",), (2,), 0.2, (0.2,))])
    assert (row.seconds, row.fixed_seconds) == pytest.approx((0.1, 0.0))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("levels=[d3]", "`levels` has 'd3'"),
        ("num_ests=[0]", "`num_ests=\\[0\\]`"),
        ("steps=1", "`steps=1`"),
        ("exchange.executors=[1]", "takes two or more"),
        ("exchange.bytes=[0]", "`exchange.bytes=\\[0\\]`"),
        ('pace="t5:0.1"', "`pace` has 't5'"),
        ('pace="v100:x"', "has 'v100:x'"),
        ('pace="v100:-1"', "zero or more"),
    ],
)
def test_bad_settings_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        check(configure('devices="v100:1"', override))


def test_devices_and_pace_are_read():
    assert counts(configure('devices="v100:2,t4:1"')) == {"v100": 2, "t4": 1}
    assert read_pace("v100:0.5, t4:1") == {"v100": 0.5, "t4": 1.0}


class Borrowed:
    """The tests' warm process in place of one that the recipe would start and end."""

    def __init__(self, warm):
        self.start, self.close = warm.start, lambda: None


@pytest.mark.emulation
@pytest.mark.parametrize("executors", [[], [2]])
def test_an_interrupted_profile_goes_on_measures_nothing_twice_and_is_replayed(
    tmp_path, monkeypatch, executors, request
):
    pytest.importorskip("mlxtend")
    if not executors:
        warm = request.getfixturevalue("warm")
        monkeypatch.setattr("recipes._profile_runs.WarmProcesses", lambda environment, threads: Borrowed(warm))
    file, measured = tmp_path / "p.json", []
    options = ["devices='v100:1,t4:1'", "num_ests=[2]", "levels=[d1+d2]", "steps=3", "warmup=1"]
    options += ["workload.batch_size=4", 'pace="v100:0.2,t4:0.24"', f"file={file}"]
    options += ["exchange.bytes=[64,200000]", f"exchange.executors={executors}", "exchange.rounds=3"]
    real = Measurer.measure

    def until_the_second(measurer, wanted):
        measured.append(wanted.key[3:])
        if len(measured) == 2:
            real(measurer, wanted)  # the result of a run that was not written is lost
            raise KeyboardInterrupt
        return real(measurer, wanted)

    monkeypatch.setattr(Measurer, "measure", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        measure(configure(*options), tmp_path, Console(quiet=True))
    first = Profile.load(file).configurations
    assert len(first) == 1
    profile = measure(configure(*options), tmp_path, Console(quiet=True))
    assert profile == Profile.load(file)
    assert profile.configurations[:1] == first
    assert [(c.devices, c.ests_per_device) for c in profile.configurations] == [
        (("v100",), (2,)),
        (("t4",), (2,)),
        (("v100", "t4"), (1, 1)),
    ]
    assert [key for key in measured if measured.count(key) > 1] == [(("t4",), (2,))] * 2  # the interrupted one
    assert [(e.num_bytes, e.executors) for e in profile.exchanges] == [(b, k) for k in executors for b in (64, 200000)]
    assert (profile.link is not None) == bool(executors)
    monkeypatch.setattr(Measurer, "measure", None)  # nothing is measured a second time
    monkeypatch.setattr("recipes.profile.measure_exchanges", None)
    written = file.read_text()
    assert measure(configure(*options), tmp_path, Console(quiet=True)) == profile
    assert file.read_text() == written
    with pytest.raises(ConfigError, match="was measured with pace="):
        measure(configure(*options, 'pace="v100:0.1"'), tmp_path, Console(quiet=True))
    (job,) = build_jobs([JobSpec("j", 0.0, "mnist_conv", 2, 10, 4, True, "t4")], ("v100", "t4"), profile)
    assert [job.planner.seconds(counts) for counts in ((1, 0), (0, 1), (1, 1))] == [
        round(c.seconds, 9) for c in profile.configurations
    ]
