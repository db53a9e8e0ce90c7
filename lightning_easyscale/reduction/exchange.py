"""Reduction of one flat gradient bucket over all ESTs, wherever they run.

Every executor calls `start` with its own ESTs' gradients, for the same buckets in the same order on all executors, and
waits later. Invariant of `RingReduction` and `TreeReduction`: the result is `ring_fold` or `tree_fold` of all N scaled
gradients, bit for bit, for every placement. `NativeReduction` (level D0) promises only what the backend promises.

Bytes sent for a bucket of T bytes. In the ring order chunk c is a chain ``c-1, c-2, ..., c`` of ranks, and a run of
ranks can be folded ahead of the others only where it *starts* the chain; a run in the middle needs the partial sum
that comes before it. So the partial sums travel, not the gradients: the executors form the descending ring that gloo's
ranks would form, each adds the whole run of its ESTs to the chunks that pass by, and a chunk whose chain started in
the middle of an executor's range comes back to it for the rest. An executor sends less than T for the fold
(``(P-1)/P * T`` when every executor hosts one EST, like a ring all-reduce) and less than T for the gathering, whatever
the number of its ESTs. In the tree order every executor sends its aligned blocks, ``(P-1)/P * T`` for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..placement import Placement
from .bucket import BucketForm, FlatGradients, LocalGradients
from .lane import Lane, Pending, Running
from .orders import check_parts, ring_chunks, ring_fold
from .tree import Block, TreeFold, blocks_of, combine
from .wire import Wire, backend_name

Finish = Callable[[], None]
"""Ends a reduction: puts the sums into the `results` of the executor's gradients, which nobody else reads by then."""


class Reduction(Protocol):
    """What the collection of gradients needs to know of a reduction."""

    n: int
    ests: range
    alone: bool
    """Whether there is no other executor: then all is done where a reduction is ended."""

    def start(self, index: int, local: LocalGradients) -> Finish:
        """Begin to reduce bucket `index`.

        Args:
            index: the bucket; buckets start in the same order on all executors.
            local: the gradients of this executor's ESTs, which nobody writes to until the returned function was called.

        Raises:
            ValueError: if their number is wrong.
        """

    def share(self, flags: Tensor) -> Pending:
        """Element-wise maximum of a small tensor over all executors, in line with the buckets."""

    def close(self) -> None:
        """End the communication thread; a later `start` begins a new one."""


class _Exchange:
    """What the three reductions have in common: checks, the lane, the wire."""

    def __init__(
        self,
        placement: Placement,
        executor: int,
        group: dist.ProcessGroup | None,
        n: int,
        *,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        if placement.num_ests != n:
            raise ValueError(
                f"`n={n}` does not match a placement of {placement.num_ests} ESTs. HINT: pass `n=placement.num_ests`."
            )
        size, rank = (1, 0) if group is None else (group.size(), group.rank())
        if size != placement.num_executors or rank != executor:
            raise ValueError(
                f"`executor={executor}` of {placement.num_executors} does not match rank {rank} of {size} in `group`."
                " HINT: pass the group of all executors, in executor order."
            )
        self.placement = placement
        self.executor = executor
        self.ests = placement.ranges[executor]
        self.n = n
        self.group = group
        self._before = before
        self.alone = size == 1
        self._wire = Wire(group) if group is not None and size > 1 else None
        self._lane = Lane(None if self._wire is None else group)
        self._scratch: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}
        self._flats: dict[int, Tensor] = {}

    def share(self, flags: Tensor) -> Pending:
        """See `Reduction.share`."""
        wire = self._wire

        def job() -> Tensor:
            if wire is None:
                return flags
            everyone = flags.new_empty(wire.size, *flags.shape)
            everyone[wire.rank] = flags
            one = flags.numel()
            wire.gather_slices(everyone.view(-1), [slice(e * one, (e + 1) * one) for e in range(wire.size)])
            return everyone.amax(0)

        return self._lane.submit(job, [flags])

    def close(self) -> None:
        """See `Reduction.close`."""
        self._lane.close()

    def _check(self, index: int, count: int) -> None:
        if count != len(self.ests):
            raise ValueError(
                f"`local` of bucket {index} holds the gradients of {count} ESTs, but this executor hosts"
                f" {len(self.ests)}. HINT: pass those of every local EST, in rank order."
            )

    def _one_est_each(self) -> bool:
        return self._wire is not None and self.placement.num_executors == self.n

    def _buffer(self, numel: int, like: Tensor, *, turn: int = 0) -> Tensor:
        """A receive buffer, kept for later buckets: jobs of a lane run one at a time."""
        key = (like.device, like.dtype, turn)
        if key not in self._scratch or self._scratch[key].numel() < numel:
            self._scratch[key] = torch.empty(numel, dtype=like.dtype, device=like.device)
        return self._scratch[key][:numel]

    def _flat(self, index: int, form: BucketForm) -> Tensor:
        """The flat buffer of a bucket, kept between steps: its pages would be new to the process every time."""
        flat = self._flats.get(index)
        if flat is None or (flat.numel(), flat.dtype, flat.device) != (form.numel, form.dtype, form.device):
            flat = self._flats[index] = torch.empty(form.numel, dtype=form.dtype, device=form.device)
        return flat


class RingReduction(_Exchange):
    """The `ddp` order: gloo's ring all-reduce over N processes, replayed on P executors.

    Args:
        placement: which executor hosts which ESTs.
        executor: this executor.
        group: process group of all executors; None for one executor.
        n: number of ESTs.
        before: called before each bucket.

    Raises:
        ValueError: if the arguments contradict each other.
    """

    def start(self, index: int, local: LocalGradients) -> Finish:
        """See `Reduction.start`."""
        self._check(index, len(local.pieces))
        self._before()
        form, wire, n = local.form, self._wire, self.n
        if wire is None:
            return lambda: _fold_all(local, n)
        flat = self._flat(index, form)
        if self._one_est_each() and (n == 2 or backend_name(wire.group, form.device) == "gloo"):
            # Among single ESTs gloo's own all-reduce is the order; for two of them any is, since addition commutes.
            local.add([0], local.whole, flat)
            pending: Pending = Running(wire.all_reduce(flat), flat)
        else:
            pending = self._lane.submit(lambda: self._ring(wire, local.gathered() or local, flat), [flat])
        return lambda: local.store(pending.wait())

    def _ring(self, wire: Wire, local: LocalGradients | FlatGradients, out: Tensor) -> Tensor:
        bottom, everyone = self.ests.start, list(reversed(range(len(self.ests))))
        chunks = ring_chunks(out.numel() * out.element_size(), out.element_size(), self.n)
        # The chains of chunks a+1..b start on the executor of ranks a..b-1. All but the last come back to it.
        started = [[(rank + 1) % self.n for rank in ests] for ests in self.placement]
        own = started[self.executor]
        held = self._buffer(sum(_length(chunks[c]) for c in own), out, turn=0)
        for c, piece in zip(own, held.split([_length(chunks[c]) for c in own]), strict=True):
            local.add(list(reversed(range(c - bottom))) if c else everyone, chunks[c], piece)
        for hop in range(1, wire.size):
            spans = _spans(chunks, started[(self.executor + hop) % wire.size])
            held, arrived = self._pass_on(wire, held, spans, hop)
            for piece, span in zip(arrived, spans, strict=True):
                local.add(everyone, span, piece, onto=True)
        # What is held now started one executor below; the last of it is chunk `bottom`, with every rank added.
        whole = _length(chunks[bottom])
        going, final = held.split([held.numel() - whole, whole])
        back = own[:-1]
        out[chunks[bottom]].copy_(final)
        _, arrived = self._pass_on(wire, going, [chunks[c] for c in back], wire.size)
        for c, piece in zip(back, arrived, strict=True):
            local.add(everyone[: len(everyone) - (c - bottom)], chunks[c], piece, onto=True)
            out[chunks[c]].copy_(piece)
        wire.gather_slices(out, [slice(chunks[e.start].start, chunks[e.stop - 1].stop) for e in self.placement])
        return out

    def _pass_on(self, wire: Wire, held: Tensor, spans: list[slice], hop: int) -> tuple[Tensor, list[Tensor]]:
        """Send `held` down the ring; what arrives from above, whole and split by `spans`."""
        sizes = [_length(span) for span in spans]
        # Two buffers take turns: what arrived is added to where it is, and sent on from there.
        arrived = self._buffer(sum(sizes), held, turn=hop % 2)
        wire.shift(arrived, held)
        return arrived, list(arrived.split(sizes)) if sizes else []


class TreeReduction(_Exchange):
    """The `tree` order: aligned partial sums are scattered, folded in order and gathered.

    Args:
        placement: which executor hosts which ESTs.
        executor: this executor.
        group: process group of all executors; None for one executor.
        n: number of ESTs.
        before: called before each bucket.

    Raises:
        ValueError: if the arguments contradict each other.
    """

    def start(self, index: int, local: list[Tensor]) -> Pending:
        """Begin to reduce bucket `index`.

        Args:
            index: the bucket; buckets start in the same order on all executors.
            local: one flat tensor per EST of this executor, in rank order, multiplied by 1/N. They may wait in host
                memory as long as the last one is on the device. Their memory is overwritten.

        Returns:
            The pending result, on the device of ``local[-1]``, usually in the memory of ``local[0]``.

        Raises:
            ValueError: if their number, type or length is wrong or one is sparse.
        """
        self._check(index, len(local))
        check_parts(local)
        fold = TreeFold(self.ests, self.n)
        for rank, flat in zip(self.ests, local, strict=True):
            fold.push(rank, flat.to(local[-1].device, non_blocking=True))
        return self.start_blocks(index, fold.partials())

    def start_blocks(self, index: int, blocks: list[Block]) -> Pending:
        """Begin to reduce bucket `index` from this executor's partial sums.

        Args:
            index: the bucket; see `start`.
            blocks: what `TreeFold.partials` returned; their memory is overwritten and the result lies in that of the
                first.

        Raises:
            ValueError: if they are not the blocks of this executor's ESTs.
        """
        if [(block.start, block.size) for block in blocks] != blocks_of(self.ests):
            raise ValueError(
                f"`blocks` of bucket {index} are not the partial sums of ESTs {self.ests}."
                " HINT: pass what `TreeFold.partials()` returned for this executor's range."
            )
        self._before()
        wire, totals = self._wire, [block.total for block in blocks]
        if wire is None:
            return self._lane.submit(lambda: combine(blocks), totals)
        if self.n == 2:
            return Running(wire.all_reduce(totals[0]), totals[0])
        return self._lane.submit(lambda: self._scatter_fold_gather(wire, blocks), totals)

    def _scatter_fold_gather(self, wire: Wire, blocks: list[Block]) -> Tensor:
        flat = blocks[0].total
        share = -(-flat.numel() // wire.size)
        slices = [slice(min(e * share, flat.numel()), min((e + 1) * share, flat.numel())) for e in range(wire.size)]
        lengths = [_length(piece) for piece in slices]
        mine = lengths[wire.rank]
        everyone = [blocks_of(ests) for ests in self.placement]
        arrived = self._buffer(mine * sum(len(theirs) for theirs in everyone), flat)
        pieces: list[Block] = []
        offset = 0
        # One exchange per block and no packing: the slices of a block lie in executor order already.
        for i in range(max(len(theirs) for theirs in everyone)):
            senders = [e for e, theirs in enumerate(everyone) if i < len(theirs)]
            out = arrived[offset : offset + mine * len(senders)]
            offset += out.numel()
            source, sizes = (blocks[i].total, lengths) if i < len(blocks) else (flat[:0], [0] * wire.size)
            wire.exchange(out, [mine if e in senders else 0 for e in range(wire.size)], source, sizes)
            if mine:
                pieces += [Block(*everyone[e][i], p) for e, p in zip(senders, out.split(mine), strict=True)]
        if mine:
            flat[slices[wire.rank]].copy_(combine(sorted(pieces, key=lambda block: block.start)))
        wire.gather_slices(flat, slices)
        return flat


class NativeReduction(_Exchange):
    """Level D0: the local ESTs' sum in rank order, then the backend's all-reduce in its own order.

    With one EST per executor this is exactly what stock DDP does on the same devices.

    Args:
        placement: which executor hosts which ESTs.
        executor: this executor.
        group: process group of all executors; None for one executor.
        n: number of ESTs.
        before: called before each bucket.

    Raises:
        ValueError: if the arguments contradict each other.
    """

    def start(self, index: int, local: LocalGradients) -> Finish:
        """See `Reduction.start`."""
        self._check(index, len(local.pieces))
        self._before()
        in_rank_order = range(len(self.ests))
        if self._wire is None:
            return lambda: local.fold_into_results(in_rank_order, local.whole)
        flat = self._flat(index, local.form)
        local.add(in_rank_order, local.whole, flat)
        pending = Running(self._wire.all_reduce(flat), flat)
        return lambda: local.store(pending.wait())


def _fold_all(local: LocalGradients, n: int) -> None:
    """The ring order where all ESTs are here."""
    if n == 2:
        # Addition commutes: one pass over both chunks.
        local.fold_into_results([0, 1], local.whole)
        return
    if (flat := local.gathered()) is not None:
        local.store(ring_fold(flat.rows, consume=True))
        return
    for c, chunk in enumerate(ring_chunks(local.form.numel * local.form.dtype.itemsize, local.form.dtype.itemsize, n)):
        local.fold_into_results([(c - k) % n for k in range(1, n + 1)], chunk)


def _length(span: slice) -> int:
    return span.stop - span.start


def _spans(chunks: list[slice], which: list[int]) -> list[slice]:
    """Element ranges of the chunks `which`, neighbours merged; only the step from chunk N-1 to 0 splits them."""
    spans: list[slice] = []
    for c in which:
        if spans and spans[-1].stop == chunks[c].start:
            spans[-1] = slice(spans[-1].start, chunks[c].stop)
        else:
            spans.append(chunks[c])
    return spans
