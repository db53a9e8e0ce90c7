"""Reductions over every contiguous placement, executors being real processes."""

from __future__ import annotations

import pytest
import torch

from lightning_easyscale.placement import Placement
from lightning_easyscale.reduction.exchange import NativeReduction, RingReduction, TreeReduction
from lightning_easyscale.reduction.tree import Block

from .pool import Pool
from .tasks import SMALL, compositions, exchange_differs, local_gradients, native, reduced_by


@pytest.mark.parametrize("placement", [c for n in range(2, 6) for c in compositions(n)], ids=str)
def test_every_placement_gives_the_fold_of_all_ests(pool: Pool, placement: tuple[int, ...]) -> None:
    dtypes = ("float32", "bfloat16") if len(placement) > 1 else ("float32", "bfloat16", "float64")
    size = len(placement)
    assert pool.run(size, exchange_differs, placement=placement, sizes=SMALL, dtypes=dtypes) == [[]] * size


@pytest.mark.parametrize("placement", [(3, 4), (1, 6), (4, 1, 3), (5, 3, 1)], ids=str)
def test_more_ests_than_processes(pool: Pool, placement: tuple[int, ...]) -> None:
    size = len(placement)
    arguments = {"sizes": (1, 5, 4099, 300_001), "dtypes": ("float32",)}
    assert pool.run(size, exchange_differs, placement=placement, **arguments) == [[]] * size


@pytest.mark.matrix
@pytest.mark.parametrize("placement", [c for n in range(2, 8) for c in compositions(n) if len(c) <= 5], ids=str)
def test_every_placement_every_type_and_larger_sizes(pool: Pool, placement: tuple[int, ...]) -> None:
    size = len(placement)
    dtypes = ("float32", "bfloat16", "float64", "float16")
    sizes = (*SMALL, 262_145)
    assert pool.run(size, exchange_differs, placement=placement, sizes=sizes, dtypes=dtypes) == [[]] * size


@pytest.mark.parametrize("placement", [(1, 1), (2, 1), (1, 3, 1)], ids=str)
def test_native_is_the_local_sum_then_the_backends_all_reduce(pool: Pool, placement: tuple[int, ...]) -> None:
    assert all(pool.run(len(placement), native, placement=placement))


def test_one_executor_needs_no_group_and_results_replace_the_first_gradients() -> None:
    for kind in (RingReduction, TreeReduction, NativeReduction):
        parts = [torch.full((10,), float(r)) for r in range(3)]
        assert torch.equal(reduced_by(kind(Placement((3,)), 0, None, 3), 0, parts)(), torch.full((10,), 3.0))
        assert torch.equal(parts[0], torch.full((10,), 3.0))


def test_arguments_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="`n=3` does not match a placement of 4 ESTs"):
        RingReduction(Placement((4,)), 0, None, 3)
    with pytest.raises(ValueError, match="`executor=1` of 2 does not match rank 0 of 1 in `group`"):
        RingReduction(Placement((2, 2)), 1, None, 4)
    reduction = TreeReduction(Placement((2,)), 0, None, 2)
    with pytest.raises(ValueError, match="`local` of bucket 7 holds the gradients of 1 ESTs"):
        reduction.start(7, [torch.ones(1)])
    with pytest.raises(ValueError, match="`local` of bucket 8 holds the gradients of 1 ESTs"):
        RingReduction(Placement((2,)), 0, None, 2).start(8, local_gradients([torch.ones(3)]))
    with pytest.raises(ValueError, match="sparse=False"):
        reduction.start(0, [torch.ones(3).to_sparse(), torch.ones(3).to_sparse()])
    with pytest.raises(ValueError, match="`blocks` of bucket 1 are not the partial sums"):
        reduction.start_blocks(1, [Block(0, 1, torch.ones(1)), Block(1, 1, torch.ones(1))])


@pytest.mark.parametrize(
    ("device", "ests", "size", "flat"),
    [("meta", 3, 1000, True), ("cpu", 3, 1000, False), ("meta", 1, 1000, False), ("meta", 3, 1, False)]
    + [("meta", 4, 1 << 26, True), ("meta", 4, (1 << 26) + 1, False)],
)
def test_gradients_are_made_flat_where_launches_cost_more_and_memory_allows(
    device: str, ests: int, size: int, flat: bool
) -> None:
    """Not on a CPU, nor for one EST or one parameter, nor past 1 GiB."""
    gathered = local_gradients([torch.empty(size, device=device)] * ests, device).gathered()
    assert (gathered is not None) is flat
