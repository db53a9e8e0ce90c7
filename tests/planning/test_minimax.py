import random

import numpy as np
import pytest

from lightning_easyscale.planning.minimax import (
    capacities,
    fewest_devices,
    fill_in_order_of_finish,
    smallest_limit,
)
from lightning_easyscale.planning.step_time import AffineStepTime, TabulatedStepTime, to_ns

optimize = pytest.importorskip("scipy.optimize")
csr_matrix = pytest.importorskip("scipy.sparse").csr_matrix

BLOCK = 5


def random_instance(rng):
    num_ests = rng.randint(1, 14)
    models = []
    for _ in range(rng.randint(1, 6)):
        cap = rng.choice([None, None, rng.randint(0, num_ests)])
        models.append(AffineStepTime(rng.randint(1, 40), rng.choice([0, rng.randint(0, 9)]), rng.randint(0, 15), cap))
    room = sum(num_ests if m.max_ests is None else min(m.max_ests, num_ests) for m in models)
    return (num_ests, models) if room >= num_ests else random_instance(rng)


def by_integer_programs(instances):
    """Minimise the f of every instance subject to T_g(a_g) <= f, sum a_g = P; z_g says whether device g is used.

    Instances share a program block by block (the solver's start costs more than a small instance); they do not
    interact.
    """
    total = sum(2 * len(models) + 1 for _, models in instances)
    cost, upper, integer = np.zeros(total), np.ones(total), np.ones(total)
    rows, low, high, goals, start = [], [], [], [], 0

    def row(entries, least, most):
        line = np.zeros(total)
        for column, value in entries:
            line[column] = value
        rows.append(line)
        low.append(least)
        high.append(most)

    for num_ests, models in instances:
        n = len(models)
        goal = start + 2 * n
        goals.append(goal)
        cost[goal], upper[goal], integer[goal] = 1.0, np.inf, 0.0
        row([(start + g, 1.0) for g in range(n)], num_ests, num_ests)
        for g, m in enumerate(models):
            a, z = start + g, start + n + g
            upper[a] = num_ests if m.max_ests is None else min(m.max_ests, num_ests)
            row([(a, m.est_ns + m.switch_ns), (z, m.fixed_ns - m.switch_ns), (goal, -1.0)], -np.inf, 0.0)
            row([(a, 1.0), (z, -max(upper[a], 1.0))], -np.inf, 0.0)
            row([(a, -1.0), (z, 1.0)], -np.inf, 0.0)  # or a negative coefficient of z_g is free profit
        start = goal + 1
    found = optimize.milp(
        cost,
        constraints=optimize.LinearConstraint(csr_matrix(np.array(rows)), low, high),
        bounds=optimize.Bounds(np.zeros(total), upper),
        integrality=integer,
        options={"mip_rel_gap": 0.0},
    )
    assert found.success, found.message
    return [round(found.x[goal]) for goal in goals]


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.matrix)])
def test_threshold_equals_integer_program(count):
    rng = random.Random(count)
    for _ in range(count // BLOCK):
        instances = [random_instance(rng) for _ in range(BLOCK)]
        assert [smallest_limit(*instance) for instance in instances] == by_integer_programs(instances)


def test_heap_equals_threshold_on_ten_thousand_instances():
    rng = random.Random(8)
    for _ in range(10_000):
        num_ests, models = random_instance(rng)
        upper = [num_ests if m.max_ests is None else min(m.max_ests, num_ests) for m in models]
        counts = fill_in_order_of_finish(num_ests, models, [0] * len(models), upper)
        assert sum(counts) == num_ests
        slowest = max(m.time_ns(a) for m, a in zip(models, counts, strict=True))
        assert slowest == smallest_limit(num_ests, models)


def test_threshold_equals_heap_on_measured_tables():
    rng = random.Random(9)
    for _ in range(500):
        models = [
            TabulatedStepTime(tuple(sorted(rng.randint(1, 60) for _ in range(rng.randint(1, 6))))) for _ in range(4)
        ]
        num_ests = rng.randint(1, sum(m.max_ests for m in models))
        upper = [min(m.max_ests, num_ests) for m in models]
        counts = fill_in_order_of_finish(num_ests, models, [0] * 4, upper)
        slowest = max(m.time_ns(a) for m, a in zip(models, counts, strict=True))
        assert slowest == smallest_limit(num_ests, models)


def test_every_device_gets_an_est_when_asked():
    rng = random.Random(10)
    for _ in range(500):
        models = [AffineStepTime(rng.randint(1, 40)) for _ in range(rng.randint(1, 5))]
        num_ests = rng.randint(len(models), 12)
        counts = fill_in_order_of_finish(num_ests, models, [1] * len(models), [num_ests] * len(models))
        slowest = max(m.time_ns(a) for m, a in zip(models, counts, strict=True))
        assert slowest == smallest_limit(num_ests, models, at_least_one=True)


def test_capacity_is_the_inverse_of_time():
    rng = random.Random(11)
    for _ in range(2000):
        model = AffineStepTime(rng.randint(1, 30), rng.randint(0, 9), rng.randint(0, 20), rng.choice([None, 5]))
        limit = rng.randint(0, 300)
        fit = model.capacity(limit)
        assert model.time_ns(fit) <= limit or fit == 0
        assert model.time_ns(fit + 1) > limit or fit == model.max_ests


def test_fewest_devices_matches_enumeration():
    rng = random.Random(12)
    for _ in range(400):
        n, num_ests = rng.randint(1, 6), rng.randint(1, 10)
        room = [rng.randint(0, 5) for _ in range(n)]
        if sum(room) < num_ests:
            continue
        keep = [rng.randint(0, u) for u in room]
        sets = [[i for i in range(n) if mask >> i & 1] for mask in range(1 << n)]
        able = [s for s in sets if sum(room[i] for i in s) >= num_ests]
        size = min(map(len, able))
        most = max(sum(keep[i] for i in s) for s in able if len(s) == size)
        chosen = fewest_devices(num_ests, room, keep)
        assert len(chosen) == size
        assert sum(room[i] for i in chosen) >= num_ests
        assert sum(keep[i] for i in chosen) == most


def test_more_devices_and_more_room_never_hurt():
    rng = random.Random(13)
    for _ in range(500):
        num_ests, models = random_instance(rng)
        best = smallest_limit(num_ests, models)
        assert smallest_limit(num_ests, [*models, AffineStepTime(rng.randint(1, 40))]) <= best
        assert sum(capacities(best, models, num_ests)) >= num_ests
        assert sum(capacities(best - 1, models, num_ests)) < num_ests


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: AffineStepTime(0), "est_ns=0"),
        (lambda: AffineStepTime(1, -1), "switch_ns=-1"),
        (lambda: AffineStepTime(1, max_ests=-2), "max_ests=-2"),
        (lambda: TabulatedStepTime((3, 2)), "nondecreasing"),
        (lambda: to_ns(-1.0, "fixed_seconds"), "fixed_seconds=-1.0"),
        (lambda: smallest_limit(5, [AffineStepTime(1, max_ests=2)]), "num_ests=5"),
        (lambda: smallest_limit(1, [AffineStepTime(1)] * 2, at_least_one=True), "cannot run on 2 devices"),
    ],
)
def test_bad_input_is_named(build, words):
    with pytest.raises(ValueError, match=words) as caught:
        build()
    assert "HINT" in str(caught.value)
