"""D1 equals stock DDP for random jobs, on every placement, through any number of placement changes.

The pairwise subset covers every pair of (N, placement kind), (N, order), (order, changes), ... once or more. The full
product, marked `matrix`, has every split of N over 1..N executors in both orders with every number of changes.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from .harness import RunFailedError, Runs, compare

JOB = "tests.integration.scenarios.random_jobs:random_job"
BATCHES = 12  # micro-batches of a random job, six per epoch


def splits(n: int) -> list[tuple[int, ...]]:
    """All ways to split `n` ESTs over 1..n executors into contiguous ranges."""
    if n == 0:
        return [()]
    return [(first, *rest) for first in range(1, n + 1) for rest in splits(n - first)]


def placement_for(n: int, kind: str, pick: random.Random) -> tuple[int, ...]:
    some = {
        "one": [(n,)],
        "shared": [s for s in splits(n) if 1 < len(s) < n] or [(1,) * n],
        "own": [(1,) * n],
    }
    return pick.choice(some[kind])


def pairwise(dimensions: dict[str, list[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """A small set of cases in which every pair of values of every two dimensions occurs."""
    names = list(dimensions)
    pairs = {
        (a, x, b, y) for i, a in enumerate(names) for b in names[i + 1 :] for x in dimensions[a] for y in dimensions[b]
    }
    pick, chosen = random.Random(seed), []
    while pairs:
        candidates = []
        for _ in range(60):
            case = {name: pick.choice(values) for name, values in dimensions.items()}
            a, x, b, y = min(pairs, key=repr)
            case[a], case[b] = x, y
            candidates.append(case)
        best = max(candidates, key=lambda c: sum(c[a] == x and c[b] == y for a, x, b, y in pairs))
        chosen.append(best)
        pairs = {p for p in pairs if not (best[p[0]] == p[1] and best[p[2]] == p[3])}
    return chosen


DIMENSIONS: dict[str, list[Any]] = {
    "n": [2, 3, 4, 5],
    "kind": ["one", "shared", "own"],
    "order": ["ddp", "tree"],
    "changes": [0, 1, 3],
    "job": list(range(4)),
    "overlap": [False, True, "tail"],
}


def case_id(case: dict[str, Any]) -> str:
    return "-".join(f"{k}{'+'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in case.items())


def run_case(runs: Runs, case: dict[str, Any]) -> None:
    """Compare a run of a random job with its reference; the first placement is given or of a kind."""
    pick = random.Random(case_id(case))
    n = case["n"]
    config = {"seed": case["job"], "n": n}
    reference = runs.reference(JOB, config, n, case["order"])
    if reference.error is not None:
        raise RunFailedError(reference.error["traceback"])
    first = case["placement"] if "placement" in case else placement_for(n, case["kind"], pick)
    stops = sorted(pick.sample(range(1, BATCHES), case["changes"]))
    placements = [first, *(pick.choice(splits(n)) for _ in stops)]
    stages = list(zip(placements, [*stops, None], strict=True))
    strategy = {"overlap_backward": case["overlap"]}
    compare(reference, runs.elastic(JOB, config, stages, case["order"], strategy=strategy))


@pytest.mark.parametrize("case", pairwise(DIMENSIONS), ids=case_id)
def test_d1_equals_stock_ddp(runs: Runs, case: dict[str, Any]) -> None:
    run_case(runs, case)


def product() -> list[dict[str, Any]]:
    """Every N, split, order and number of changes, each with four jobs of twelve."""
    cases: list[dict[str, Any]] = []
    for n, order, changes in itertools.product(*(DIMENSIONS[name] for name in ("n", "order", "changes"))):
        for placement in splits(n):
            case = {"n": n, "placement": placement, "order": order, "changes": changes}
            jobs = random.Random(case_id(case)).sample(range(12), 4)
            cases += [{**case, "job": job, "overlap": DIMENSIONS["overlap"][i % 3]} for i, job in enumerate(jobs)]
    return cases


def test_the_product_has_every_placement() -> None:
    assert [len(splits(n)) for n in (2, 3, 4, 5)] == [2, 4, 8, 16]
    assert all(sum(split) == 5 and min(split) > 0 for split in splits(5))
    placed = {(case["placement"], case["order"], case["changes"]) for case in product()}
    assert len(placed) == (2 + 4 + 8 + 16) * 2 * 3
    assert {case["job"] for case in product()} == set(range(12))


def test_the_subset_has_every_pair() -> None:
    chosen = pairwise(DIMENSIONS)
    for (a, xs), (b, ys) in itertools.combinations(DIMENSIONS.items(), 2):
        assert {(case[a], case[b]) for case in chosen} == set(itertools.product(xs, ys))


@pytest.mark.matrix
@pytest.mark.parametrize("case", product(), ids=case_id)
def test_d1_equals_stock_ddp_in_the_full_product(runs: Runs, case: dict[str, Any]) -> None:
    run_case(runs, case)


AT = {
    "inside an accumulation window": ({"accumulate": 3, "validate": "none"}, 4),
    "at an epoch's end": ({"accumulate": 1, "validate": "none"}, 6),
    "at an epoch's end with validation": ({"accumulate": 1, "validate": "epoch"}, 6),
    "before a validation inside the epoch": ({"accumulate": 1, "validate": "inside"}, 3),
    "in the last window, which is incomplete": ({"accumulate": 4, "validate": "epoch"}, 5),
    "at the first batch": ({"accumulate": 1, "validate": "none"}, 1),
}


@pytest.mark.parametrize("order", ["ddp", "tree"])
@pytest.mark.parametrize("where", AT)
def test_d1_equals_stock_ddp_after_a_change(runs: Runs, where: str, order: str) -> None:
    override, stop = AT[where]
    seed = list(AT).index(where)
    config = {"seed": seed, "n": 3, "override": override}
    reference = runs.reference(JOB, config, 3, order)
    if reference.error is not None:
        raise RunFailedError(reference.error["traceback"])
    compare(reference, runs.elastic(JOB, config, [((2, 1), stop), ((3,), None)], order))


@pytest.mark.parametrize("first", [(3,), (2, 1)])
@pytest.mark.parametrize("order", ["ddp", "tree"])
@pytest.mark.parametrize("overlap", [True, "tail"])
def test_d1_equals_stock_ddp_where_backwards_begin_to_draw_numbers(
    runs: Runs, overlap: bool | str, order: str, first: tuple[int, ...]
) -> None:
    config = {"seed": 4, "n": 3, "override": {"accumulate": 1, "dropout": 0.2, "noisy_gradients_from": 4}}
    reference = runs.reference(JOB, config, 3, order)
    if reference.error is not None:
        raise RunFailedError(reference.error["traceback"])
    stages = [(first, 7), ((3,), None)]
    compare(reference, runs.elastic(JOB, config, stages, order, strategy={"overlap_backward": overlap}))
