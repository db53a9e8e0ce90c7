"""The two orders against the real thing: gloo's all-reduce among real processes, and arithmetic by hand."""

from __future__ import annotations

import pytest
import torch

from lightning_easyscale.reduction.orders import ring_chunks, ring_fold, tree_fold

from .pool import Pool
from .tasks import SMALL, extremes_differ, inputs, ring_differs

EDGES = (262_145, 655_361)
MORE_EDGES = (262_143, 262_144, 1_310_721, 2_621_441, 5_242_879)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_ring_fold_equals_gloo_all_reduce(pool: Pool, n: int) -> None:
    dtypes = ("float32", "bfloat16", "float64", "float16")
    answers = pool.run(n, ring_differs, sizes=SMALL, dtypes=dtypes, ops=("sum", "product", "min", "max"))
    assert answers == [[]] * n


@pytest.mark.parametrize("n", [3, 5])
def test_ring_fold_equals_gloo_all_reduce_around_segment_edges(pool: Pool, n: int) -> None:
    assert pool.run(n, ring_differs, sizes=EDGES, dtypes=("float32", "bfloat16"), ops=("sum",)) == [[]] * n


def test_ring_fold_equals_gloo_all_reduce_above_nine_million_elements(pool: Pool) -> None:
    assert pool.run(3, ring_differs, sizes=(9_000_001,), dtypes=("float32",), ops=("sum",)) == [[]] * 3


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "float16"])
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_ring_fold_equals_gloo_all_reduce_everywhere(pool: Pool, n: int, dtype: str) -> None:
    sizes = (*SMALL, *EDGES, *MORE_EDGES, 9_000_001)
    assert pool.run(n, ring_differs, sizes=sizes, dtypes=(dtype,), ops=("sum",)) == [[]] * n


def test_ring_extremes_treat_nan_and_signed_zero_as_gloo_does(pool: Pool) -> None:
    assert pool.run(3, extremes_differ) == [[]] * 3


@pytest.mark.parametrize("n", range(1, 10))
def test_chunks_cover_the_buffer_once(n: int) -> None:
    for length in (0, 1, n, 1000, 300_001, 9_000_001):
        chunks = ring_chunks(4 * length, 4, n)
        assert len(chunks) == n
        assert chunks[0].start == 0
        assert chunks[-1].stop == length
        assert all(a.stop == b.start for a, b in zip(chunks, chunks[1:], strict=False))


@pytest.mark.parametrize("consume", [False, True])
def test_tree_fold_combines_aligned_blocks_left_to_right(consume: bool) -> None:
    x = inputs(7, 500, torch.float32)
    expected = (((x[0] + x[1]) + (x[2] + x[3])) + (x[4] + x[5])) + x[6]
    kept = [part.clone() for part in x]
    got = tree_fold(x, consume=consume)
    assert torch.equal(got, expected)
    assert (got.data_ptr() == x[0].data_ptr()) is consume
    assert consume or all(torch.equal(a, b) for a, b in zip(x, kept, strict=True))


def test_the_orders_differ_from_each_other_and_from_rank_order() -> None:
    x = inputs(5, 1000, torch.float32)
    in_rank_order = x[0] + x[1] + x[2] + x[3] + x[4]
    assert not torch.equal(ring_fold(x), tree_fold(x))
    assert not torch.equal(ring_fold(x), in_rank_order)
    assert not torch.equal(tree_fold(x), in_rank_order)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "`parts` is empty"),
        ([torch.ones(3), torch.ones(3).to_sparse()], "sparse=False"),
        ([torch.ones(3), torch.ones(4)], r"`parts\[1\]` has shape \[4\]"),
        ([torch.ones(3), torch.ones(3).double()], "torch.float64"),
        ([torch.ones(2, 2)], r"shape \[2, 2\]"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(parts: list[torch.Tensor], message: str) -> None:
    for fold in (ring_fold, tree_fold):
        with pytest.raises(ValueError, match=message):
            fold(parts)


def test_an_operation_without_an_order_is_refused() -> None:
    with pytest.raises(ValueError, match="`op=avg`"):
        ring_fold([torch.ones(1)], "avg")
