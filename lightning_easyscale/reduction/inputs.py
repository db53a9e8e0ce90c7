"""Inputs of an EST in host memory, while it waits for the gradients of others.

A training loop holds a step's batch until its last callback has seen it, so the batches of all ESTs of an executor
would be on the device at a time: 18 MiB for each 32 images of ImageNet. Only the memory goes: tensors and whatever
views them stay what they are, and have their contents again before the EST goes on.
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


class WaitingInputs:
    """The inputs of one EST's step, which leave the device while the EST waits."""

    def __init__(self) -> None:
        self._held: list[weakref.ref[Tensor]] = []
        self._aside = Aside()
        self._room = HostRoom()

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
        tensors = [tensor for ref in self._held if (tensor := ref()) is not None]
        storages = [tensor.untyped_storage() for tensor in tensors]
        sizes = [storage.nbytes() for storage in storages]
        with self._aside.after(*tensors):
            copies = [self._room.take_in(tensor) for tensor in tensors]
        for storage in storages:
            storage.resize_(0)
        try:
            yield
        finally:
            self._aside.join()
            for tensor, storage, size, copy in zip(tensors, storages, sizes, copies, strict=True):
                storage.resize_(size)
                # `data` has a version of its own: what a graph has saved was not written to.
                tensor.data.copy_(copy, non_blocking=True)
                self._room.give_back(copy)


def _leaves(batch: Any) -> list[Any]:
    """`tree_leaves`, without its search in what most loaders give."""
    if type(batch) in (list, tuple) and all(type(item) is Tensor for item in batch):
        return list(batch)
    return tree_leaves(batch)


def _may_go(tensor: Any) -> bool:
    return (
        type(tensor) is Tensor
        and tensor.layout == torch.strided
        and not tensor.requires_grad
        and tensor.untyped_storage().nbytes() >= WORTH
    )
