"""Each level promises what it says and no more: D0 ends with a change of placement, D1 with a change of device type."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_easyscale.devices import device_type
from lightning_easyscale.kernels import build

from .harness import Outcome, RunFailedError, Runs, compare

JOB = "tests.integration.scenarios.random_jobs:random_job"
WIDE = "tests.integration.scenarios.levels:wide_job"


def run(runs: Runs, placement: tuple[int, ...], **options: Any) -> Outcome:
    outcome = runs.easyscale(JOB, {"seed": 1, "n": 4}, placement, **options)
    if outcome.error is not None:
        raise RunFailedError(outcome.error["traceback"])
    return outcome


def differ(one: Outcome, other: Outcome) -> bool:
    try:
        compare(one, other)
    except AssertionError:
        return True
    return False


def test_d0_repeats_itself_and_differs_after_a_change_of_placement(runs: Runs) -> None:
    level = {"determinism": "D0"}
    first = run(runs, (2, 2), strategy=level)
    compare(first, run(runs, (2, 2), strategy=level))
    assert differ(first, run(runs, (4,), strategy=level))


def test_d0_equals_stock_ddp_while_every_device_holds_one_est(runs: Runs) -> None:
    reference = runs.reference(JOB, {"seed": 1, "n": 4}, 4)
    compare(reference, run(runs, (1, 1, 1, 1), strategy={"determinism": "D0"}))


@pytest.mark.emulation
def test_d1_differs_across_emulated_types_and_not_within_one(fresh_runs: Any) -> None:
    environment = device_type("t4", emulate=True).environment
    usual, other = fresh_runs({}), fresh_runs(dict(environment))
    here, there = (r.easyscale(WIDE, {}, (2, 1)) for r in (usual, other))
    assert here.error is None
    assert there.error is None
    compare(there, other.easyscale(WIDE, {}, (3,)))
    assert differ(here, there)


PORTABLE = {"pool": ["cpu", "h100"]}


@pytest.mark.skipif(bool(build.why_unavailable()), reason=build.why_unavailable() or "available")
@pytest.mark.parametrize("placement", [(3,), (2, 1)])
def test_d2_with_a_gpu_in_the_pool_equals_stock_ddp_under_the_same_kernels(
    runs: Runs, placement: tuple[int, ...]
) -> None:
    name = "tests.integration.scenarios.levels:portable_job"
    reference = runs.reference(name, {}, 3, determinism={"level": "D2", **PORTABLE})
    assert reference.error is None, reference.error
    compare(reference, runs.easyscale(name, {}, placement, strategy={"determinism": "D2", **PORTABLE}))
    if placement == (3,):
        assert differ(reference, runs.reference(name, {}, 3))


@pytest.mark.parametrize("order", ["ddp", "tree"])
def test_d1_equals_stock_ddp_with_nine_million_parameters_in_one_bucket(runs: Runs, order: str) -> None:
    build, config = "tests.integration.scenarios.levels:large_job", {}
    reference = runs.reference(build, config, 3, order)
    assert reference.error is None, reference.error
    compare(reference, runs.easyscale(build, config, (2, 1), order))
