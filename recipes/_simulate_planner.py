"""How far the paper's rules are from the optimum: ``python -m recipes._simulate_planner OUT.json``.

Inside a job: the heuristic's ESTs per type against the exact allocation, on the same placement and over all placements
that a given set of devices allows. Between jobs: growth by proposals and unrestricted greedy against the exact choice.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from lightning_easyscale.planning import (
    AffineStepTime,
    Option,
    TypePlanner,
    best_by_placement,
    choose_exactly,
    choose_greedily,
    heuristic_proposals,
    propose,
    published_profile,
)
from lightning_easyscale.planning.by_type import Counts
from lightning_easyscale.planning.step_time import to_ns


def _planner(num_ests: int, seconds: Sequence[float]) -> TypePlanner:
    return TypePlanner(num_ests, [AffineStepTime(to_ns(t)) for t in seconds])


def _published_times(generator: random.Random) -> tuple[str, list[float]]:
    profile = published_profile()
    workload = generator.choice(profile.workloads)
    batch = profile.batch_sizes(workload, "v100", "D2")[0]
    return workload, [profile.seconds(workload, t, "D2", batch) for t in ("v100", "p100", "t4")]


def inside_a_job(instances: int, seed: int) -> dict[str, Any]:
    """The heuristic's step time over the exact one, minus 1, on random placements of published and random speeds."""
    generator = random.Random(seed)
    same, best, missing, placements = [], [], 0, 0
    for _ in range(instances):
        num_ests = generator.choice((4, 8, 12, 16, 24, 32))
        if generator.random() < 0.5:
            _, seconds = _published_times(generator)
        else:
            seconds = sorted(round(generator.uniform(0.1, 1.0), 4) for _ in range(3))
        limits: Counts = tuple(generator.randint(0, 8) for _ in range(3))
        if not 0 < sum(limits) <= num_ests:
            continue
        planner = _planner(num_ests, seconds)
        proposals = best_by_placement(heuristic_proposals(num_ests, seconds, limits))
        reference = num_ests * seconds[-1]
        for counts, proposal in proposals.items():
            same.append(reference / proposal.speedup / planner.seconds(counts) - 1.0)
        placements += len(proposals)
        fastest = planner.seconds(limits)
        if proposals:
            best.append(reference / max(p.speedup for p in proposals.values()) / fastest - 1.0)
        missing += limits not in proposals
    return {
        "instances": len(best),
        "placements": placements,
        "same_placement": _spread(same),
        "best_of_all_placements": _spread(best),
        "full_placement_never_proposed": missing,
    }


def _spread(gaps: Sequence[float]) -> dict[str, float]:
    ordered = sorted(gaps)
    return {
        "mean": mean(ordered),
        "p95": ordered[int(0.95 * (len(ordered) - 1))],
        "max": ordered[-1],
        "optimal_share": sum(g < 1e-9 for g in ordered) / len(ordered),
    }


def between_jobs(rounds: int, seed: int) -> dict[str, Any]:
    """Sum of speed-ups that growth by proposals and greedy reach, against the exact choice, from an empty cluster."""
    generator = random.Random(seed)
    capacity: Counts = (32, 16, 16)
    growth, greedy, seconds_exact = [], [], []
    for _ in range(rounds):
        jobs = []
        for _ in range(generator.choice((4, 8, 16))):
            _, times = _published_times(generator)
            planner = _planner(generator.choice((4, 8, 16, 32)), times)
            jobs.append((planner, times[-1]))
        options = [_options(planner, unit, capacity) for planner, unit in jobs]
        begun = time.perf_counter()
        exact = sum(o.utility for o in choose_exactly(options, capacity) if o)
        seconds_exact.append(time.perf_counter() - begun)
        greedy.append(1.0 - sum(o.utility for o in choose_greedily(options, capacity) if o) / exact)
        growth.append(1.0 - _grown(jobs, capacity) / exact)
    return {
        "rounds": rounds,
        "loss_of_growth_by_proposals": _spread(growth),
        "loss_of_greedy": _spread(greedy),
        "mean_seconds_of_exact_choice": mean(seconds_exact),
    }


def _options(planner: TypePlanner, unit: float, capacity: Counts) -> list[Option]:
    p = planner.num_ests
    found = []
    for a in range(min(p, capacity[0]) + 1):
        for b in range(min(p - a, capacity[1]) + 1):
            for c in range(min(p - a - b, capacity[2]) + 1):
                if a + b + c and planner.trimmed((a, b, c)) == (a, b, c):
                    found.append(Option((a, b, c), p * unit * planner.speed((a, b, c))))
    return found


def _grown(jobs: Sequence[tuple[TypePlanner, float]], capacity: Counts) -> float:
    """EasyScale's rule to its end: one device of the slowest type each, then proposals by gain."""
    free = list(capacity)
    held: list[Counts | None] = []
    for _ in jobs:
        kind = next((i for i in (2, 1, 0) if free[i]), None)
        held.append(None if kind is None else tuple(int(i == kind) for i in range(3)))
        if kind is not None:
            free[kind] -= 1
    while True:
        offers = [
            (j, p)
            for j, (counts, (planner, _)) in enumerate(zip(held, jobs, strict=True))
            if counts is not None
            for p in propose(planner, counts, capacity)
        ]
        offers.sort(key=lambda offer: -offer[1].gain)
        done: set[int] = set()
        for j, p in offers:
            if j not in done and p.added <= free[p.device_type]:
                done.add(j)
                free[p.device_type] -= p.added
                held[j] = p.counts
        if not done:
            break
    return sum(
        planner.num_ests * unit * planner.speed(counts)
        for counts, (planner, unit) in zip(held, jobs, strict=True)
        if counts is not None
    )


def main() -> None:
    """Run both comparisons and write them."""
    report = {"inside_a_job": inside_a_job(2000, seed=0), "between_jobs": between_jobs(25, seed=0)}
    text = json.dumps(report, indent=1)
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
