"""Jobs that a policy moves while they run end as the policy wanted, and with stock DDP's bits."""

from dataclasses import replace

import pytest

pytest.importorskip("hydra")
from hydra import compose, initialize
from omegaconf import OmegaConf

from lightning_easyscale.compare import compare
from lightning_easyscale.planning import Measurement, Profile
from lightning_easyscale.simulation import Costs, JobSpec, build_jobs
from lightning_easyscale.simulation.policy import Policy
from recipes._config import ConfigError
from recipes._live import LiveCluster, LiveJob, stage_of
from recipes._live_config import check, draw_trace, register
from recipes._runs import RunFailedError

from .conftest import POOL
from .test_warm import job

register()
PROFILE = Profile("p", "test", tuple(Measurement("mnist", t, "D2", 4, s) for t, s in (("v100", 0.01), ("t4", 0.026))))
LENGTH = 30


def configure(*overrides):
    with initialize(version_base="1.3", config_path="../../conf"):
        return OmegaConf.to_object(compose("live", overrides=list(overrides)))


class Script(Policy):
    """First job on everything; when the second comes, the first is moved to the T4 and the second gets the V100."""

    name = "script"

    def decide(self, view):
        first, second = view.active.get(0), view.active.get(1)
        if second is None:
            return {0: (1, 1)} if first is not None and not view.gone else {}
        if first is None:
            return {}
        return {0: (0, 1), 1: (1, 0)} if second.counts is None else {}


class Keeps(Policy):
    """Two jobs in turn on one device, the second takes it away from the first."""

    name = "keeps"

    def decide(self, view):
        wanted = max(view.active, default=None)
        return {i: (1, 0) if i == wanted else None for i in view.active}


def live_jobs(warm, folder, name):
    specs = [
        JobSpec("long", 0.0, "mnist", 2, LENGTH, 4, True, "v100"),
        JobSpec("short", 0.4, "mnist", 1, 10, 4, True, "v100"),
    ]
    jobs = []
    for state in build_jobs(specs, POOL, PROFILE):
        home, spec = folder / name / state.spec.name, state.spec
        base = job(folder, spec.name, num_ests=spec.max_ests, ests_per_executor=(1,) * spec.max_ests)
        base = replace(base, end_step=int(spec.steps), digest_at=(int(spec.steps),), record=str(home / "record"))
        jobs.append(LiveJob(state, replace(base, pace=((0, (0.02, 0.02)),)), warm))
    return jobs


@pytest.fixture(scope="module")
def references(warm, folder):
    """The record of each job's undisturbed run under stock DDP, by the job's name."""
    records = {}
    for live in live_jobs(warm, folder, "undisturbed"):
        name, size = live.base.name, live.base.num_ests
        spec = replace(live.base, kind="reference", devices=f"v100:{size}", record=str(folder / name), pace=())
        warm.start(replace(spec, save=str(folder / f"{name}.ckpt")), folder / f"{name}.log").wait(120)
        records[name] = spec.record
    return records


def finish(jobs, policy, references):
    cluster = LiveCluster(POOL, (1, 1), policy, jobs, PROFILE, costs=Costs(), on_event=lambda text: None)
    cluster.run(120)
    for live in jobs:
        assert compare(references[live.base.name], live.base.record) is None
    return cluster


@pytest.mark.emulation
def test_a_job_is_moved_by_relaunch_and_ends_with_the_bits_of_one_that_was_not(warm, folder, references):
    jobs = live_jobs(warm, folder, "moved")
    cluster = finish(jobs, Script(), references)
    long, short = jobs
    assert [counts for _, counts, *_ in long.stages] == [(1, 1), (0, 1)]
    assert [counts for _, counts, *_ in short.stages] == [(1, 0)]
    assert (long.state.rescales, long.state.preemptions) == (1, 0)
    assert short.state.started_s >= short.state.spec.submit_s
    assert cluster.view.free == [1, 1]
    (_, _, begin, middle), (_, _, again, end) = long.stages
    assert (begin, again, end) == (0, middle, LENGTH)


@pytest.mark.emulation
def test_a_job_that_lost_its_device_comes_back_where_it_was(warm, folder, references):
    jobs = live_jobs(warm, folder, "preempted")
    finish(jobs, Keeps(), references)
    long, short = jobs
    assert (long.state.preemptions, long.state.rescales) == (1, 1)
    assert len(long.stages) == 2
    assert long.state.finished_s > short.state.finished_s


@pytest.mark.emulation
def test_a_cluster_that_hangs_is_given_up(warm, folder):
    jobs = live_jobs(warm, folder, "late")
    cluster = LiveCluster(POOL, (1, 1), Script(), jobs, PROFILE, costs=Costs(), on_event=lambda text: None)
    with pytest.raises(RunFailedError, match="2 jobs have not ended after 0 s"):
        cluster.run(0.2)


def test_a_stage_has_the_planners_split_and_its_devices_pace(folder):
    base = replace(job(folder, "x"), pace=((0, (0.1, 0.26)),), record=str(folder / "x" / "record"))
    seconds = {"v100": 1.0, "t4": 2.6}
    stage = stage_of(base, 2, types=POOL, counts=(1, 1), seconds=seconds, first_step=7)
    assert (stage.devices, stage.ests_per_executor, stage.pace) == ("v100:1,t4:1", (3, 1), ((0, (0.1, 0.26)),))
    slow = stage_of(base, 0, types=POOL, counts=(1, 1), seconds={"v100": 1.0, "t4": 9.0}, first_step=0)
    assert (slow.devices, slow.ests_per_executor) == ("v100:1", (4,))
    assert stage.resume.endswith("stage_1.ckpt")
    assert stage.save.endswith("stage_2.ckpt")


def test_traces_are_a_function_of_their_seed_and_fit_the_cluster():
    conf = configure("num_jobs=40", "num_ests=[1,2,4]")
    types = {"v100": 2, "t4": 1}
    jobs = draw_trace(conf, types)
    assert jobs == draw_trace(conf, types)
    assert jobs != draw_trace(configure("num_jobs=40", "seed=1"), types)
    assert all(j.d2 or j.max_ests <= types[j.preferred] for j in jobs)
    assert all(40 <= j.steps <= 120 for j in jobs)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.names=[mine]", r"`policy.names=\['mine'\]`"),
        ("policy=all", "is not one policy"),
        ("num_jobs=0", "`num_jobs=0`"),
        ("steps=[9,3]", "least and the greatest"),
        ("num_ests=[0]", "sizes >= 1"),
        ('pace="v100"', "`pace=v100`"),
    ],
)
def test_bad_settings_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        check(configure(override))
