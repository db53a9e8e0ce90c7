"""Gradients of one executor's ESTs, folded in the `tree` order while they are produced, and freed at once.

Life of a step: each EST, in rank order, calls `deposit` as its parameters' gradients become final, which multiplies by
1/N into the flat buffer of the parameter's bucket and frees the gradient; a full buffer is folded into the bucket's
binary counter (`TreeFold`). Filling the last EST's buffer starts the exchange with the other executors, so it overlaps
the rest of that EST's backward. `finish` ends an EST's part; the last one assigns the reduced gradients to all.

Invariants: per bucket at most ``2 * floor(log2 k) + 1`` buffers for k ESTs are alive; buckets are exchanged in index
order on every executor; the grouping into buckets changes no bits, because the order of addition is by rank alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from ..placement import Placement
from .exchange import TreeReduction
from .lane import Pending
from .layout import rebuilt_layout
from .tree import Offload, TreeFold

Rendezvous = Callable[[int, Callable[[], None]], None]
"""``rendezvous(rank, work)`` suspends EST `rank` until every local EST has called it; the last one runs `work`."""


class GradientReduce(Protocol):
    """What an EST's module wrapper tells about its gradients."""

    n: int

    def register(self, rank: int, parameters: Sequence[Parameter]) -> None:
        """Announce the parameters of EST `rank`, in DDP's order, before its first step."""

    def deposit(self, rank: int, index: int, *, used: bool = True) -> None:
        """Take over the gradient of parameter `index` of EST `rank`, once per step; without one it counts as zero.

        An unused parameter keeps its own gradient until it is known whether any EST used it.
        """

    def finish(self, rank: int, used: Sequence[bool] | None = None) -> None:
        """Every parameter of EST `rank` was deposited; returns when `.grad` holds the reduced gradients.

        `used` says which parameters had a gradient; None repeats what was last known (at first: all).
        """

    def privatize(self, rank: int) -> None:
        """Give EST `rank` its own copy of gradients it shares, before backward accumulates into them."""


class TreeGradients:
    """`GradientReduce` in the `tree` order.

    Args:
        placement: which executor hosts which ESTs.
        executor: this executor.
        group: process group of all executors; None for one executor.
        private_gradients: every EST gets its own copy of the reduced gradients. Needed where ESTs may change them
            (user hooks between reduction and step) or go on with ``zero_grad(set_to_none=False)`` or a second backward
            through the same graph; otherwise the ESTs of an executor share one storage.
        offload: ``"host"`` lets partial sums wait in pinned host memory.
        bucket_cap_mb: size of a bucket in MiB, as in DDP.
        rendezvous: suspends an EST in `finish` until the executor's last one arrives and runs the given work. None:
            `finish` returns at once and the last one's call assigns all gradients, for ESTs run one after the other.
    """

    def __init__(
        self,
        placement: Placement,
        executor: int,
        group: dist.ProcessGroup | None,
        *,
        private_gradients: bool = False,
        offload: Offload = None,
        bucket_cap_mb: float | None = None,
        rendezvous: Rendezvous | None = None,
        in_turn: Callable[[int], None] | None = None,
    ) -> None:
        self.n = placement.num_ests
        self.private_gradients = private_gradients
        self._ests = placement.ranges[executor]
        self._reduction = TreeReduction(placement, executor, group, self.n)
        self._offload = offload
        self._bucket_cap_mb = bucket_cap_mb
        self._rendezvous = rendezvous
        self._in_turn = in_turn
        self._begun: set[int] = set()
        self._parameters: dict[int, list[Parameter]] = {}
        self._buckets: list[_Bucket] = []
        self._place: list[tuple[_Bucket, int]] = []
        self._pending: list[Pending] = []
        self._finished: dict[int, Sequence[bool] | None] = {}
        self._unused: frozenset[int] = frozenset()
        self._shared: set[int] = set()

    def register(self, rank: int, parameters: Sequence[Parameter]) -> None:
        """See `GradientReduce.register`.

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
        self._parameters[rank] = list(parameters)
        if not self._buckets:
            # Gradients of the last parameters are expected first.
            layout = rebuilt_layout(range(len(parameters) - 1, -1, -1), parameters, self._bucket_cap_mb)
            places: dict[int, tuple[_Bucket, int]] = {}
            for members in layout.buckets:
                bucket = _Bucket(members, [parameters[i] for i in members], self._ests, self.n, self._offload)
                self._buckets.append(bucket)
                places.update({i: (bucket, slot) for slot, i in enumerate(members)})
            self._place = [places[i] for i in range(len(parameters))]

    def deposit(self, rank: int, index: int, *, used: bool = True) -> None:
        """See `GradientReduce.deposit`.

        Raises:
            ValueError: if the gradient is sparse.
        """
        if self._in_turn is not None and rank not in self._begun:
            self._begun.add(rank)
            self._in_turn(rank)
        parameter = self._parameters[rank][index]
        bucket, slot = self._place[index]
        bucket.fill(rank, slot, parameter.grad, 1.0 / self.n)
        if used:
            parameter.grad = None
        while len(self._pending) < len(self._buckets) and self._buckets[len(self._pending)].fold.complete:
            blocks = self._buckets[len(self._pending)].fold.partials()
            self._pending.append(self._reduction.start_blocks(len(self._pending), blocks))

    def finish(self, rank: int, used: Sequence[bool] | None = None) -> None:
        """See `GradientReduce.finish`."""
        self._finished[rank] = used
        if self._rendezvous is not None:
            self._rendezvous(rank, self._complete)
        elif len(self._finished) == len(self._ests):
            self._complete()

    def privatize(self, rank: int) -> None:
        """See `GradientReduce.privatize`."""
        if not self._shared:
            return
        for parameter in self._parameters[rank]:
            grad = parameter.grad
            # An address may have been given to another tensor since: then this copies once in vain.
            if grad is not None and grad.untyped_storage().data_ptr() in self._shared:
                parameter.grad = grad.clone()

    def close(self) -> None:
        """End the communication thread."""
        self._reduction.close()

    def _complete(self) -> None:
        flags = [used for used in self._finished.values() if used is not None]
        if flags:
            # In line behind the buckets, so that every executor meets the collectives in the same order.
            device = self._parameters[self._ests.start][0].device
            anywhere = self._reduction.share(torch.tensor(flags, dtype=torch.int32).amax(0).to(device))
            self._unused = frozenset(i for i, flag in enumerate(anywhere.wait().tolist()) if not flag)
        pending, self._pending = self._pending, []
        self._finished = {}
        self._begun = set()
        self._shared = set()
        share = len(self._ests) > 1 and not self.private_gradients
        for bucket, handle in zip(self._buckets, pending, strict=True):
            flat = handle.wait()
            views = bucket.views(flat)
            if share:
                self._shared.add(flat.untyped_storage().data_ptr())
            for rank in self._ests:
                if self.private_gradients and rank != self._ests.start:
                    views = bucket.views(flat.clone())
                for index, view in zip(bucket.members, views, strict=True):
                    if index not in self._unused:
                        self._parameters[rank][index].grad = view


class _Bucket:
    """One group of parameters: its flat buffers under way and its binary counter."""

    def __init__(
        self, members: Sequence[int], parameters: Sequence[Parameter], ests: range, n: int, offload: Offload
    ) -> None:
        self.members = tuple(members)
        self.fold = TreeFold(ests, n, offload=offload)
        self._dtype, self._device = parameters[0].dtype, parameters[0].device
        self._numel = sum(p.numel() for p in parameters)
        self._forms: list[tuple[torch.Size, tuple[int, ...], int]] = []
        offset = 0
        for p in parameters:
            # As in DDP: a dense parameter keeps its memory order, any other becomes contiguous.
            stride = p.stride() if _is_dense(p) else torch.empty(p.shape, device="meta").stride()
            self._forms.append((p.shape, stride, offset))
            offset += p.numel()
        self._filling: dict[int, tuple[Tensor, list[Tensor], set[int]]] = {}
        self._early: dict[int, Tensor] = {}

    def views(self, flat: Tensor) -> list[Tensor]:
        """The gradients in a flat buffer, shaped and strided like their parameters."""
        start = flat.storage_offset()
        return [flat.as_strided(shape, stride, start + offset) for shape, stride, offset in self._forms]

    @torch.no_grad()
    def fill(self, rank: int, slot: int, grad: Tensor | None, factor: float) -> None:
        """Write one gradient, scaled, into the buffer of EST `rank`; fold the buffer when it is full."""
        if grad is not None and grad.layout != torch.strided:
            raise ValueError(
                f"EST {rank} produced a sparse gradient ({grad.layout}) of shape {list(grad.shape)}, which has no"
                " placement-independent order of addition. HINT: build the embedding with `sparse=False`."
            )
        if rank not in self._filling:
            flat = torch.empty(self._numel, dtype=self._dtype, device=self._device)
            self._filling[rank] = (flat, self.views(flat), set())
        flat, views, filled = self._filling[rank]
        if grad is None:
            views[slot].zero_()
        else:
            torch.mul(grad.detach(), factor, out=views[slot])
        filled.add(slot)
        if len(filled) == len(self.members):
            del self._filling[rank]
            # ESTs take turns in rank order, but a collective inside backward may let a later one be ready first.
            self._early[rank] = flat
            while (due := self.fold.due) in self._early:
                self.fold.push(due, self._early.pop(due))


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size if size > 1 else 1
    return True
