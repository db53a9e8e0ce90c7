"""Collectives in the virtual world give the bits of real gloo processes, on every placement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_easyscale.reduction.orders import ring_fold
from lightning_easyscale.runtime.collectives import all_reduce
from lightning_easyscale.runtime.header import STOP
from tests.reduction.pool import Pool

from . import tasks

PLACEMENTS = {2: [(2,), (1, 1)], 3: [(3,), (2, 1), (1, 2)], 4: [(4,), (3, 1), (1, 2, 1)]}


def virtual(pool: Pool, placement: tuple[int, ...], task: Any = tasks.virtual, **arguments: Any) -> list[Any]:
    results: dict[int, Any] = {}
    for part in pool.run(len(placement), task, placement=placement, **arguments):
        results.update(part)
    return [results[rank] for rank in range(sum(placement))]


@pytest.mark.parametrize("n", PLACEMENTS)
@pytest.mark.parametrize("name", tasks.EXACT)
def test_a_collective_equals_gloo(pool: Pool, name: str, n: int) -> None:
    expected = pool.run(n, tasks.real, name=name)
    for placement in PLACEMENTS[n]:
        assert virtual(pool, placement, name=name) == expected, f"on {placement}"


def test_an_average_of_integers_is_cut() -> None:
    """Which is what NCCL does (tests/reduction/test_gpu.py); gloo averages nothing."""
    (made,), *_ = all_reduce([[torch.tensor([3, -3, 8])], [torch.tensor([4, -4, 8])]], dist.ReduceOp.AVG, ring_fold)
    assert torch.equal(made, torch.tensor([3, -3, 8]))


def test_subgroups_equal_gloo(pool: Pool) -> None:
    expected = pool.run(5, tasks.real_subgroups)
    assert virtual(pool, (5,), tasks.subgroups) == expected
    assert virtual(pool, (1, 1, 1, 1, 1), tasks.subgroups) == expected
    assert virtual(pool, (7,), tasks.subgroups) == virtual(pool, (1, 2, 1, 2, 1), tasks.subgroups)


@pytest.mark.parametrize("what", ["calls", "shapes"])
def test_executors_at_different_collectives(pool: Pool, what: str) -> None:
    for kind, message in pool.run(2, tasks.disagree, what=what):
        assert kind == "CollectiveMismatch"
        assert "executor 0 is at `all_reduce(float32[3])" in message
        assert "executor 1 is at" in message
        assert "HINT: every rank has to call the same collectives" in message


@pytest.mark.parametrize("waits_in", ["barrier", "recv"])
def test_a_failure_elsewhere_is_told_with_its_cause(pool: Pool, tmp_path: Path, waits_in: str) -> None:
    store = str(tmp_path / "store") if waits_in == "recv" else ""
    (kind, message), (own, cause) = pool.run(2, tasks.disagree, what="failure", store=store)
    assert (own, cause) == ("ZeroDivisionError", "the cause")
    assert kind == "RemoteESTError"
    assert message == "EST 1 failed on executor 1: ZeroDivisionError('the cause')"


def test_executors_agree_on_stopping(pool: Pool) -> None:
    for stops in pool.run(3, tasks.agree):
        assert stops[:4] == [0, STOP, 0, ["", "x", "xx"]]


@pytest.mark.parametrize("placement", [(3,), (2, 1), (1, 1, 1)])
def test_all_ests_learn_of_a_stop_at_the_same_collective(pool: Pool, placement: tuple[int, ...]) -> None:
    assert virtual(pool, placement, tasks.stop_is_agreed) == [[False, True, True]] * 3


def test_an_executor_on_a_cpu_and_one_on_a_gpu_share_tensors(pool: Pool) -> None:
    assert pool.run(2, tasks.share_between_kinds) == [[0.0, 3.0]] * 2
