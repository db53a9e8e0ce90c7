"""The published simulation: golden numbers of a reconstruction with the published D2 step times.

The published figures themselves (8904.97 / 16560, 1070.50 / 6720, 676.75 / 6000) rest on step times that were never
published; with the D2 column of Fig. 12 the same rules give the numbers below.
"""

import pytest

from lightning_easyscale.planning import published_profile
from lightning_easyscale.simulation.compat import published_proposals, simulate_published
from lightning_easyscale.simulation.traces import BadRow, read_easyscale
from tests.simulation.helpers import PAPER, run, simple_profile
from tests.simulation.helpers import PUBLISHED as PUBLISHED_COSTS
from tests.simulation.helpers import job as make_job

GOLDEN = {
    "fifo-serial": (8740.7, 16500.0, 0.01),
    "easyscale-homo": (1152.0, 6840.0, 0.05),
    "easyscale-heter": (887.2, 5640.0, 0.07),
}
PUBLISHED = {
    "fifo-serial": (8904.97, 16560.0),
    "easyscale-homo": (1070.50, 6720.0),
    "easyscale-heter": (676.75, 6000.0),
}


@pytest.fixture(scope="module")
def compat_trace(shared_data):
    profile = published_profile(d2_everywhere=True)
    return read_easyscale(shared_data / "trace_68_jobs.csv", profile, duplicates="last", lenient=True), profile


@pytest.fixture(scope="module")
def compat(compat_trace):
    trace, profile = compat_trace
    return {p: simulate_published(trace.jobs, PAPER.types, PAPER.capacity, profile, policy=p).summary() for p in GOLDEN}


def test_compat_reproduces_the_golden_numbers(compat_trace, compat):
    assert len(compat_trace[0].jobs) == 62
    for policy, (jct, makespan, tolerance) in GOLDEN.items():
        assert compat[policy]["avg_jct_s"] == pytest.approx(jct, rel=tolerance)
        assert compat[policy]["makespan_s"] == pytest.approx(makespan, rel=tolerance)
    for column, key in enumerate(("avg_jct_s", "makespan_s")):
        order = sorted(GOLDEN, key=lambda policy: compat[policy][key])
        assert order == sorted(GOLDEN, key=lambda policy: PUBLISHED[policy][column])


def test_compat_counts_the_reallocations_that_were_free(compat):
    assert {p: s["rescales"] for p, s in compat.items()} == {
        "fifo-serial": 0,
        "easyscale-homo": 110,
        "easyscale-heter": 176,
    }


@pytest.mark.parametrize(
    ("policy", "jct"),
    [("fifo", 6908.0), ("fifo-per-type", 5216.0), ("fifo-backfill", 3568.0), ("easyscale-homo", 1193.0)],
)
def test_honest_engine_agrees_with_independent_figures_for_the_same_model(compat_trace, policy, jct):
    trace, profile = compat_trace
    result = run(trace.jobs, policy, profile=profile, interval_s=60.0, costs=PUBLISHED_COSTS)
    assert result.summary()["avg_jct_s"] == pytest.approx(jct, abs=0.6)


def test_honest_reading_refuses_the_published_file(shared_data):
    with pytest.raises(BadRow, match="line 1: unknown columns"):
        read_easyscale(shared_data / "trace_68_jobs.csv", published_profile())


def test_honest_gangs_refuse_the_job_that_can_never_run(shared_data):
    trace = read_easyscale(shared_data / "trace_68_jobs.csv", published_profile(), duplicates="rename", lenient=True)
    assert len(trace.jobs) == 68
    with pytest.raises(ValueError, match="asks for 32 of 16 p100"):
        run(trace.jobs, "fifo")
    moved = run(trace.jobs, "fifo", oversize="move")
    assert len(moved.records) == 68


def test_one_type_alone_is_free_of_waste_in_published_proposals():
    proposals = published_proposals(5, (0.5, 0.75, 1.0), (4, 2, 2))
    single = [p for p in proposals if sum(1 for n in p.counts if n) == 1]
    assert single
    assert all(p.waste == 0.0 for p in single)
    assert len({p.counts for p in proposals}) == len(proposals)


def test_compat_serial_runs_one_job_at_a_time():
    profile = simple_profile(v100=1.0, p100=1.0, t4=1.0)
    specs = [make_job("a", 0.0, 2, 100.0), make_job("b", 0.0, 2, 100.0)]
    result = simulate_published(specs, PAPER.types, PAPER.capacity, profile, policy="fifo-serial")
    first, second = result.records
    assert first.finish_s == 60 + 20 + 100
    assert second.start_s == 180.0
    assert second.finish_s == 180 + 20 + 100


def test_compat_bad_input_is_named():
    profile = simple_profile(v100=1.0, p100=1.0, t4=1.0)
    with pytest.raises(ValueError, match="no published form"):
        simulate_published([make_job("a")], PAPER.types, PAPER.capacity, profile, policy="srtf")
    with pytest.raises(ValueError, match="trace is empty"):
        simulate_published([], PAPER.types, PAPER.capacity, profile, policy="fifo-serial")
    with pytest.raises(ValueError, match="can never"):
        simulate_published([make_job("a", size=33)], PAPER.types, PAPER.capacity, profile, policy="fifo-serial")
