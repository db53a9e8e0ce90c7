"""The binary counter: bits of the tree, memory bound, refusals."""

from __future__ import annotations

import itertools
import math
import operator
import weakref

import pytest
import torch

from lightning_easyscale.placement import Placement
from lightning_easyscale.reduction import tree, tree_gradients
from lightning_easyscale.reduction.host import Aside, HostRoom
from lightning_easyscale.reduction.orders import tree_fold
from lightning_easyscale.reduction.tree import Block, TreeFold, blocks_of, combine

from .tasks import compositions, inputs


def ranges(n: int) -> list[range]:
    return [range(a, b) for a, b in itertools.combinations(range(n + 1), 2)]


@pytest.mark.parametrize("n", range(1, 11))
def test_partial_sums_of_every_split_combine_to_the_tree(n: int) -> None:
    expected = tree_fold(inputs(n, 50, torch.float32))
    for split in compositions(n):
        parts, blocks, start = inputs(n, 50, torch.float32), [], 0
        for count in split:
            fold = TreeFold(range(start, start + count), n)
            for rank in range(start, start + count):
                fold.push(rank, parts[rank])
            blocks += fold.partials()
            start += count
        assert torch.equal(combine(blocks), expected)


@pytest.mark.parametrize("ests", [r for r in ranges(18) if len(r) in (1, 2, 3, 5, 6, 7, 8, 13, 17)], ids=str)
def test_alive_partial_sums_stay_within_the_bound(ests: range) -> None:
    fold, alive, peak = TreeFold(ests, 18), weakref.WeakSet(), 0
    for rank in ests:
        flat = torch.ones(4)
        alive.add(flat)
        peak = max(peak, len(alive))
        fold.push(rank, flat)
        del flat
    assert peak <= 2 * math.floor(math.log2(len(ests))) + 1
    blocks = fold.partials()
    assert [(b.start, b.size) for b in blocks] == blocks_of(ests)
    assert all(b.start % b.size == 0 and torch.equal(b.total, torch.full((4,), float(b.size))) for b in blocks)


def test_the_bound_is_reached() -> None:
    # Ranks 1..7 are alive as 1, 2-3, 4-5, 6 and the incoming 7: five for k = 7.
    assert max(len(blocks_of(range(1, stop))) + 1 for stop in range(1, 8)) == 2 * math.floor(math.log2(7)) + 1


class _Serving(Aside):
    """Takes the tensors of a CPU for a device's."""

    @staticmethod
    def serves(tensor: torch.Tensor) -> bool:
        return True


@pytest.mark.parametrize("ests", ranges(7), ids=str)
@pytest.mark.parametrize("limit", [None, 100, 10_000])
def test_sums_that_wait_elsewhere_have_the_same_bits(
    ests: range, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "_AT_ONCE", 7)
    plain, aside = TreeFold(ests, 7), TreeFold(ests, 7, aside=_Serving())
    for _ in range(2):
        for rank, flat in zip(ests, inputs(len(ests), 20, torch.float32), strict=True):
            plain.push(rank, flat.clone())
            if limit is not None:
                aside.fetch(limit)
            aside.push(rank, flat.clone())
        if limit is not None:
            aside.fetch(limit)
            assert not aside._ahead
        blocks = aside.partials()
        assert [(b.start, b.size) for b in blocks] == blocks_of(ests)
        for a, b in zip(plain.partials(), blocks, strict=True):
            assert torch.equal(a.total, b.total)


def test_sums_come_ahead_as_far_as_there_is_room() -> None:
    fold = TreeFold(range(8), 8, aside=_Serving())
    for rank in range(7):
        fold.push(rank, torch.full((20,), float(rank)))
    fold.fetch(79)
    assert not fold._ahead
    fold.fetch(2 * 80)
    assert [int(sums[0]) for sums in fold._ahead] == [6, 4 + 5]
    moved = list(fold._ahead)
    fold.fetch(1000)
    assert [int(sums[0]) for sums in fold._ahead] == [6, 4 + 5, 0 + 1 + 2 + 3]
    assert all(map(operator.is_, fold._ahead, moved))
    fold.push(7, torch.full((20,), 7.0))
    assert torch.equal(fold.partials()[0].total, torch.full((20,), 28.0))
    assert not fold._ahead


def test_they_come_ahead_for_the_last_est_once_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    n, fetched = 4, []
    monkeypatch.setattr(tree_gradients, "Aside", _Serving)
    monkeypatch.setattr(_Serving, "spare", staticmethod(lambda device: 1 << 20))
    fetch = TreeFold.fetch

    def noted(self: TreeFold, limit: int) -> None:
        fetch(self, limit)
        fetched.append((self.due, len(self._ahead), limit))

    monkeypatch.setattr(TreeFold, "fetch", noted)
    reduce = tree_gradients.TreeGradients(Placement((n,)), 0, None, offload="host", bucket_cap_mb=1e-6)
    parameters = [[torch.nn.Parameter(torch.ones(3)) for _ in range(3)] for _ in range(n)]
    for rank in range(n):
        reduce.register(rank, parameters[rank])
    for step in range(2):
        grads = [[torch.randn(3) for _ in range(3)] for _ in range(n)]
        for rank in range(n):
            for index in (2, 1, 0):
                parameters[rank][index].grad = grads[rank][index].clone()
                reduce.deposit(rank, index)
        for rank in range(n):
            reduce.finish(rank)
        # Of three buckets, before the second and the third: the first's gradients are the first sign of life.
        assert fetched == [(n - 1, 2, 1 << 20)] * 2 * (step + 1)
        for index in range(3):
            expected = tree_fold([grads[rank][index] / n for rank in range(n)])
            assert torch.equal(parameters[0][index].grad, expected)
            parameters[0][index].grad = None


def test_they_come_ahead_while_the_last_backward_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    n, ahead = 4, []
    monkeypatch.setattr(tree_gradients, "Aside", _Serving)
    monkeypatch.setattr(_Serving, "spare", staticmethod(lambda device: 100))  # one sum of 80 bytes at a time
    reduce = tree_gradients.TreeGradients(Placement((n,)), 0, None, offload="host")
    parameters = [[torch.nn.Parameter(torch.ones(5)) for _ in range(4)] for _ in range(n)]
    for rank in range(n):
        reduce.register(rank, parameters[rank])
    (members,) = reduce.groups
    for _ in range(2):
        factors = torch.randn(n, 4, 5)
        for rank in range(n):
            for index in members:
                (parameters[rank][index] * factors[rank, index]).sum().backward()
                ahead.append(len(reduce._buckets[0].fold._ahead))
            for index in members:
                reduce.deposit(rank, index)
        # After the third and the fourth of the last one's, as many as there are.
        assert ahead == [0] * 4 * (n - 1) + [0, 0, 1, 2]
        ahead.clear()
        for rank in range(n):
            reduce.finish(rank)
        for index, parameter in enumerate(parameters[0]):
            assert torch.equal(parameter.grad, tree_fold(list(factors[:, index] / n)))
            parameter.grad = None


def test_memory_on_the_host_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    take_in = HostRoom.take_in

    def noted(self: HostRoom, flat: torch.Tensor) -> torch.Tensor:
        room = take_in(self, flat)
        taken.append(room.data_ptr())
        return room

    monkeypatch.setattr(HostRoom, "take_in", noted)
    fold = TreeFold(range(16), 16, aside=_Serving())
    for size in (20, 20, 30):
        parts = inputs(16, size, torch.float32)
        for rank, flat in enumerate(parts):
            fold.push(rank, flat.clone())
        assert torch.equal(fold.partials()[0].total, tree_fold(parts))
        assert len(taken) == 15  # all but the last, which is folded at once
        assert len(set(taken)) == 4  # what waits at a time
        taken.clear()


def test_host_offload_does_nothing_on_the_cpu() -> None:
    fold, flat = TreeFold(range(2), 2, aside=Aside()), torch.ones(2)
    for rank in range(2):
        fold.push(rank, flat if rank == 0 else torch.ones(2))
    assert fold.partials()[0].total is flat


def test_a_fold_is_reusable_for_the_next_step() -> None:
    fold = TreeFold(range(2), 2)
    for _ in range(2):
        fold.push(0, torch.ones(3))
        fold.push(1, torch.ones(3))
        assert fold.complete
        assert torch.equal(fold.partials()[0].total, torch.full((3,), 2.0))
        assert not fold.complete


def test_wrong_use_is_refused() -> None:
    for bad in (range(0), range(0, 4, 2), range(3, 6), range(-1, 2)):
        with pytest.raises(ValueError, match="`range_of_ests="):
            TreeFold(bad, 5)
    fold = TreeFold(range(1, 3), 4)
    with pytest.raises(ValueError, match="`rank=2` cannot be folded: rank 1 is due"):
        fold.push(2, torch.ones(1))
    with pytest.raises(ValueError, match="sparse=False"):
        fold.push(1, torch.ones(3).to_sparse())
    fold.push(1, torch.ones(1))
    with pytest.raises(RuntimeError, match="EST 2 has not finished"):
        fold.partials()
    with pytest.raises(ValueError, match="`blocks` continue at rank 2 where 1 was expected"):
        combine([Block(0, 1, torch.ones(1)), Block(2, 1, torch.ones(1))])
    with pytest.raises(ValueError, match="`blocks` is empty"):
        combine([])
