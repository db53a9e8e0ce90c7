"""Inputs of an EST in host memory, while it waits for the gradients of others.

A training loop holds a step's batch until its last callback has seen it, so the batches of all ESTs of an executor
would be on the device at a time: 18 MiB for each 32 images of ImageNet. Only the memory goes: tensors and whatever
views them stay what they are, and have their contents again before the EST goes on.

They set out for that when the turn before the EST's own ends, whose kernels may still have to run: to memory of their
own, as that which will be theirs again may still be in use by those kernels.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .host import Aside, HostRoom

WORTH = 1 << 20  # bytes; smaller ones share their allocation with others


class InputTurns:
    """The inputs of all ESTs of an executor."""

    def __init__(self) -> None:
        self.aside = Aside()
        self.room = HostRoom()
        self.read: torch.cuda.Event | None = None  # what came last has been read
        self._of: dict[int, WaitingInputs] = {}

    def of(self, rank: int) -> WaitingInputs:
        """An EST's, of its current fit."""
        self._of[rank] = WaitingInputs(self, rank)
        return self._of[rank]

    def following(self, rank: int) -> WaitingInputs:
        """Those of the EST whose turn is next."""
        return self._of[min((other for other in self._of if other > rank), default=min(self._of))]


class WaitingInputs:
    """The inputs of one EST's step, which leave the device while the EST waits."""

    def __init__(self, turns: InputTurns, rank: int) -> None:
        self._turns = turns
        self._rank = rank
        self._held: list[weakref.ref[Tensor]] = []
        self._gone: list[tuple[Tensor, int, Tensor]] = []
        self._coming: list[Tensor] = []
        self._here: torch.cuda.Event | None = None

    def hold(self, given: Any, moved: Any) -> None:
        """A batch has come to the device; the one before it is forgotten.

        Args:
            given: the batch as it was, any nesting that `torch.utils._pytree` knows.
            moved: what ``Tensor.to`` made of each tensor: itself, which is left alone as somebody else may read it
                meanwhile, or a tensor that only this EST has.
        """
        before, after = _leaves(given), _leaves(moved)
        pairs = zip(before, after, strict=True) if len(before) == len(after) else ()
        self._held = [weakref.ref(new) for old, new in pairs if new is not old and _may_go(new)]

    @contextmanager
    def away(self) -> Iterator[None]:
        """Inside the block the inputs are in host memory, and nobody reads them."""
        turns = self._turns
        # First, or it would have to wait for this EST's backward.
        turns.following(self._rank)._set_out()
        tensors = [tensor for ref in self._held if (tensor := ref()) is not None]
        with turns.aside.after(*tensors):
            copies = [turns.room.take_in(tensor) for tensor in tensors]
        sizes = [tensor.untyped_storage().nbytes() for tensor in tensors]
        for tensor in tensors:
            tensor.untyped_storage().resize_(0)
        self._gone = list(zip(tensors, sizes, copies, strict=True))
        try:
            yield
        finally:
            self._set_out()
            self._arrive()

    def _set_out(self) -> None:
        """Begin to come back."""
        if self._coming or not self._gone:
            return
        turns = self._turns
        with turns.aside.before(turns.read, self._here) as self._here:
            for tensor, _, copy in self._gone:
                self._coming.append(torch.empty_like(copy, device=tensor.device).copy_(copy, non_blocking=True))
                turns.room.give_back(copy)

    def _arrive(self) -> None:
        if not self._gone:
            return
        if self._here is not None:
            torch.cuda.current_stream().wait_event(self._here)
        for (tensor, size, _), contents in zip(self._gone, self._coming, strict=True):
            tensor.untyped_storage().resize_(size)
            # `data` has a version of its own: what a graph has saved was not written to.
            tensor.data.copy_(contents)
        if self._here is not None:
            self._turns.read = self._turns.read or torch.cuda.Event()
            self._turns.read.record()
        self._gone, self._coming = [], []


def _leaves(batch: Any) -> list[Any]:
    """`tree_leaves`, without its search in what most loaders give."""
    items = list(batch.values()) if type(batch) is dict else batch
    if type(items) in (list, tuple) and all(type(item) is Tensor for item in items):
        return list(items)
    return tree_leaves(batch)


def _may_go(tensor: Any) -> bool:
    return (
        type(tensor) is Tensor
        and tensor.layout == torch.strided
        and not tensor.requires_grad
        and tensor.untyped_storage().nbytes() >= WORTH
    )
