import random

import numpy as np
import pytest

from lightning_easyscale.planning import AffineStepTime, Option, TypePlanner, choose_exactly, choose_greedily

optimize = pytest.importorskip("scipy.optimize")


def by_integer_program(jobs, capacity):
    flat = [(j, o) for j, options in enumerate(jobs) for o in options]
    if not flat:
        return 0.0
    rows = np.array([[float(j == i) for j, _ in flat] for i in range(len(jobs))])
    uses = np.array([[float(o.counts[t]) for _, o in flat] for t in range(len(capacity))])
    found = optimize.milp(
        [-o.utility for _, o in flat],
        constraints=[
            optimize.LinearConstraint(rows, -np.inf, 1.0),
            optimize.LinearConstraint(uses, -np.inf, np.array(capacity, float)),
        ],
        bounds=optimize.Bounds(0, 1),
        integrality=[1] * len(flat),
    )
    return -found.fun


def worth(chosen):
    return sum(o.utility for o in chosen if o)


def test_exact_choice_equals_integer_program():
    rng = random.Random(1)
    for _ in range(120):
        capacity = tuple(rng.randint(0, 6) for _ in range(3))
        jobs = [
            [
                Option(tuple(rng.randint(0, 4) for _ in range(3)), round(rng.uniform(0, 5), 3))
                for _ in range(rng.randint(0, 6))
            ]
            for _ in range(rng.randint(1, 5))
        ]
        chosen = choose_exactly(jobs, capacity)
        for t in range(3):
            assert sum(o.counts[t] for o in chosen if o) <= capacity[t]
        assert all(o is None or o in options for o, options in zip(chosen, jobs, strict=True))
        assert worth(chosen) == pytest.approx(by_integer_program(jobs, capacity), abs=1e-6)
        greedy = choose_greedily(jobs, capacity)
        assert worth(greedy) <= worth(chosen) + 1e-9
        for t in range(3):
            assert sum(o.counts[t] for o in greedy if o) <= capacity[t]


def test_step_counts_make_greedy_lose_and_exact_not():
    planner = TypePlanner(4, [AffineStepTime(100)])
    options = [Option((n,), 400 * planner.speed((n,)) / 1e9) for n in (1, 2, 3, 4)]
    assert worth(choose_exactly([options, options], (6,))) == pytest.approx(6.0)


def test_wrong_length_is_named():
    with pytest.raises(ValueError, match="counts"):
        choose_exactly([[Option((1,), 1.0)]], (2, 2))
