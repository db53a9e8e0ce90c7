"""Transfers that executors agree on ahead of time.

A transfer between executors starts with a header. But training steps are alike: where the same broadcast (rank 0's
buffers) has followed the gradients of the last steps, executors propose it with the gradients of the next one, and if
all do, it needs no header of its own. No executor waits for the others then before a forward.

Each of them still owes that broadcast. One that comes to something else first makes it with blank tensors, so that
nobody waits for it in vain, and says so in its next header: a difference between executors is found there. Over gloo an
executor that was killed ends the broadcast at once, as its connections close. Over NCCL the others' devices would wait
for it, so nothing is agreed on ahead there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .header import digest

_SURE = 2


@dataclass(frozen=True)
class Transfer:
    """A broadcast between executors.

    Args:
        tag: what it is for.
        source: the executor whose tensors travel.
        forms: shape, type and device of every tensor, the device as it is here.
    """

    tag: str
    source: int
    forms: tuple[tuple[torch.Size, torch.dtype, torch.device], ...]

    @classmethod
    def of(cls, tag: str, tensors: Sequence[Tensor], source: int) -> Transfer:
        """The broadcast of `tensors`."""
        return cls(tag, source, tuple((t.shape, t.dtype, t.device) for t in tensors))

    @cached_property
    def digest(self) -> bytes:
        """What it is called in headers, the same on every executor."""
        sizes = ", ".join(f"{dtype}{list(shape)}" for shape, dtype, _ in self.forms)
        return digest(f"{self.tag} from {self.source}: {sizes}")

    def blanks(self) -> list[Tensor]:
        """Tensors that may travel instead."""
        return [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in self.forms]


class Habit:
    """What has followed the headers that may agree on something ahead."""

    def __init__(self) -> None:
        self._transfer: Transfer | None = None
        self._times = 0
        self._open = False  # nothing has followed the last such header yet

    def header(self, ahead: bool) -> Transfer | None:
        """A header is about to be exchanged, not a transfer's own; returns what it may propose.

        Args:
            ahead: whether it may agree on something ahead.
        """
        if self._open:
            self._times = 0
        self._open = ahead
        return self._transfer if ahead and self._times >= _SURE else None

    def transfer(self, transfer: Transfer) -> None:
        """A transfer begins."""
        if not self._open:
            return
        same = self._transfer is not None and transfer.digest == self._transfer.digest
        self._times = self._times + 1 if same else 1
        self._transfer = transfer
        self._open = False
