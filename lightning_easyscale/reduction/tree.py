"""Partial sums of the `tree` order while the ESTs of one executor finish one after the other.

An executor that hosts k ESTs need not keep k gradients: each new one is folded into the aligned power-of-two blocks
before it, as carries in a binary counter. Invariants: blocks are nodes of the tree over all N ranks, so whatever the
split of the ranks over executors, combining everybody's blocks gives `tree_fold` of all N gradients; and for any
contiguous range of k ESTs at most ``2 * floor(log2 k) + 1`` sums are alive, the incoming gradient included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from .host import Aside, HostRoom
from .orders import carries, check_parts, finish_blocks, push_block

_AT_ONCE = 25 << 20  # elements that come back from host memory at a time, where a bucket has more


class Block(NamedTuple):
    """The sum over ranks ``start..start+size-1``: an aligned block, `size` a power of two dividing `start`."""

    start: int
    size: int
    total: Tensor


def blocks_of(ests: range) -> list[tuple[int, int]]:
    """Aligned blocks ``(start, size)`` that the binary counter leaves for a contiguous range of ranks."""
    blocks: list[tuple[int, int]] = []
    for rank in ests:
        start, size = rank, 1
        while carries(blocks, size):
            start = blocks.pop()[0]
            size *= 2
        blocks.append((start, size))
    return blocks


def combine(blocks: Iterable[Block]) -> Tensor:
    """Fold the blocks of all executors; their memory is overwritten.

    Args:
        blocks: aligned blocks that together cover the ranks ``0..N-1``, ascending, sums of one length on one device.

    Returns:
        The sum over all ranks in tree order, in the memory of the first block.

    Raises:
        ValueError: if the blocks leave a gap or overlap.
    """
    merged: list[tuple[int, int, Tensor]] = []
    reached = 0
    for start, size, total in blocks:
        if start != reached:
            raise ValueError(
                f"`blocks` continue at rank {start} where {reached} was expected."
                " HINT: pass every executor's blocks once, in ascending order."
            )
        reached = start + size
        push_block(merged, start, size, total, consume=True)
    if not merged:
        raise ValueError("`blocks` is empty. HINT: pass every executor's blocks.")
    check_parts([total for _, _, total in merged])
    return finish_blocks(merged, consume=True)


class TreeFold:
    """Binary-counter fold of the gradients of one executor's ESTs, pushed in rank order.

    Args:
        range_of_ests: the contiguous EST ranks of this executor.
        n: number of ESTs of the job.
        aside: lets the waiting partial sums of CUDA tensors be kept in pinned host memory; a carry brings one of them
            back to the device, piece by piece. None keeps them where they are.

    Raises:
        ValueError: if the range is empty, not contiguous or outside ``0..n-1``.
    """

    def __init__(self, range_of_ests: range, n: int, *, aside: Aside | None = None) -> None:
        ests = range_of_ests
        if len(ests) == 0 or ests.step != 1 or ests.start < 0 or ests.stop > n:
            raise ValueError(
                f"`range_of_ests={ests}` is not a contiguous, non-empty part of 0..{n - 1}."
                " HINT: pass a range of the placement."
            )
        self._ests = ests
        self._aside = aside
        self._room = HostRoom()
        self._next = ests.start
        self._blocks: list[tuple[int, int, Tensor]] = []
        self._ahead: list[Tensor] = []  # of the sums that come next, on the device before they are needed
        self._device: torch.device | None = None

    @property
    def due(self) -> int:
        """The rank to push next; one past the range when it is complete."""
        return self._next

    @property
    def complete(self) -> bool:
        """Whether every EST of the range was pushed."""
        return self._next == self._ests.stop

    def push(self, rank: int, flat: Tensor) -> None:
        """Fold the gradient of the next EST.

        Args:
            rank: its rank; ranks come in ascending order, each once.
            flat: contiguous flat tensor, already multiplied by 1/N; it belongs to the fold from here on.

        Raises:
            ValueError: if another rank is due, or the tensor is sparse or unlike the earlier ones.
        """
        if rank != self._next or self.complete:
            due = "no rank is due" if self.complete else f"rank {self._next} is due"
            raise ValueError(f"`rank={rank}` cannot be folded: {due}. HINT: fold the ESTs once each, in rank order.")
        check_parts([*(total for _, _, total in self._blocks[-1:]), flat])
        self._next += 1
        self._device = flat.device
        if self._aside is None or not self._aside.serves(flat):
            push_block(self._blocks, rank, 1, flat, consume=True)
        else:
            self._push_aside(rank, flat, self._aside)

    def _push_aside(self, start: int, flat: Tensor, aside: Aside) -> None:
        """`push_block` with sums that wait in host memory."""
        carried = self._carried()
        for _ in carried:
            start = self._blocks.pop()[0]
        ahead, self._ahead = self._ahead, []
        room = flat.new_empty(min(flat.numel(), _AT_ONCE)) if len(carried) > len(ahead) else flat
        with aside.after(flat, room):
            for here, waiting in zip_longest(ahead, carried):
                # Addition commutes, so the new gradient's memory may take the result.
                if here is not None:
                    flat.add_(here)
                else:
                    for part, theirs in zip(_pieces(flat), _pieces(waiting), strict=True):
                        part.add_(room[: len(part)].copy_(theirs, non_blocking=True))
                self._room.give_back(waiting)
            self._blocks.append((start, 1 << len(carried), flat if self.complete else self._room.take_in(flat)))

    def _carried(self) -> list[Tensor]:
        """The sums to which the gradient that is due will be added, one after the other."""
        blocks = list(self._blocks)
        carried: list[Tensor] = []
        while carries(blocks, 1 << len(carried)):
            carried.append(blocks.pop()[2])
        return carried

    def fetch(self, limit: int) -> None:
        """Begin to bring back, beside training, what the gradient that is due will be added to.

        Args:
            limit: bytes that it may take on the device; what does not fit comes when the gradient is there, or the next
                time that this is called.
        """
        if self._aside is None or self._device is None or self.complete:
            return
        for waiting in self._carried()[len(self._ahead) :]:
            limit -= waiting.nbytes
            if limit < 0:
                return
            here = torch.empty_like(waiting, device=self._device)
            with self._aside.after(here):
                self._ahead.append(here.copy_(waiting, non_blocking=True))

    def partials(self) -> list[Block]:
        """Take the aligned blocks of the whole range, on the device of the gradients; the fold is empty afterwards.

        With an `Aside` they are ready where its blocks end, not on the current stream.

        Raises:
            RuntimeError: if an EST of the range is still missing.
        """
        if not self.complete or self._device is None:
            raise RuntimeError(f"EST {self._next} has not finished. HINT: push every EST of {self._ests} first.")
        blocks = [Block(start, size, self._at_home(total)) for start, size, total in self._blocks]
        self._blocks = []
        self._next = self._ests.start
        return blocks

    def _at_home(self, total: Tensor) -> Tensor:
        if self._aside is None or total.device == self._device:
            return total
        made = torch.empty_like(total, device=self._device)
        with self._aside.after(made):
            made.copy_(total, non_blocking=True)
        self._room.give_back(total)
        return made


def _pieces(flat: Tensor) -> Sequence[Tensor]:
    return (flat,) if flat.numel() <= _AT_ONCE else flat.split(_AT_ONCE)
