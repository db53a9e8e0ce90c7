"""Collecting the gradients of one executor's ESTs: what both orders have in common.

Life of a step: the wrapper of each EST (`collector`) tells of every parameter whose gradient is final (`deposit`, or
`deposit_group` for a group of them) and of the end of its backward (`finish`), where the EST waits. `TreeGradients`
folds and frees gradients at once; `BucketGradients` leaves them where they are until the last EST has come to them. The
last EST to finish completes the step for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from .lane import Pending
from .layout import BucketLayout

Rendezvous = Callable[[int, Callable[[], None]], None]
"""``rendezvous(rank, work)`` suspends EST `rank` until every local EST has called it; the last one runs `work`."""


class _Reduction(Protocol):
    """What a collection needs to know of a reduction, whatever it reduces."""

    n: int
    ests: range

    def share(self, flags: Tensor) -> Pending:
        """See `exchange.Reduction.share`."""

    def close(self) -> None:
        """See `exchange.Reduction.close`."""


class GradientReduce(ABC):
    """What an EST's module wrapper tells about its gradients.

    Args:
        reduction: reduces them over all executors.
        private_gradients: every EST gets its own copy of the reduced gradients. Needed where ESTs may change them
            (user hooks between reduction and step) or go on with ``zero_grad(set_to_none=False)`` or a second backward
            through the same graph. Without it, only the executor's first EST has them.
        rendezvous: suspends an EST in `finish` until the executor's last one arrives and runs the given work. None:
            `finish` returns at once and the last one's call assigns all gradients, for ESTs run one after the other.
    """

    layout: BucketLayout | None = None
    """The bucket layout of the next step, where it decides bits and is no longer the initial one."""

    def __init__(self, reduction: _Reduction, *, private_gradients: bool, rendezvous: Rendezvous | None) -> None:
        self.n = reduction.n
        self.private_gradients = private_gradients
        self._ests = reduction.ests
        self._exchange = reduction
        self._rendezvous = rendezvous
        self._parameters: dict[int, list[Parameter]] = {}
        self._members: dict[tuple[int, int], list[Parameter]] = {}
        self._finished: dict[int, Sequence[bool] | None] = {}
        self._unused: frozenset[int] = frozenset()

    def register(self, rank: int, parameters: Sequence[Parameter]) -> None:
        """Announce the parameters of EST `rank`, in DDP's order, before its first step.

        Raises:
            ValueError: if the EST is not of this executor or its parameters differ from another EST's.
        """
        if rank not in self._ests:
            raise ValueError(f"`rank={rank}` is not one of this executor's ESTs {self._ests}.")
        kinds = [(p.shape, p.dtype, p.device, p.stride()) for p in parameters]
        for other, theirs in self._parameters.items():
            if other != rank and kinds != [(p.shape, p.dtype, p.device, p.stride()) for p in theirs]:
                raise ValueError(
                    f"`parameters` of EST {rank} differ from those of EST {other}."
                    " HINT: all ESTs must build the same model."
                )
        first = not self._parameters
        self._parameters[rank] = list(parameters)
        self._members.clear()
        if first:
            self._prepare(self._parameters[rank])

    @abstractmethod
    def _prepare(self, parameters: list[Parameter]) -> None:
        """The first EST has announced its parameters."""

    def begin(self, rank: int) -> None:  # noqa: B027  nothing to do for most
        """EST `rank` is about to deposit its first gradient of a step; may be left out."""

    @abstractmethod
    def deposit(self, rank: int, index: int, *, used: bool = True) -> None:
        """The gradient of parameter `index` of EST `rank` is final, once per step; without one it counts as zero.

        An unused parameter keeps its own gradient until it is known whether any EST used it.
        """

    @property
    @abstractmethod
    def groups(self) -> Sequence[Sequence[int]]:
        """The parameters that may be told of together; none as long as each has to be told of by itself."""

    @abstractmethod
    def deposit_group(self, rank: int, number: int, grads: list[Tensor]) -> list[Tensor]:
        """The gradients of all parameters of a group of EST `rank` are final, instead of `deposit` for each.

        Returns:
            `grads` if the parameters keep them until the end of the step, else none.
        """

    def _group(self, rank: int, number: int) -> list[Parameter]:
        """The parameters of a group of EST `rank`."""
        members = self._members.get((rank, number))
        if members is None:
            parameters = self._parameters[rank]
            members = self._members[rank, number] = [parameters[i] for i in self.groups[number]]
        return members

    def free_workspaces(self) -> None:
        """Give back the memory in which cuBLAS works, when no EST computes.

        Each thread has a handle, and each handle memory of its own: with Hopper's 32 MiB, that of 16 ESTs would be half
        a gigabyte. The next product takes it from the allocator again.
        """
        if len(self._ests) > 1 and self._parameters[self._ests.start][0].is_cuda:
            torch._C._cuda_clearCublasWorkspaces()

    def finish(self, rank: int, used: Sequence[bool] | None = None) -> None:
        """Every parameter of EST `rank` was deposited; returns when `.grad` holds the reduced gradients.

        `used` says which parameters had a gradient; None repeats what was last known (at first: all).
        """
        self._finished[rank] = used
        if self._rendezvous is not None:
            self._rendezvous(rank, self._step)
        elif len(self._finished) == len(self._ests):
            self._step()

    def _step(self) -> None:
        flags = [used for used in self._finished.values() if used is not None]
        self._finished = {}
        if flags:
            # In line behind the buckets, so that every executor meets the collectives in the same order.
            anywhere = self._share([int(any(column)) for column in zip(*flags, strict=True)])
            self._unused = frozenset(i for i, flag in enumerate(anywhere) if not flag)
        with torch.no_grad():
            self._complete()

    @abstractmethod
    def _complete(self) -> None:
        """All ESTs have finished: give them the reduced gradients."""

    def _share(self, numbers: Sequence[int]) -> list[int]:
        """The greatest that any executor says, one by one."""
        device = self._parameters[self._ests.start][0].device
        return self._exchange.share(torch.tensor(numbers, dtype=torch.int32).to(device)).wait().tolist()

    def close(self) -> None:
        """End the communication thread; the next step begins a new one."""
        self._exchange.close()
