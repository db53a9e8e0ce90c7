import pytest

from lightning_easyscale.planning import Communication, Link, published_profile
from lightning_easyscale.simulation.cluster import ClusterSpec, NodePool
from lightning_easyscale.simulation.disturbances import Failures, Serving
from lightning_easyscale.simulation.engine import Engine
from lightning_easyscale.simulation.job import JobSpec, build_jobs
from lightning_easyscale.simulation.policies import POLICIES, make_policy
from lightning_easyscale.simulation.policy import Costs, GangPolicy
from lightning_easyscale.simulation.traces import generate
from tests.simulation.helpers import FREE, PAPER, PUBLISHED, job, run, simple_profile

ALL = list(POLICIES)
ONE_TYPE = ClusterSpec({"v100": 4}, devices_per_node=2)


def small_trace(seed=0, num_jobs=30, load=1.2):
    return generate(published_profile(), PAPER.devices, num_jobs=num_jobs, load=load, seed=seed).jobs


def watch_invariants(engine):
    """Check conservation after every change the engine applies."""
    original = engine._apply

    def checked(changes):
        changed = original(changes)
        serving = [sum(h.values()) for h in engine._serving_held]
        for i, total in enumerate(engine.cluster.capacity):
            used = sum(j.counts[i] for j in engine.view.active.values() if j.counts)
            assert used + engine.view.free[i] == engine.view.capacity[i] <= total - serving[i]
            assert engine.view.free[i] >= 0
        for index, held in engine.held.items():
            state = engine.jobs[index]
            for i, n in enumerate(state.counts):
                assert n == sum(c for node, c in held.items() if engine.pool.type_of[node] == i)
        return changed

    engine._apply = checked


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("interval", [0.0, 60.0])
def test_devices_are_conserved_and_every_job_finishes(policy, interval):
    specs = small_trace()
    result = run(specs, policy, interval_s=interval, watch=watch_invariants)
    assert [r.name for r in result.records] == [s.name for s in specs]
    for record, spec in zip(result.records, specs, strict=True):
        assert spec.submit_s <= record.start_s < record.finish_s
        for _, counts in record.segments:
            assert counts is None or 0 < sum(counts) <= spec.max_ests
            assert counts is None or spec.d2 or sum(1 for n in counts if n) == 1
    for _, counts in zip(*result.usage(), strict=True):
        assert all(0 <= n <= c for n, c in zip(counts, PAPER.capacity, strict=True))


@pytest.mark.parametrize("policy", ALL)
def test_failures_and_serving_keep_all_invariants(policy):
    specs = small_trace(num_jobs=20)
    options = {
        "failures": Failures(mtbf_s=20_000.0, repair_s=600.0, checkpoint_s=300.0, seed=3),
        "serving": Serving(trough=0.1, peak=0.4, period_s=7200.0, step_s=300.0, noise=0.05, seed=1),
    }
    specs = [
        s if s.max_ests <= 8 else JobSpec(s.name, s.submit_s, s.workload, 8, s.steps, 8, s.d2, s.preferred)
        for s in specs
    ]
    result = run(specs, policy, watch=watch_invariants, profile=published_profile(), interval_s=60.0, **options)
    assert all(r.finish_s < float("inf") for r in result.records)
    assert result.summary()["serving_share"] > 0.1


@pytest.mark.parametrize("policy", ALL)
def test_same_input_same_result(policy):
    first, second = (run(small_trace(seed=4, num_jobs=15), policy) for _ in range(2))
    assert first.records == second.records


@pytest.mark.parametrize("policy", [p for p in ALL if not p.startswith(("gavel", "sia"))])
def test_events_are_the_limit_of_ticks(policy):
    """The smaller the interval, the closer to deciding at every event.

    Gavel and Sia are defined by rounds: they decide anew as time passes without any event.
    """
    specs = small_trace(seed=2, num_jobs=25, load=0.5)
    exact = run(specs, policy, costs=FREE).summary()["avg_jct_s"]
    gaps = [
        abs(run(specs, policy, costs=FREE, interval_s=i).summary()["avg_jct_s"] - exact) / exact
        for i in (60.0, 1.0, 0.01)
    ]
    assert gaps[2] < 1e-3
    assert gaps[2] <= gaps[1] <= gaps[0]


def test_times_are_exact_between_events():
    """Two jobs on 4 devices, gang FIFO: b waits for a; checked by hand."""
    profile = simple_profile(v100=2.0)
    specs = [job("a", 0.0, 3, 50.0), job("b", 10.0, 2, 10.0), job("c", 10.0, 1, 5.0)]
    result = run(specs, "fifo", cluster=ONE_TYPE, profile=profile, costs=Costs(5.0, 0.0, 0.0))
    a, b, c = result.records
    assert (a.start_s, a.finish_s) == (0.0, 105.0)
    assert (b.start_s, b.finish_s) == (105.0, 130.0)
    assert (c.start_s, c.finish_s) == (105.0, 120.0)
    backfilled = run(specs, "fifo-backfill", cluster=ONE_TYPE, profile=profile, costs=Costs(5.0, 0.0, 0.0))
    assert backfilled.records[2].start_s == 10.0
    summary = result.summary()
    assert summary["utilisation"] == pytest.approx((105 * 3 + 25 * 2 + 15) / (4 * 130))
    assert summary["makespan_s"] == 130.0


def test_elastic_job_grows_to_its_ests_and_pays_each_rescale():
    profile = simple_profile(v100=1.0)
    alone = [job("a", 0.0, 4, 100.0)]
    result = run(alone, "easyscale-homo", cluster=ONE_TYPE, profile=profile, interval_s=60.0, costs=PUBLISHED)
    record = result.records[0]
    assert [c for _, c in record.segments] == [(1,), (2,), (4,), None]
    # 10 steps in 40 s at 1/4 speed, 20 steps in 40 s at 1/2 speed, then 70 steps at 1 a second; 20 s lost each time
    assert record.finish_s == pytest.approx(60 + 60 + 20 + 70)
    assert record.rescales == 2


def test_preemption_keeps_progress_and_charges_the_return():
    profile = simple_profile(v100=1.0)
    specs = [job("long", 0.0, 4, 100.0), job("short", 50.0, 4, 10.0)]
    result = run(specs, "srtf", cluster=ONE_TYPE, profile=profile, costs=Costs(0.0, 0.0, 7.0))
    long, short = result.records
    assert (short.start_s, short.finish_s) == (50.0, 60.0)
    assert long.finish_s == 60.0 + 7.0 + 50.0
    assert long.preemptions == 1


def test_failure_falls_back_to_the_last_checkpoint():
    profile = simple_profile(v100=1.0)
    cluster = ClusterSpec({"v100": 2}, devices_per_node=2)
    failures = Failures(mtbf_s=400.0, repair_s=100.0, checkpoint_s=50.0, seed=0)
    jobs = build_jobs([job("a", 0.0, 2, 300.0)], cluster.types, profile)
    engine = Engine(cluster, jobs, make_policy("fifo"), costs=FREE, failures=failures)
    record = engine.run().records[0]
    first_failure = failures.first(1)[0][0]
    assert first_failure < 300.0
    lost = first_failure % 50.0
    assert record.preemptions >= 1
    assert record.segments[1] == (first_failure, None)
    assert record.segments[2] == (first_failure + 100.0, (2,))
    assert jobs[0].lost_steps >= lost - 1e-9
    if record.preemptions == 1:
        assert record.finish_s == pytest.approx(300.0 + 100.0 + lost)


def test_serving_has_priority_and_utilisation_counts_both():
    profile = simple_profile(v100=1.0)
    serving = Serving(trough=0.0, peak=0.5, period_s=1000.0, step_s=100.0)
    cluster = ClusterSpec({"v100": 8}, devices_per_node=4)
    result = run(
        [job("a", 0.0, 8, 1000.0)], "easyscale-best", cluster=cluster, profile=profile, serving=serving, costs=FREE
    )
    taken = {t: c[0] for t, c in result.serving}
    assert max(taken.values()) == 4
    held = result.used_at([t + 1 for t in taken if t < result.makespan_s - 1])
    for (_, reserved), (used,) in zip(taken.items(), held, strict=False):
        assert used + reserved <= 8
        assert used >= 4
    summary = result.summary()
    assert summary["total_utilisation"] == pytest.approx(summary["utilisation"] + summary["serving_share"])
    assert summary["total_utilisation"] > 0.85


@pytest.mark.parametrize("policy", ["fifo-backfill", "easyscale-best", "pollux-like"])
def test_work_conservation(policy):
    """No policy of these leaves a device free while a job waits that could start on it."""
    specs = [job(f"j{i}", float(i), 1 + i % 3, 40.0) for i in range(30)]
    result = run(specs, policy, cluster=ONE_TYPE, profile=simple_profile(v100=1.0), costs=FREE)
    for time, (used,) in zip(*result.usage(), strict=True):
        waiting = [r for r, s in zip(result.records, specs, strict=True) if s.submit_s <= time < r.start_s]
        needs = [1 if policy != "fifo-backfill" else r.max_ests for r in waiting]
        assert not any(n <= 4 - used for n in needs)


@pytest.mark.parametrize("policy", ["fifo", "fifo-backfill", "easyscale-homo", "easyscale-best"])
def test_less_work_and_more_devices_never_hurt_a_job_alone(policy):
    profile = simple_profile(v100=1.0)

    def alone(steps, devices):
        cluster = ClusterSpec({"v100": devices})
        return run([job("a", 0.0, 4, steps)], policy, cluster=cluster, profile=profile).records[0].finish_s

    assert alone(50.0, 4) < alone(100.0, 4)
    assert alone(100.0, 16) <= alone(100.0, 4)


def test_nodes_and_exchange_slow_a_scattered_job():
    profile = simple_profile(v100=1.0)
    exchange = Communication(1e9, Link(0.0, 1e10), Link(0.0, 1e9))
    packed, scattered = (
        run(
            [job("a", 0.0, 4, 10.0)],
            "fifo",
            cluster=ClusterSpec({"v100": 4}, devices_per_node=size),
            profile=profile,
            costs=FREE,
            communication=lambda _: exchange,
        )
        for size in (4, 2)
    )
    assert packed.records[0].finish_s == pytest.approx(10 * (1 + exchange.seconds(4, 1)))
    assert scattered.records[0].finish_s == pytest.approx(10 * (1 + exchange.seconds(4, 2)))


def test_node_pool_packs_and_conserves():
    pool = NodePool(ClusterSpec({"v100": 10}, devices_per_node=4))
    assert pool.take(0, 2) == {2: 2}  # the small node fits exactly
    first = pool.take(0, 3)
    assert list(first.values()) == [3]
    assert pool.take(0, 1) == dict.fromkeys(first, 1)  # the fullest node that still has room
    assert sum(pool.take(0, 4).values()) == 4
    with pytest.raises(RuntimeError, match="over-committed"):
        pool.take(0, 1)
    pool.give(first)
    assert sum(pool.take(0, 3).values()) == 3


class Greedy(GangPolicy):
    name = "too-much"

    def decide(self, view):
        return dict.fromkeys(view.active, (5,))


def test_engine_refuses_a_policy_that_over_commits():
    jobs = build_jobs([job("a", size=8)], ("v100",), simple_profile(v100=1.0))
    policy = Greedy()
    policy.check = lambda *_: None
    with pytest.raises(RuntimeError, match="over-committed v100"):
        Engine(ONE_TYPE, jobs, policy).run()
    jobs = build_jobs([job("a", size=4)], ("v100",), simple_profile(v100=1.0))
    with pytest.raises(RuntimeError, match=r"P=4.*\(5,\)"):
        Engine(ClusterSpec({"v100": 8}), jobs, policy).run()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ClusterSpec({"v100": -1}), r"'v100': -1"),
        (lambda: ClusterSpec({}), "no device"),
        (lambda: ClusterSpec({"v100": 1}, devices_per_node=0), "devices_per_node=0"),
        (lambda: Costs(rescale_s=-1.0), "rescale_s=-1.0"),
        (lambda: Failures(mtbf_s=-1.0), "mtbf_s=-1.0"),
        (lambda: Serving(peak=1.5), "peak=1.5"),
        (lambda: job("a", submit=-1.0), "submit_s=-1.0"),
        (lambda: job("a", size=0), "max_ests=0"),
        (lambda: job("a", steps=0.0), "steps=0.0"),
        (lambda: make_policy("lottery"), "policy='lottery'"),
        (lambda: run([], "fifo"), "trace is empty"),
        (
            lambda: run([job("a")], "fifo", interval_s=-1.0, profile=simple_profile(v100=1, p100=1, t4=1)),
            "interval_s=-1.0",
        ),
        (lambda: run([job("a"), job("a")], "fifo", profile=simple_profile(v100=1, p100=1, t4=1)), "`a` is used twice"),
        (lambda: run([job("a", preferred="h100")], "fifo"), "preferred='h100'"),
        (
            lambda: run([job("a", size=9)], "fifo", cluster=ONE_TYPE, profile=simple_profile(v100=1)),
            "asks for 9 of 4 v100 devices and can never run",
        ),
        (
            lambda: run(
                [job("a")],
                "easyscale-homo",
                cluster=ClusterSpec({"v100": 0, "t4": 4}),
                profile=simple_profile(v100=1, t4=1),
            ),
            "no v100 device",
        ),
        (lambda: run([job("a")], "fifo", oversize="shrink"), "oversize='shrink'"),
    ],
)
def test_bad_input_is_named(build, words):
    with pytest.raises(ValueError, match=words) as caught:
        build()
    assert "HINT" in str(caught.value)


def test_jobs_that_wait_for_ever_are_reported():
    """Serving never gives back enough for the gang."""
    serving = Serving(trough=0.5, peak=0.5, period_s=86400.0, step_s=43200.0)
    with pytest.raises(ValueError, match="wait for ever"):
        run([job("a", 1.0, 4, 10.0)], "fifo", cluster=ONE_TYPE, profile=simple_profile(v100=1.0), serving=serving)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("interval", [0.0, 300.0])
def test_our_policy_leaves_no_worthwhile_device_idle(seed, interval):
    """After each decision: nobody waits for a free device, no running job could grow with a gain above the cost."""
    specs = generate(published_profile(), PAPER.devices, shape="philly", num_jobs=400, load=1.5, seed=seed).jobs

    def watch(engine):
        original = engine._apply

        def checked(changes):
            changed = original(changes)
            view = engine.view
            for state in view.active.values():
                if state.counts is None:
                    assert not any(view.free[i] for i in state.types)
                    continue
                wanted = engine.policy._fit(state, [a + b for a, b in zip(view.free, state.counts, strict=True)])
                gain = state.planner.seconds(state.counts) - state.planner.seconds(wanted)
                assert gain * state.remaining_at(view.now) <= view.costs.rescale_s + 1e-6
            return changed

        engine._apply = checked

    run(specs, "easyscale-best", interval_s=interval, watch=watch)
