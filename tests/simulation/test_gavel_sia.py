"""The forms of Gavel and Sia that scale give what the plain ones would."""

import random

import numpy as np
import pytest

from lightning_easyscale.planning import Option, choose_exactly, choose_greedily, published_profile
from lightning_easyscale.simulation.job import JobSpec, build_jobs
from lightning_easyscale.simulation.policies.gavel import GavelLas, GavelMaxSum
from lightning_easyscale.simulation.policies.sia import SiaLike
from lightning_easyscale.simulation.policy import Costs, View

TYPES = ("v100", "p100", "t4")


def random_jobs(draw, count, now=1e5):
    profile = published_profile()
    specs = []
    for i in range(count):
        workload, d2 = draw.choice(["resnet50", "bert", "vgg19"]), draw.random() < 0.5
        batch = profile.batch_sizes(workload, "v100", "D1")[0]
        specs.append(JobSpec(str(i), i * now / count, workload, draw.choice([1, 2, 4, 8]), 100.0, batch, d2, "v100"))
    return build_jobs(specs, TYPES, profile)


def view_of(jobs, capacity, now=1e5):
    return View(now, TYPES, capacity, list(capacity), list(capacity), {j.index: j for j in jobs}, Costs(), arrived=jobs)


def best_objective(jobs, capacity, *, fair):
    """Gavel's linear program as published: one share per job and type."""
    linprog = pytest.importorskip("scipy.optimize").linprog
    width, n = len(TYPES), len(jobs) * len(TYPES)
    times = [[m.time_ns(1) for m in j.planner.models] for j in jobs]
    speed = np.array([[max(t) / x for x in t] for t in times]).ravel()
    rows, bounds = [], []
    for j in range(len(jobs)):
        rows.append([1.0 if k // width == j else 0.0 for k in range(n)] + [0.0])
        bounds.append(1.0)
    for t in range(width):
        rows.append([jobs[k // width].spec.max_ests if k % width == t else 0.0 for k in range(n)] + [0.0])
        bounds.append(capacity[t])
    if fair:
        for j in range(len(jobs)):
            rows.append([-speed[k] if k // width == j else 0.0 for k in range(n)] + [1.0])
            bounds.append(0.0)
    cost = np.append(np.zeros(n) if fair else -speed, -1.0 if fair else 0.0)
    upper = [(0, 0 if jobs[k // width].spec.max_ests > capacity[k % width] else None) for k in range(n)]
    return -linprog(cost, A_ub=rows, b_ub=bounds, bounds=[*upper, (0, None if fair else 0)], method="highs").fun


@pytest.mark.parametrize("kind", [GavelMaxSum, GavelLas])
def test_gavel_over_classes_reaches_the_program_over_jobs(kind):
    draw = random.Random(0)
    for _ in range(30):
        jobs = random_jobs(draw, draw.randint(1, 25))
        capacity = tuple(draw.choice([8, 12, 16]) for _ in TYPES)
        policy = kind()
        policy.check(jobs, capacity, TYPES)
        policy.decide(view_of(jobs, capacity))
        shares = policy._dealt(np.arange(len(jobs)))
        speeds = np.array([policy._speeds[policy._class_of[j.index]] for j in jobs])
        sizes = np.array([j.spec.max_ests for j in jobs])
        assert (shares >= 0).all()
        assert (shares.sum(1) <= 1 + 1e-6).all()
        assert (sizes @ shares <= np.array(capacity) + 1e-6).all()
        got = (shares * speeds).sum(1).min() if policy.fair else (shares * speeds).sum()
        assert got == pytest.approx(best_objective(jobs, capacity, fair=policy.fair), rel=5e-3 if policy.fair else 1e-6)


def sia_options(policy, jobs, view):
    return [
        [
            Option(tuple(n if t == kind else 0 for t in range(len(TYPES))), worth)
            for kind, n, worth in policy.configurations(job, view)
        ]
        for job in jobs
    ]


def worth_of(chosen, options):
    return sum(
        next(o.utility for o in mine if o.counts == chosen[i]) for i, mine in enumerate(options) if chosen.get(i)
    )


def test_sias_fast_choice_is_the_greedy_one_and_close_to_the_best():
    draw = random.Random(1)
    losses = []
    for _ in range(60):
        jobs = random_jobs(draw, draw.randint(1, 14))
        capacity = tuple(draw.randint(1, 6) for _ in TYPES)
        for job in jobs:
            if draw.random() < 0.5:
                kind, n = draw.randrange(3), draw.choice([1, 2])
                job.counts = tuple(min(n, job.spec.max_ests) if t == kind else 0 for t in range(3))
        view, policy = view_of(jobs, capacity), SiaLike()
        options = sia_options(policy, jobs, view)
        for job in jobs:
            if job.counts is None:
                policy._wait(job)
            else:
                policy._running[job.index] = job
        fast = policy.greedily(view)
        assert all(sum(c[t] for c in fast.values()) <= capacity[t] for t in range(3))
        plain = sum(o.utility for o in choose_greedily(options, capacity) if o)
        assert worth_of(fast, options) == pytest.approx(plain, rel=0.03)  # ties fall otherwise
        best = sum(o.utility for o in choose_exactly(options, capacity) if o)
        assert worth_of(policy.exactly(view), options) == pytest.approx(best)
        losses.append(1 - worth_of(fast, options) / best)
    assert min(losses) >= -1e-9
    assert sum(losses) / len(losses) < 0.05


def test_sia_starts_the_oldest_of_a_class_and_those_that_lost_their_devices_wait_in_their_old_place():
    profile = published_profile()
    specs = [JobSpec(str(i), 100.0 * i, "bert", 1, 100.0, 8, False, "v100") for i in range(4)]
    jobs = build_jobs(specs, TYPES, profile)
    view, policy = view_of(jobs, (2, 0, 0)), SiaLike()
    for index, counts in policy.decide(view).items():
        jobs[index].counts = counts
    assert [j.counts is not None for j in jobs] == [True, True, False, False]
    view.arrived, view.evicted, jobs[0].counts = [], [jobs[0]], None
    view.capacity[:] = [1, 0, 0]
    assert policy.decide(view) == {}
    view.evicted, view.gone = [], [jobs[1]]
    del view.active[1]
    assert list(policy.decide(view)) == [0]


def test_sia_decides_a_settled_round_only_once():
    jobs = random_jobs(random.Random(2), 3)
    view, policy = view_of(jobs, (8, 8, 8)), SiaLike()
    while changes := policy.decide(view):
        view.arrived = []
        for index, counts in changes.items():
            jobs[index].counts = counts
    view.now += 60.0
    policy.exactly = policy.greedily = None  # any call would fail
    assert policy.decide(view) == {}
    view.gone = [jobs[0]]
    with pytest.raises(TypeError):
        policy.decide(view)
