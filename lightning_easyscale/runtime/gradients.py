"""Gradients of the stock `DistributedDataParallel` wrapper, collected over the ESTs.

Each EST wraps its module in the real DDP over a `GradientGroup`, to which DDP's Reducer hands its buckets already
scaled, so that every DDP rule (buckets and their rebuild, scaling, unused parameters, `no_sync`) is stock by
construction. A bucket is deposited when it is ready; when the last local EST deposits it, its exchange with the other
executors starts while the rest of that EST's backward runs. The one rendezvous of a step is the last bucket's.

With private gradients every EST copies the reduced buckets: they end in the memory of the last local EST's bucket,
which is written again only in that EST's next backward, after every other local EST has taken its gradients. Without,
only the lead takes them; the others keep their own buckets as they are, and nobody may look at those.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ..reduction.exchange import Reduction
from ..reduction.lane import Pending
from ..reduction.layout import BucketLayout, rebuilt_layout, regroup
from .channel import Channel
from .process_group import VirtualProcessGroup
from .works import work_of
from .world import WorldState


class GradientGroup(VirtualProcessGroup):
    """The group that one EST's DDP wrapper communicates over.

    Args:
        est_rank: the EST's rank in the virtual world.
        channel: a channel over the world of the wrapper's own.
        world: the EST's world.
    """

    def __init__(self, est_rank: int, channel: Channel, world: WorldState) -> None:
        super().__init__(est_rank, channel, world)
        self.collector: Callable[[Tensor], torch.futures.Future[list[Tensor]]] | None = None

    def allreduce(self, tensors: Any, opts: Any = None) -> dist.Work:
        """Collect a bucket of the Reducer; anything else (its map of used parameters) is an ordinary all-reduce."""
        bucket = tensors[0] if isinstance(tensors, (list, tuple)) else tensors
        if self.collector is None or bucket.dtype == torch.int32:
            return super().allreduce(tensors, opts)
        return work_of(self.collector(bucket))


class GradientExchange:
    """The gradients of one wrapped module, on one executor.

    The layout of the buckets decides bits under the ``ddp`` order. A resumed run keeps the layout of the checkpoint:
    until DDP's own buckets equal it, gradients are regrouped before and after the reduction.

    Args:
        channel: the world's channel on this executor.
        reduction: how flat buckets are reduced over all ESTs.
        saved_layout: the layout of the checkpoint that is resumed, if any.
        bucket_cap_mb: DDP's argument.
        rebuilds: whether DDP rebuilds its buckets after the first iteration.
        private_gradients: whether every EST gets the reduced gradients, not the lead alone.
    """

    def __init__(
        self,
        channel: Channel,
        reduction: Reduction,
        *,
        saved_layout: BucketLayout | None = None,
        bucket_cap_mb: float | None = None,
        rebuilds: bool = True,
        private_gradients: bool = True,
    ) -> None:
        self._channel = channel
        self._reduction = reduction
        self._layout = saved_layout
        self._regroup_to = saved_layout
        self._drop_regrouping = False
        self._bucket_cap_mb = bucket_cap_mb
        self._rebuilds = rebuilds
        self._private = private_gradients
        self._scale = 1.0 / len(channel.ranks)
        self._deposits: dict[int, list[Tensor]] = defaultdict(list)
        self._pending: dict[int, Pending] = {}
        self._last: dict[int, Tensor] = {}
        self._parameters: list[Tensor] = []
        self._ready_order: list[int] = []
        self._watching: list[RemovableHandle] = []
        self._iterations = 0

    def attach(self, wrapped: DistributedDataParallel, group: GradientGroup) -> None:
        """Collect the gradients of one EST's wrapped module.

        Args:
            wrapped: the DDP wrapper over `group`.
            group: the wrapper's own group.
        """
        parameters = [p for p in wrapped.module.parameters() if p.requires_grad]
        if group.est_rank == self._channel.local[0]:
            self._parameters = list(parameters)
            if self._layout is None and self._rebuilds:
                self._watch_order(parameters)
        if self._regroup_to is None:
            group.collector = self._collector(group, sum(p.numel() for p in parameters))
        else:
            # Only a communication hook is told which parameters a bucket holds; it has to scale by itself.
            wrapped.register_comm_hook(None, self._hook(group, {id(p): i for i, p in enumerate(parameters)}))

    @property
    def layout(self) -> BucketLayout | None:
        """The layout of the next iteration; None while it is the initial one."""
        return self._layout

    def close(self) -> None:
        """End the communication thread; a later step begins a new one."""
        self._reduction.close()

    def _watch_order(self, parameters: list[Tensor]) -> None:
        """Note in which order the first iteration's gradients become ready."""

        def note(index: int) -> Callable[[Tensor], None]:
            return lambda _: self._ready_order.append(index)

        self._watching = [p.register_post_accumulate_grad_hook(note(i)) for i, p in enumerate(parameters)]

    def _derive_layout(self) -> None:
        """After the first iteration: the layout that DDP is going to rebuild."""
        while self._watching:
            self._watching.pop().remove()
        last_first = list(dict.fromkeys(reversed(self._ready_order)))
        if len(last_first) == len(self._parameters):
            self._layout = rebuilt_layout(last_first[::-1], self._parameters, self._bucket_cap_mb)

    def _collector(
        self, group: VirtualProcessGroup, numel: int
    ) -> Callable[[Tensor], torch.futures.Future[list[Tensor]]]:
        buckets: list[_Bucket] = []
        missing, iteration = numel, 0

        def collect(flat: Tensor) -> torch.futures.Future[list[Tensor]]:
            nonlocal missing, iteration
            if not buckets:
                self._wait_for_turn(group, iteration)
                iteration += 1
            future = _future(flat)
            self._deposit(len(buckets), flat)
            buckets.append(_Bucket(flat, future, []))
            missing -= flat.numel()
            if missing == 0:
                arrived = list(buckets)
                buckets.clear()
                missing = numel
                self._exchange_rest(arrived, group, {})
            return future

        return collect

    def _hook(
        self, group: VirtualProcessGroup, index_of: dict[int, int]
    ) -> Callable[[Any, dist.GradBucket], torch.futures.Future[Tensor]]:
        buckets: list[_Bucket] = []
        iteration = 0

        def exchange(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            nonlocal iteration
            if not buckets:
                self._wait_for_turn(group, iteration)
                iteration += 1
            flat = bucket.buffer().mul_(self._scale)
            future = _future(flat)
            buckets.append(_Bucket(flat, future, bucket.parameters() if self._regroup_to is not None else []))
            if self._regroup_to is None:
                self._deposit(bucket.index(), flat)
            if bucket.is_last():
                arrived = list(buckets)
                buckets.clear()
                self._exchange_rest(arrived, group, index_of)
            return future

        # DDP compares annotations with types; postponed ones are text.
        exchange.__annotations__ = {}
        return exchange

    def _exchange_rest(self, buckets: list[_Bucket], group: VirtualProcessGroup, index_of: dict[int, int]) -> None:
        flats = [b.flat for b in buckets]
        target, physical = self._regroup_to, self._regroup_to
        numels = [p.numel() for p in self._parameters]
        if target is not None:
            physical = BucketLayout(tuple(tuple(index_of[id(p)] for p in b.parameters) for b in buckets))
            if physical == target and self._iterations > 0:
                # DDP has rebuilt its buckets by now; `_finish` returns to them for all ESTs at once.
                self._drop_regrouping = True
            for index, flat in enumerate(regroup(flats, physical, target, numels)):
                self._deposit(index, flat)
        tag = f"gradients({len(flats)} buckets)"
        reduced = group.executor.meet(
            group.est_rank, group.next_key(), tag, None, lambda _: self._finish(tag), members=self._channel.local
        )
        if reduced is None:
            reduced = flats
        elif target is not None and physical is not None:
            reduced = regroup(reduced, target, physical, numels)
        for bucket, result in zip(buckets, reduced, strict=True):
            bucket.future.set_result(result)

    def _wait_for_turn(self, group: VirtualProcessGroup, iteration: int) -> None:
        """Buckets are deposited in rank order."""
        group.executor.in_turn(group.est_rank, (self._channel.name, "gradients", iteration), "gradients")

    def _deposit(self, index: int, flat: Tensor) -> None:
        local = self._deposits[index]
        local.append(flat)
        if len(local) == len(self._channel.local):
            self._pending[index] = self._reduction.start(index, local)
            self._last[index] = local[-1]
            del self._deposits[index]

    def _finish(self, tag: str) -> dict[int, list[Tensor] | None]:
        self._channel.agree(tag)
        results = []
        with torch.no_grad():
            for index in sorted(self._pending):
                with self._channel.peers.waiting():
                    reduced, last = self._pending[index].wait(), self._last[index]
                kept = not self._private or reduced.data_ptr() == last.data_ptr()
                results.append(reduced if kept else last.copy_(reduced))
        self._pending.clear()
        self._last.clear()
        if self._watching:
            self._derive_layout()
        if self._drop_regrouping:
            self._regroup_to, self._drop_regrouping = None, False
        self._iterations += 1
        if self._private:
            return dict.fromkeys(self._channel.local, results)
        return {rank: results if rank == self._channel.local[0] else None for rank in self._channel.local}


def _future(flat: Tensor) -> torch.futures.Future[Any]:
    return torch.futures.Future(devices=[flat.device] if flat.device.type == "cuda" else None)


@dataclass
class _Bucket:
    flat: Tensor
    future: torch.futures.Future[Any]
    parameters: Sequence[Tensor]
