"""Buckets: how gradients lie in a flat buffer, and one executor's gradients read as if they lay in one.

Autograd leaves every gradient in memory of its own. `LocalGradients` folds the gradients of an executor's ESTs straight
from there, scaled on the way, and writes the sum back into the first EST's: no flat copy per EST is made. Invariant:
an element's result depends on its position in the bucket only through the order of addition that the caller asks for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from ..runtime.bulk import below_autograd

# On a CPU additions go block by block, so that partial sums stay in the cache between two of them. Smaller blocks cost
# more in calls than they save (measured at 11.7 million elements).
_BLOCK_BYTES = 1 << 20
# On other devices launches cost more than additions: what is below this is made flat, once for all chunks.
_FLAT_BYTES = 1 << 30

Segment = tuple[int, int, int]
"""Part of a member's gradient: its slot, the first element and the one after the last."""


class Stretch(NamedTuple):
    """A part of a bucket that is folded at once."""

    span: slice
    segments: list[Segment]
    sizes: list[int]
    slots: slice | None  # of the members, if it holds all of each

    @classmethod
    def of(cls, span: slice, segments: list[Segment], sizes: Sequence[int]) -> Stretch:
        """The part of a bucket, with members of these sizes, that consists of some segments."""
        entire = all(start == 0 and stop == sizes[slot] for slot, start, stop in segments)
        slots = slice(segments[0][0], segments[-1][0] + 1)
        # A member without elements has no segment.
        entire = entire and slots.stop - slots.start == len(segments)
        return cls(span, segments, [stop - start for _, start, stop in segments], slots if entire else None)

    def parts(self, pieces: list[Tensor]) -> list[Tensor]:
        """What it holds of the members' elements."""
        if self.slots is not None:
            return pieces[self.slots]
        return [pieces[slot][start:stop] for slot, start, stop in self.segments]


class BucketForm:
    """How the gradients of a bucket's parameters lie in a flat buffer, one after the other.

    Args:
        members: indices of the parameters, in buffer order.
        parameters: all parameters; the members are of one type, on one device.

    Attributes:
        contiguous: whether the members' elements lie in the order of their indices.
    """

    def __init__(self, members: Sequence[int], parameters: Sequence[Tensor]) -> None:
        self.members = tuple(members)
        own = [parameters[i] for i in members]
        self.dtype, self.device = own[0].dtype, own[0].device
        self._sizes = [p.numel() for p in own]
        self._bounds = [0, *accumulate(self._sizes)]
        # As in DDP: a dense parameter keeps its memory order, any other becomes contiguous.
        self._forms = [
            (p.shape, p.stride() if _is_dense(p) else torch.empty(p.shape, device="meta").stride()) for p in own
        ]
        self._like = [torch.empty(shape, device="meta") for shape, _ in self._forms]
        self.contiguous = all(t.stride() == stride for t, (_, stride) in zip(self._like, self._forms, strict=True))
        self._blocks: dict[tuple[int, int], list[Stretch]] = {}

    @property
    def numel(self) -> int:
        """Number of elements of the whole bucket."""
        return self._bounds[-1]

    def sizes(self) -> list[int]:
        """Number of elements of each member."""
        return self._sizes

    def views(self, flat: Tensor) -> list[Tensor]:
        """The gradients in a flat buffer, shaped and strided like their parameters."""
        with below_autograd():
            if self.contiguous:
                return list(_unflatten_dense_tensors(flat, self._like))
            return [self.shaped(slot, piece) for slot, piece in enumerate(flat.split(self.sizes()))]

    def shaped(self, slot: int, piece: Tensor) -> Tensor:
        """A member's elements in memory order, shaped and strided like its parameter."""
        return piece.as_strided(*self._forms[slot], piece.storage_offset())

    def flattened(self, slot: int, grad: Tensor) -> Tensor:
        """A member's gradient in memory order; in its own memory, unless it is strided unlike its parameter."""
        shape, stride = self._forms[slot]
        theirs = grad.stride()
        if theirs == stride or all(a == b for a, b, n in zip(theirs, stride, shape, strict=True) if n > 1):
            return grad.as_strided((grad.numel(),), (1,))
        flat = torch.empty(grad.numel(), dtype=grad.dtype, device=grad.device)
        self.shaped(slot, flat).copy_(grad)
        return flat

    def all_flattened(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """`flattened` for every member."""
        with below_autograd():
            if self.contiguous and all(map(Tensor.is_contiguous, grads)):
                return list(map(Tensor.ravel, grads))
            return [self.flattened(slot, grad) for slot, grad in enumerate(grads)]

    def segments(self, span: slice) -> list[Segment]:
        """The parts of members that lie in a span of the buffer."""
        found, slot = [], bisect_right(self._bounds, span.start) - 1
        while slot < len(self._forms) and self._bounds[slot] < span.stop:
            first, end = self._bounds[slot], self._bounds[slot + 1]
            start, stop = max(span.start, first) - first, min(span.stop, end) - first
            if start < stop:
                found.append((slot, start, stop))
            slot += 1
        return found

    def blocks(self, span: slice) -> list[Stretch]:
        """The parts of a span that are folded one after the other: many small segments, or a piece of a large one."""
        key = (span.start, span.stop)
        if key not in self._blocks:
            limit = _BLOCK_BYTES // self.dtype.itemsize if self.device.type == "cpu" else span.stop - span.start
            found: list[tuple[slice, list[Segment]]] = []
            for slot, start, stop in self.segments(span):
                for first in range(start, stop, limit):
                    end, at = min(first + limit, stop), self._bounds[slot]
                    if found and at + end - found[-1][0].start <= limit:
                        found[-1] = (slice(found[-1][0].start, at + end), [*found[-1][1], (slot, first, end)])
                    else:
                        found.append((slice(at + first, at + end), [(slot, first, end)]))
            self._blocks[key] = [Stretch.of(block, segments, self._sizes) for block, segments in found]
        return self._blocks[key]


class FlatGradients:
    """One bucket's gradients on one executor, scaled, each EST's in one flat tensor.

    Args:
        rows: per EST, in rank order.
    """

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self.rows = rows

    def add(self, ests: Sequence[int], span: slice, out: Tensor, *, onto: bool = False) -> None:
        """See `LocalGradients.add`."""
        chain = [self.rows[est][span] for est in ests]
        if onto:
            chain.insert(0, out)
        elif len(chain) == 1:
            out.copy_(chain[0])
        total = chain[0]
        for own in chain[1:]:
            total = torch.add(own, total, out=out)


class LocalGradients:
    """One bucket's gradients on one executor.

    Args:
        form: of the bucket.
        pieces: per EST, in rank order, each member's gradient in memory order, flat; or one tensor of all of them,
            which waits in host memory.
        scale: what a gradient is multiplied by before it is added; None if that was done.
        holder: the position of the EST whose pieces the reduced gradients may overwrite.

    Attributes:
        apart: whether the first EST's wait in host memory.
        results: where the reduced gradients are to go: the holder's pieces, or, if those are apart, new ones.
    """

    def __init__(
        self,
        form: BucketForm,
        pieces: Sequence[list[Tensor] | Tensor],
        scale: float | None,
        *,
        holder: int = 0,
    ) -> None:
        self.form = form
        self.pieces = pieces
        self._scale = scale
        self.apart = isinstance(pieces[0], Tensor)
        results = pieces[holder]
        if isinstance(results, Tensor):
            results = list(torch.empty(form.numel, dtype=form.dtype, device=form.device).split(form.sizes()))
        self.results = results

    @property
    def whole(self) -> slice:
        """The span of the whole bucket."""
        return slice(0, self.form.numel)

    @property
    def room(self) -> int:
        """Bytes of the device that folding them takes at most: copies of all, or a sum and one EST's."""
        return self._bytes if self._bytes <= _FLAT_BYTES else 2 * self._bytes // len(self.pieces)

    @property
    def _bytes(self) -> int:
        return len(self.pieces) * self.form.numel * self.form.dtype.itemsize

    def gathered(self) -> FlatGradients | None:
        """Copies that are cheaper to read part by part; None if there are none, or they take too much memory."""
        form = self.form
        launched = form.device.type != "cpu" and (len(form.members) > 1 or self.apart) and len(self.pieces) > 1
        return self.flat() if launched and self._bytes <= _FLAT_BYTES else None

    def flat(self) -> FlatGradients:
        """Scaled copies."""
        rows = torch.empty(len(self.pieces), self.form.numel, dtype=self.form.dtype, device=self.form.device).unbind()
        for row, pieces in zip(rows, self.pieces, strict=True):
            self._gather(pieces, row)
        return FlatGradients(rows)

    def add(self, ests: Sequence[int], span: slice, out: Tensor, *, onto: bool = False) -> None:
        """Fold gradients of local ESTs, one after the other, into a flat tensor.

        Args:
            ests: local positions, in the order of addition.
            span: the part of the bucket.
            out: as long as the span.
            onto: `out` holds a partial sum to begin with; else it begins with the first EST's gradient.
        """
        for block in self.form.blocks(span):
            place = out[block.span.start - span.start : block.span.stop - span.start]
            self._fold(ests, block, place, onto=onto)

    def fold_into_results(self, ests: Sequence[int], span: slice) -> None:
        """Fold gradients of all local ESTs, in the given order, into the results."""
        blocks = self.form.blocks(span)
        room = torch.empty(
            max((b.span.stop - b.span.start for b in blocks), default=0), dtype=self.form.dtype, device=self.form.device
        )
        for block in blocks:
            total = room[: block.span.stop - block.span.start]
            places = block.parts(self.results)
            if len(places) > 1:
                self._fold(ests, block, total)
                _store(total, block.sizes, places)
            else:
                self._fold(ests, block, total, last=places[0])

    def store(self, reduced: Tensor) -> None:
        """Put the reduced bucket into the results."""
        _store(reduced, self.form.sizes(), self.results)

    def _fold(
        self,
        ests: Sequence[int],
        block: Stretch,
        total: Tensor,
        *,
        onto: bool = False,
        last: Tensor | None = None,
    ) -> None:
        """Fold one block into `total`; the last sum goes to `last`, if that is given."""
        own = None
        for place, est in enumerate(ests):
            final = last is not None and place == len(ests) - 1
            if place == 0 and not onto:
                self._read(est, block, last if final and last is not None else total)
                continue
            own = torch.empty_like(total) if own is None else own
            self._read(est, block, own)
            torch.add(own, total, out=last if final else total)

    def _read(self, est: int, block: Stretch, out: Tensor) -> None:
        """An EST's gradients in this block, scaled."""
        own = self.pieces[est]
        if isinstance(own, Tensor):
            self._gather(own[block.span], out)
            return
        parts = block.parts(own)
        if len(parts) > 1:
            self._gather(parts, out)
        elif self._scale is None:
            out.copy_(parts[0])
        else:
            torch.mul(parts[0], self._scale, out=out)

    def _gather(self, own: list[Tensor] | Tensor, out: Tensor) -> None:
        if isinstance(own, Tensor):
            out.copy_(own, non_blocking=True)
        else:
            torch.cat(own, out=out)
        if self._scale is not None:
            out.mul_(self._scale)


def _store(flat: Tensor, sizes: list[int], places: list[Tensor]) -> None:
    """Put the pieces of a flat tensor where they belong."""
    with below_autograd():
        pieces = list(flat.split(sizes))
    torch._foreach_copy_(places, pieces)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size if size > 1 else 1
    return True
