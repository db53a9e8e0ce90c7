"""Gradients of one executor's ESTs, folded in the `tree` order while they are produced, and freed.

Life of a step: each EST, in rank order, calls `deposit` as its parameters' gradients become final, which takes them
away. When a bucket has all of an EST's, they are multiplied by 1/N in one flat tensor, freed, and folded into the
bucket's binary counter (`TreeFold`). With the last EST's the exchange with the other executors starts, so it overlaps
the rest of that EST's backward. `finish` ends an EST's part; the last one assigns the reduced gradients.

Invariants: per bucket at most ``2 * floor(log2 k) + 1`` flat tensors for k ESTs are alive; every executor exchanges
buckets in index order; the grouping into buckets changes no bits, because the order of addition is by rank alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import compress, pairwise, repeat

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors
from torch.nn import Parameter

from ..placement import Placement
from ..runtime.bulk import assign, below_autograd, drop, has_none
from .bucket import BucketForm
from .exchange import TreeReduction
from .gradients import GradientReduce, Rendezvous
from .hooks import GradientHooks
from .host import Aside, Offload
from .lane import Pending
from .layout import rebuilt_layout
from .tree import TreeFold

# Elements from which on a gradient is scaled on its way into the flat buffer: copying first would go over it twice.
_LONG = {"cpu": 1 << 12, "cuda": 1 << 22}
# Where nothing is exchanged while backward goes on, smaller buckets are but more launches.
_ALONE_CAP_MB = 100.0


class TreeGradients(GradientReduce):
    """`GradientReduce` in the `tree` order.

    Args:
        placement: which executor hosts which ESTs.
        executor: this executor.
        group: process group of all executors; None for one executor.
        private_gradients: see `GradientReduce`.
        offload: ``"host"`` lets partial sums wait in pinned host memory.
        bucket_cap_mb: size of a bucket in MiB, as in DDP; None: also DDP's, or more on the GPU of a single executor.
        rendezvous: see `GradientReduce`.
        before: called before each bucket is reduced.
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
        before: Callable[[], None] = lambda: None,
        in_turn: Callable[[int], None] | None = None,
    ) -> None:
        self._reduction = TreeReduction(placement, executor, group, placement.num_ests, before=before)
        super().__init__(self._reduction, private_gradients=private_gradients, rendezvous=rendezvous)
        self._aside = Aside() if offload is not None else None
        self._alone = group is None
        self._bucket_cap_mb = bucket_cap_mb
        self._in_turn = in_turn
        self._begun: set[int] = set()
        self._one_by_one: set[int] = set()  # ESTs of which a parameter may still have its own gradient
        self._buckets: list[_Bucket] = []
        self._place: list[tuple[_Bucket, int]] = []
        self._pending: list[Pending] = []
        self._milestones: GradientHooks | None = None

    def register(self, rank: int, parameters: Sequence[Parameter]) -> None:
        """See `GradientReduce.register`."""
        super().register(rank, parameters)
        if rank == self._ests[-1] and self._aside is not None and self._aside.serves(parameters[0]):
            self._milestones = GradientHooks(parameters, self._fetch_for_last)
            self._milestones.listen([i for bucket in self._buckets for i in bucket.halfway()])

    def _prepare(self, parameters: list[Parameter]) -> None:
        cap = self._bucket_cap_mb
        if cap is None and self._alone and parameters[0].is_cuda:
            cap = _ALONE_CAP_MB
        # Gradients of the last parameters are expected first.
        layout = rebuilt_layout(range(len(parameters) - 1, -1, -1), parameters, cap)
        places: dict[int, tuple[_Bucket, int]] = {}
        for members in layout.buckets:
            bucket = _Bucket(members, parameters, self._ests, self.n, self._aside)
            self._buckets.append(bucket)
            places.update({i: (bucket, slot) for slot, i in enumerate(members)})
        self._place = [places[i] for i in range(len(parameters))]

    def deposit(self, rank: int, index: int, *, used: bool = True) -> None:
        """See `GradientReduce.deposit`.

        Raises:
            ValueError: if the gradient is sparse.
        """
        self.begin(rank)
        self._one_by_one.add(rank)
        parameter = self._parameters[rank][index]
        bucket, slot = self._place[index]
        bucket.take(rank, slot, parameter.grad, 1.0 / self.n)
        if used:
            parameter.grad = None
        self._start_whole()

    @property
    def groups(self) -> Sequence[Sequence[int]]:
        """See `GradientReduce.groups`."""
        return [bucket.members for bucket in self._buckets]

    def deposit_group(self, rank: int, number: int, grads: list[Tensor]) -> list[Tensor]:
        """See `GradientReduce.deposit_group`."""
        self.begin(rank)
        bucket = self._buckets[number]
        drop(self._group(rank, number))
        bucket.fold_in(rank, grads, 1.0 / self.n)
        self._start_whole()
        return []

    def begin(self, rank: int) -> None:
        """See `GradientReduce.begin`."""
        if self._in_turn is not None and rank not in self._begun:
            self._begun.add(rank)
            self._in_turn(rank)

    def _start_whole(self) -> None:
        while len(self._pending) < len(self._buckets) and self._buckets[len(self._pending)].fold.complete:
            blocks = self._buckets[len(self._pending)].fold.partials()
            with nullcontext() if self._aside is None else self._aside.after(*(block.total for block in blocks)):
                self._pending.append(self._reduction.start_blocks(len(self._pending), blocks))
            self._fetch_for_last()

    def _fetch_for_last(self, _: int = 0) -> None:
        """Bring back, while the last EST's backward gives memory back, what its gradients are added to.

        There is no other EST's turn to run beside.
        """
        if self._aside is not None and len(self._pending) < len(self._buckets):
            bucket = self._buckets[len(self._pending)]
            if bucket.fold.due == self._ests[-1]:
                bucket.fold.fetch(self._aside.spare(bucket.device))

    def _complete(self) -> None:
        if self._aside is not None:
            self._aside.join()
        pending, self._pending = self._pending, []
        self._begun = set()
        for number, (bucket, handle) in enumerate(zip(self._buckets, pending, strict=True)):
            flat = handle.wait()
            for rank in self._ests:
                if rank == self._ests.start or self.private_gradients:
                    views: Iterable[Tensor | None] = bucket.views(flat if rank == self._ests.start else flat.clone())
                elif rank in self._one_by_one:
                    views = repeat(None)
                else:
                    continue
                parameters: Iterable[Parameter] = self._group(rank, number)
                if self._unused:
                    used = [index not in self._unused for index in bucket.members]
                    parameters, views = compress(parameters, used), compress(views, used)
                assign(parameters, views)
        self._one_by_one.clear()


class _Bucket(BucketForm):
    """One group of parameters: its flat buffers under way and its binary counter."""

    def __init__(
        self, members: Sequence[int], parameters: Sequence[Parameter], ests: range, n: int, aside: Aside | None
    ) -> None:
        super().__init__(members, parameters)
        self.fold = TreeFold(ests, n, aside=aside)
        long = _LONG.get(self.device.type, _LONG["cuda"])
        self._runs = _runs([size >= long for size in self.sizes()])
        self._lengths = [sum(self.sizes()[run]) for run in self._runs]
        self._taken: dict[int, dict[int, Tensor | None]] = {}
        self._early: dict[int, Tensor] = {}

    def halfway(self) -> tuple[int, ...]:
        """Members with whose gradients a half and three quarters of all are there."""
        count = len(self.members)
        return (self.members[count // 2], self.members[3 * count // 4]) if count >= 4 else ()

    def take(self, rank: int, slot: int, grad: Tensor | None, factor: float) -> None:
        """Take one gradient of EST `rank`; fold them, scaled, when all are there."""
        if grad is not None and grad.layout != torch.strided:
            raise ValueError(
                f"EST {rank} produced a sparse gradient ({grad.layout}) of shape {list(grad.shape)}, which has no"
                " placement-independent order of addition. HINT: build the embedding with `sparse=False`."
            )
        taken = self._taken.setdefault(rank, {})
        taken[slot] = grad
        if len(taken) < len(self.members):
            return
        del self._taken[rank]
        self.fold_in(rank, [taken[slot] for slot in range(len(self.members))], factor)

    def fold_in(self, rank: int, grads: Sequence[Tensor | None], factor: float) -> None:
        """Fold the scaled gradients of EST `rank`, those of its members in their order."""
        # ESTs take turns in rank order, but a collective inside backward may let a later one be ready first.
        self._early[rank] = self._scaled(grads, factor)
        while (due := self.fold.due) in self._early:
            self.fold.push(due, self._early.pop(due))

    @torch.no_grad()
    def _scaled(self, grads: Sequence[Tensor | None], factor: float) -> Tensor:
        """The bucket's gradients, multiplied by a factor, in one flat tensor: few kernels, however many they are."""
        if has_none(grads):
            grads = [
                self.shaped(slot, torch.zeros(size, dtype=self.dtype, device=self.device)) if grad is None else grad
                for slot, (grad, size) in enumerate(zip(grads, self.sizes(), strict=True))
            ]
        given: Sequence[Tensor] = grads  # type: ignore[assignment]
        if len(self._runs) == 1 and len(given) > 1:
            return self._together(self._runs[0], given).mul_(factor)
        flat = torch.empty(self.numel, dtype=self.dtype, device=self.device)
        for run, part in zip(self._runs, flat.split(self._lengths), strict=True):
            torch.mul(self._together(run, given[run]), factor, out=part)
        return flat

    def _together(self, run: slice, grads: Sequence[Tensor]) -> Tensor:
        """The gradients of neighbouring members in one flat tensor; that of a single one may be itself."""
        if len(grads) == 1:
            return self.flattened(run.start, grads[0])
        if self.contiguous:
            with below_autograd():
                return _flatten_dense_tensors(grads)
        return torch.cat([self.flattened(slot, grad) for slot, grad in enumerate(grads, run.start)])


def _runs(long: Sequence[bool]) -> list[slice]:
    """Slices of the long ones, each by itself, and of those between them."""
    cuts = [i for i, own in enumerate(long) if own or (i and long[i - 1])]
    bounds = sorted({0, *cuts, len(long)})
    return [slice(start, stop) for start, stop in pairwise(bounds)]
