import random

import pytest

from lightning_easyscale.planning import AffineStepTime, TypePlanner, plan, propose, useful_counts
from lightning_easyscale.planning.heuristic import best_by_placement, fillings, heuristic_proposals
from lightning_easyscale.planning.step_time import to_ns


def planner_of(num_ests, seconds, caps=(None, None, None)):
    return TypePlanner(num_ests, [AffineStepTime(to_ns(t), max_ests=c) for t, c in zip(seconds, caps, strict=True)])


def test_useful_counts_are_the_distinct_speeds():
    for p in range(1, 200):
        counts = useful_counts(p)
        assert counts == sorted({-(-p // k) for k in range(1, p + 1)})
        assert len(counts) <= 2 * p**0.5
        for n in range(1, p + 1):
            served = max(c for c in counts if c <= n)
            assert -(-p // served) == -(-p // n)


def test_by_type_equals_plan_on_devices():
    rng = random.Random(1)
    for _ in range(400):
        p = rng.randint(1, 20)
        seconds = [round(rng.uniform(0.05, 1), 3) for _ in range(3)]
        counts = tuple(rng.randint(0, 5) for _ in range(3))
        if not sum(counts):
            continue
        planner = planner_of(p, seconds)
        names = dict(zip("abc", seconds, strict=True))
        found = plan(p, dict(zip("abc", counts, strict=True)), names)
        assert planner.step_ns(counts) == found.step_ns
        assert sum(planner.trimmed(counts)) == len(found.used)
        assert planner.step_ns(planner.trimmed(counts)) == found.step_ns


def test_speed_never_falls_with_a_device_more():
    rng = random.Random(2)
    for _ in range(300):
        planner = planner_of(rng.randint(1, 32), [rng.uniform(0.05, 1) for _ in range(3)])
        counts = tuple(rng.randint(0, 6) for _ in range(3))
        for i in range(3):
            more = tuple(n + (i == j) for j, n in enumerate(counts))
            assert planner.speed(more) >= planner.speed(counts)


def test_what_does_not_fit_has_no_speed():
    planner = planner_of(8, (0.1, 0.2, 0.3), (2, 2, 2))
    assert planner.speed((3, 0, 0)) == 0.0
    assert planner.seconds((3, 0, 0)) == float("inf")
    assert planner.speed((4, 0, 0)) > 0
    assert planner.room((3, 0, 0)) == (0, 0, 0)


def test_heuristic_is_never_better_than_exact():
    rng = random.Random(3)
    for _ in range(40):
        p = rng.choice((4, 8, 16))
        seconds = sorted(round(rng.uniform(0.1, 1), 3) for _ in range(3))
        planner = planner_of(p, seconds)
        for counts, proposal in best_by_placement(heuristic_proposals(p, seconds, (4, 3, 3))).items():
            assert p * seconds[-1] / proposal.speedup >= planner.seconds(counts) - 1e-8


def test_fillings_hold_just_enough():
    for counts in fillings(10, (3, 2, 1), (4, 4, 4)):
        assert sum(a * n for a, n in zip((3, 2, 1), counts, strict=True)) >= 10
        last = max(i for i, n in enumerate(counts) if n)
        fewer = [n - (i == last) for i, n in enumerate(counts)]
        assert sum(a * n for a, n in zip((3, 2, 1), fewer, strict=True)) < 10


def test_proposals_keep_the_papers_limits():
    rng = random.Random(4)
    for _ in range(200):
        planner = planner_of(rng.choice((8, 16, 32)), [rng.uniform(0.1, 1) for _ in range(3)])
        held = tuple(rng.randint(0, 3) for _ in range(3))
        if not 0 < sum(held) <= planner.num_ests:
            continue
        free = tuple(rng.randint(0, 8) for _ in range(3))
        proposals = propose(planner, held, free, top_k=3)
        gains = [p.gain for p in proposals]
        assert gains == sorted(gains, reverse=True)
        for p in proposals:
            assert p.waste <= 0.30 + 1e-12
            assert sum(p.counts) <= 2 * sum(held)
            assert [b - a for a, b in zip(held, p.counts, strict=True)] == [
                p.added if i == p.device_type else 0 for i in range(3)
            ]
            assert p.added <= free[p.device_type]
            assert p.gain == pytest.approx((planner.speed(p.counts) / planner.speed(held) - 1) / p.added + 1)
        for i in range(3):
            assert sum(p.device_type == i for p in proposals) <= 3


def test_proposals_need_something_to_grow_from():
    with pytest.raises(ValueError, match="held"):
        propose(planner_of(4, (0.1, 0.2, 0.3)), (0, 0, 0), (1, 1, 1))


def test_planner_refuses_nothing_to_run():
    with pytest.raises(ValueError, match="num_ests=0"):
        TypePlanner(0, [AffineStepTime(1)])
    with pytest.raises(ValueError, match="no usable type"):
        TypePlanner(1, [None])
