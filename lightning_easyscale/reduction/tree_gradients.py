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

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from ..placement import Placement
from .bucket import BucketForm
from .exchange import TreeReduction
from .gradients import GradientReduce, Rendezvous
from .lane import Pending
from .layout import rebuilt_layout
from .tree import Offload, TreeFold


class TreeGradients(GradientReduce):
    """`GradientReduce` in the `tree` order.

    Args:
        placement: which executor hosts which ESTs.
        executor: this executor.
        group: process group of all executors; None for one executor.
        private_gradients: see `GradientReduce`; otherwise the ESTs of an executor share one storage.
        offload: ``"host"`` lets partial sums wait in pinned host memory.
        bucket_cap_mb: size of a bucket in MiB, as in DDP.
        rendezvous: see `GradientReduce`.
        in_turn: suspends an EST until all lower local ranks have come to their first gradient.
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
        self._reduction = TreeReduction(placement, executor, group, placement.num_ests)
        super().__init__(self._reduction, private_gradients=private_gradients, rendezvous=rendezvous)
        self._offload = offload
        self._bucket_cap_mb = bucket_cap_mb
        self._in_turn = in_turn
        self._begun: set[int] = set()
        self._buckets: list[_Bucket] = []
        self._place: list[tuple[_Bucket, int]] = []
        self._pending: list[Pending] = []
        self._shared: set[int] = set()

    def _prepare(self, parameters: list[Parameter]) -> None:
        # Gradients of the last parameters are expected first.
        layout = rebuilt_layout(range(len(parameters) - 1, -1, -1), parameters, self._bucket_cap_mb)
        places: dict[int, tuple[_Bucket, int]] = {}
        for members in layout.buckets:
            bucket = _Bucket(members, parameters, self._ests, self.n, self._offload)
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

    def privatize(self, rank: int) -> None:
        """See `GradientReduce.privatize`."""
        if not self._shared:
            return
        for parameter in self._parameters[rank]:
            grad = parameter.grad
            # An address may have been given to another tensor since: then this copies once in vain.
            if grad is not None and grad.untyped_storage().data_ptr() in self._shared:
                parameter.grad = grad.clone()

    def _complete(self) -> None:
        pending, self._pending = self._pending, []
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


class _Bucket(BucketForm):
    """One group of parameters: its flat buffers under way and its binary counter."""

    def __init__(
        self, members: Sequence[int], parameters: Sequence[Parameter], ests: range, n: int, offload: Offload
    ) -> None:
        super().__init__(members, parameters)
        self.fold = TreeFold(ests, n, offload=offload)
        self._filling: dict[int, tuple[Tensor, list[Tensor], set[int]]] = {}
        self._early: dict[int, Tensor] = {}

    @torch.no_grad()
    def fill(self, rank: int, slot: int, grad: Tensor | None, factor: float) -> None:
        """Write one gradient, scaled, into the buffer of EST `rank`; fold the buffer when it is full."""
        if grad is not None and grad.layout != torch.strided:
            raise ValueError(
                f"EST {rank} produced a sparse gradient ({grad.layout}) of shape {list(grad.shape)}, which has no"
                " placement-independent order of addition. HINT: build the embedding with `sparse=False`."
            )
        if rank not in self._filling:
            flat = torch.empty(self.numel, dtype=self.dtype, device=self.device)
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
