"""Buckets: how gradients lie in a flat buffer, and one executor's gradients read as if they lay in one.

Autograd leaves every gradient in memory of its own. `LocalGradients` folds the gradients of an executor's ESTs straight
from there, scaled on the way, and writes the sum back into the first EST's: no flat copy per EST is made. Invariant:
an element's result depends on its position in the bucket only through the order of addition that the caller asks for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

# On a CPU additions go block by block, so that a partial sum stays in the cache between two of them. Smaller blocks
# cost more in calls than they save (measured at 11.7 million elements).
_BLOCK_BYTES = 4 << 20


class BucketForm:
    """How the gradients of a bucket's parameters lie in a flat buffer, one after the other.

    Args:
        members: indices of the parameters, in buffer order.
        parameters: all parameters; the members are of one type, on one device.
    """

    def __init__(self, members: Sequence[int], parameters: Sequence[Tensor]) -> None:
        self.members = tuple(members)
        own = [parameters[i] for i in members]
        self.dtype, self.device = own[0].dtype, own[0].device
        self._bounds = [0, *accumulate(p.numel() for p in own)]
        # As in DDP: a dense parameter keeps its memory order, any other becomes contiguous.
        self._forms = [
            (p.shape, p.stride() if _is_dense(p) else torch.empty(p.shape, device="meta").stride()) for p in own
        ]
        self._segments: dict[tuple[int, int], list[tuple[int, int, int]]] = {}

    @property
    def numel(self) -> int:
        """Number of elements of the whole bucket."""
        return self._bounds[-1]

    def sizes(self) -> list[int]:
        """Number of elements of each member."""
        return [b - a for a, b in zip(self._bounds, self._bounds[1:], strict=False)]

    def views(self, flat: Tensor) -> list[Tensor]:
        """The gradients in a flat buffer, shaped and strided like their parameters."""
        return [self.shaped(slot, piece) for slot, piece in enumerate(flat.split(self.sizes()))]

    def shaped(self, slot: int, piece: Tensor) -> Tensor:
        """A member's elements in memory order, shaped and strided like its parameter."""
        return piece.as_strided(*self._forms[slot], piece.storage_offset())

    def flattened(self, slot: int, grad: Tensor) -> Tensor:
        """A member's gradient in memory order; in its own memory, unless it is strided unlike its parameter."""
        shape, stride = self._forms[slot]
        if grad.stride() == stride or all(
            a == b for a, b, n in zip(grad.stride(), stride, shape, strict=True) if n > 1
        ):
            return grad.as_strided((grad.numel(),), (1,))
        flat = torch.empty(grad.numel(), dtype=grad.dtype, device=grad.device)
        self.shaped(slot, flat).copy_(grad)
        return flat

    def segments(self, span: slice) -> list[tuple[int, int, int]]:
        """The parts of members that lie in a span of the buffer: ``(slot, start, stop)`` within each."""
        key = (span.start, span.stop)
        if key not in self._segments:
            found, slot = [], bisect_right(self._bounds, span.start) - 1
            while slot < len(self._forms) and self._bounds[slot] < span.stop:
                first, end = self._bounds[slot], self._bounds[slot + 1]
                start, stop = max(span.start, first) - first, min(span.stop, end) - first
                if start < stop:
                    found.append((slot, start, stop))
                slot += 1
            self._segments[key] = found
        return self._segments[key]


class LocalGradients:
    """One bucket's gradients on one executor.

    Args:
        form: of the bucket.
        pieces: per EST, in rank order, each member's gradient in memory order, flat. They may wait in host memory.
        scale: what a gradient is multiplied by before it is added; None if that was done.

    Attributes:
        results: where the reduced gradients are to go: the first EST's pieces, if they are on the device.
    """

    def __init__(self, form: BucketForm, pieces: Sequence[Sequence[Tensor]], scale: float | None) -> None:
        self.form = form
        self.pieces = pieces
        self._scale = scale
        self.results = [p if p.device == form.device else torch.empty_like(p, device=form.device) for p in pieces[0]]

    @property
    def whole(self) -> slice:
        """The span of the whole bucket."""
        return slice(0, self.form.numel)

    def add(self, ests: Sequence[int], span: slice, out: Tensor, *, onto: bool = False) -> None:
        """Fold gradients of local ESTs, one after the other, into a flat tensor.

        Args:
            ests: local positions, in the order of addition.
            span: the part of the bucket.
            out: as long as the span.
            onto: `out` holds a partial sum to begin with; else it begins with the first EST's gradient.
        """
        for block in self.blocks(span):
            total = out[block.start - span.start : block.stop - span.start]
            own = None
            for place, est in enumerate(ests):
                if place == 0 and not onto:
                    self._read(est, block, total)
                    continue
                own = torch.empty_like(total) if own is None else own
                torch.add(self._read(est, block, own), total, out=total)

    def fold_into_results(self, ests: Sequence[int], span: slice) -> None:
        """Fold gradients of all local ESTs, in the given order, into the results."""
        total = None
        for block in self.blocks(span):
            length = block.stop - block.start
            if total is None or total.numel() != length:
                total = torch.empty(length, dtype=self.form.dtype, device=self.form.device)
            self.add(ests, block, total)
            self.store(block, total)

    def store(self, span: slice, reduced: Tensor) -> None:
        """Put a reduced part of the bucket into the results."""
        segments = self.form.segments(span)
        places = [self.results[slot][start:stop] for slot, start, stop in segments]
        torch._foreach_copy_(places, list(reduced.split([stop - start for _, start, stop in segments])))

    def blocks(self, span: slice) -> Iterator[slice]:
        """The parts of a span that are folded one after the other."""
        length = span.stop - span.start
        if self.form.device.type == "cpu":
            length = _BLOCK_BYTES // self.form.dtype.itemsize
        for start in range(span.start, span.stop, max(length, 1)):
            yield slice(start, min(start + length, span.stop))

    def _read(self, est: int, span: slice, out: Tensor) -> Tensor:
        parts = [self.pieces[est][slot][start:stop] for slot, start, stop in self.form.segments(span)]
        parts = [p if p.device == out.device else p.to(out.device, non_blocking=True) for p in parts]
        if len(parts) > 1:
            torch.cat(parts, out=out)
            return out if self._scale is None else out.mul_(self._scale)
        return out.copy_(parts[0]) if self._scale is None else torch.mul(parts[0], self._scale, out=out)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size if size > 1 else 1
    return True
