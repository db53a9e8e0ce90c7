"""What collectives and messages of the virtual world return: ``Work`` objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]

from .executor import Executor
from .messages import Address

if TYPE_CHECKING:
    _Work = Any
else:
    _Work = dist.Work


def copy_into(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Overwrite tensors by what a collective brought."""
    # No write of one EST's own: what a collective brings is the same for all ESTs.
    with torch.no_grad(), torch._C.DisableTorchFunction():
        for target, source in zip(targets, sources, strict=True):
            target.detach().copy_(source)


def done(result: Any) -> dist.Work:
    """What a collective returns that is over."""
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(result)
    return work_of(future)


def work_of(future: torch.futures.Future[Any]) -> dist.Work:
    """What a collective returns whose result `future` will hold."""
    return _create_work_from_future(future)


class Receipt(_Work):
    """A message to be received; taken, at the latest, when the object is waited for.

    Args:
        rank: the receiving EST.
        executor: its executor.
        tensors: what the message overwrites.
        sources: group rank of each possible sender -> where its message comes. With one sender, its next message is
            spoken for at once; with several, the lowest whose message has come is chosen when it is waited for.
    """

    def __init__(self, rank: int, executor: Executor, tensors: list[Tensor], sources: Mapping[int, Address]) -> None:
        super().__init__()
        self._rank = rank
        self._executor = executor
        self._tensors = tensors
        self._sources = sources
        mail = executor.mail
        self._number = mail.claim(next(iter(sources.values()))) if len(sources) == 1 else None
        self._sender: int | None = None

    def _number_from(self, address: Address) -> int:
        return self._executor.mail.unclaimed(address) if self._number is None else self._number

    def _arrived(self) -> int | None:
        mail = self._executor.mail
        return next((i for i, a in self._sources.items() if mail.has(a, self._number_from(a))), None)

    def is_completed(self) -> bool:
        """Whether the message has come."""
        return self._sender is not None or self._arrived() is not None

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Let other ESTs run until the message has come, and take it; the runtime's own timeout applies."""
        if self._sender is not None:
            return True
        senders = sorted(address.sender for address in self._sources.values())
        self._executor.wait_until(
            self._rank,
            f"recv from {senders}",
            lambda: self._arrived() is not None,
            outside=not set(senders) <= set(self._executor.ranks),
        )
        self._sender = self._arrived()
        assert self._sender is not None
        address, mail = self._sources[self._sender], self._executor.mail
        number = mail.claim(address) if self._number is None else self._number
        copy_into(self._tensors, mail.take(address, number))
        return True

    def _source_rank(self) -> int:
        assert self._sender is not None
        return self._sender
