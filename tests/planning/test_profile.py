import random

import pytest

from lightning_easyscale.planning import (
    Communication,
    Configuration,
    Link,
    Measurement,
    Profile,
    fit_link,
    published_link,
    published_profile,
)
from lightning_easyscale.simulation import JobSpec, build_jobs


def test_json_round_trip_is_exact(tmp_path):
    profile = published_profile()
    profile.save(tmp_path / "p.json")
    again = Profile.load(tmp_path / "p.json")
    assert again == profile
    assert again.seconds("vgg19", "t4", "D2", 32) == 2.2755


def test_batch_rules():
    rows = (Measurement("m", "v", "D1", 8, 1.0), Measurement("m", "v", "D1", 16, 1.5))
    table = Profile("p", "s", rows)
    assert table.seconds("m", "v", "D1", 12) == 1.25
    with pytest.raises(KeyError, match="batch sizes"):
        table.seconds("m", "v", "D1", 32)
    assert Profile("p", "s", rows, batch_rule="proportional").seconds("m", "v", "D1", 32) == 3.0
    assert Profile("p", "s", rows, batch_rule="constant").seconds("m", "v", "D1", 32) == 1.5


def test_unknown_is_an_error_not_a_guess():
    profile = published_profile()
    with pytest.raises(KeyError, match="gpt"):
        profile.seconds("gpt", "v100", "D1", 8)
    with pytest.raises(KeyError, match="h100"):
        profile.seconds("bert", "h100", "D1", 8)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Measurement("m", "v", "D3", 8, 1.0), "kernels='D3'"),
        (lambda: Measurement("m", "v", "D1", 0, 1.0), "batch_size=0"),
        (lambda: Measurement("m", "v", "D1", 8, -1.0), "seconds=-1.0"),
        (lambda: Profile("p", "s", (), batch_rule="guess"), "batch_rule='guess'"),
        (lambda: Profile.from_json("{"), "not JSON"),
        (lambda: Profile.from_json('{"format": "other"}'), "not in format"),
        (lambda: Profile.from_json('{"format": "easyscale-profile/1", "name": "x"}'), "missing or unknown"),
        (
            lambda: Profile("p", "s", (Measurement("m", "v", "D1", 8, 1.0), Measurement("m", "v", "D1", 8, 2.0))),
            "two times",
        ),
    ],
)
def test_bad_input_is_named(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_fit_finds_the_link_it_was_measured_on():
    rng = random.Random(0)
    for _ in range(50):
        link = Link(rng.uniform(1e-5, 1e-2), rng.uniform(1e8, 1e10))
        points = [(size, k, link.ring_seconds(size, k)) for size in (1e5, 1e7, 1e9) for k in (2, 4, 8)]
        fit = fit_link(points)
        assert fit.link.latency_s == pytest.approx(link.latency_s, rel=1e-6)
        assert fit.link.bytes_per_s == pytest.approx(link.bytes_per_s, rel=1e-6)
        assert fit.max_relative_error < 1e-6


def test_fit_reports_its_error_and_stays_physical():
    fit = fit_link([(1e6, 2, 0.01), (1e7, 2, 0.02), (1e8, 2, 0.5)])
    assert fit.link.latency_s >= 0
    assert 0 < fit.mean_relative_error <= fit.max_relative_error
    falling = fit_link([(1e6, 2, 0.5), (1e8, 2, 0.1)])
    assert falling.link.bytes_per_s > 0


def test_fit_needs_two_sizes():
    with pytest.raises(ValueError, match="tell latency from bandwidth"):
        fit_link([(1e6, 2, 0.1), (1e6, 2, 0.1)])
    with pytest.raises(ValueError, match="two executors"):
        fit_link([(1e6, 1, 0.1)])


def test_one_device_exchanges_nothing_and_nodes_use_the_remote_link():
    exchange = Communication(1e9, Link(0.0, 1e10), Link(0.0, 1e9))
    assert exchange.seconds(1) == 0.0
    assert exchange.seconds(4, nodes=2) == pytest.approx(10 * exchange.seconds(4, nodes=1))


def test_published_synchronisation_is_explained_within_its_reported_error():
    fit = published_link()
    assert fit.points == 8
    assert fit.link.bytes_per_s > 1e8
    assert fit.mean_relative_error < 1.0


def test_published_times_equal_the_published_file(shared_data):
    import csv

    names = {"SwinTransformer": "swin", "Bert": "bert", "Electra": "electra", "NeuMF": "neumf"}
    profile = published_profile()
    count = 0
    with (shared_data / "overall_overhead.csv").open() as file:
        for row in csv.DictReader(file):
            workload = names.get(row["model"], row["model"].lower())
            for kernels, column in (("stock", "ddp_nondeterminism"), ("D1", "ddp_determinism"), ("D2", "ddp_hetero")):
                assert profile.seconds(workload, row["gpu"], kernels, int(row["bs"])) == float(row[column])
                count += 1
    assert count == 72


def test_measured_configurations_are_replayed_and_the_models_fill_the_gaps(tmp_path):
    rows = (Measurement("w", "a", "D2", 8, 1.0, 0.5), Measurement("w", "b", "D2", 8, 2.0))
    whole = (
        Configuration("w", "D2", 8, ("a", "b"), (2, 1), 2.75, (2.5, 2.0)),
        Configuration("w", "D2", 8, ("a",), (2,), 9.0, (9.0,)),
    )
    profile = Profile("p", "test", rows, configurations=whole, communication={"latency_s": 0.1, "bytes_per_s": 5.0})
    profile.save(tmp_path / "p.json")
    profile = Profile.load(tmp_path / "p.json")
    assert profile.configurations == whole
    assert profile.link == Link(0.1, 5.0)
    assert profile.measured_steps("w", "D2", 8, 3, ("b", "a", "c")) == {(1, 1, 0): 2.75}
    (job,) = build_jobs([JobSpec("j", 0.0, "w", 3, 10, 8, True, "a")], ("a", "b"), profile)
    assert job.planner.seconds((1, 1)) == 2.75
    assert job.planner.seconds((1, 0)) == 3.5  # 0.5 + 3 x 1, of ESTs of this job's size none was measured there
    assert job.planner.seconds((2, 0)) == 2.5


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Configuration("w", "D1", 8, ("a",), (1, 1), 1.0), "do not match"),
        (lambda: Configuration("w", "D1", 8, (), (), 1.0), "do not match"),
        (lambda: Configuration("w", "D1", 8, ("a",), (1,), 0.0), "no step time"),
        (lambda: Measurement("w", "a", "D1", 8, 1.0, -0.1), "`fixed_seconds=-0.1`"),
    ],
)
def test_bad_measurements_are_named(build, words):
    with pytest.raises(ValueError, match=words):
        build()
