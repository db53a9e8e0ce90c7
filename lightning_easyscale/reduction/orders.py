"""The two orders of addition, as pure functions on one tensor per EST.

Floating-point addition is not associative, so "the sum over N ranks" is only defined together with an order. Two orders
are used, and both depend on the ranks alone, never on where an EST runs:

* `ring_fold` is the order of gloo's ring all-reduce among N processes. The buffer is cut into N chunks (`ring_chunks`);
  chunk c starts as the value of rank ``c-1`` and every next rank, descending modulo N and ending at rank ``c``, adds
  its own value to what it received.
* `tree_fold` is a balanced binary tree: the ranks ``0..N-1`` fall into the aligned power-of-two blocks of N's binary
  form (7 = 4+2+1), each block is a perfect binary tree, and the blocks are combined left to right.

Invariants: inputs are flat tensors of equal length and type, one per rank in rank order; the result of an element
depends on that element's N values, on N and, for the ring, on its position in the buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Combine = Callable[[Tensor, Tensor, Tensor], object]
"""``combine(own, received, out)``: one rank's step; `out` may be either input."""

_RING_SEGMENT_BYTES = 1 << 20


def _sum(own: Tensor, received: Tensor, out: Tensor) -> None:
    torch.add(own, received, out=out)


def _product(own: Tensor, received: Tensor, out: Tensor) -> None:
    torch.mul(own, received, out=out)


# gloo uses `std::min` and `std::max`, which keep the own value when neither compares less: this decides NaN and -0.0.
def _min(own: Tensor, received: Tensor, out: Tensor) -> None:
    torch.where(received < own, received, own, out=out)


def _max(own: Tensor, received: Tensor, out: Tensor) -> None:
    torch.where(own < received, received, own, out=out)


_COMBINES: dict[str, Combine] = {"sum": _sum, "product": _product, "min": _min, "max": _max}


def combine_of(op: str | dist.ReduceOp | dist.ReduceOp.RedOpType) -> Combine:
    """The step function of a reduction operation.

    Args:
        op: ``"sum" | "product" | "min" | "max"`` or the `torch.distributed.ReduceOp` of that name.

    Raises:
        ValueError: for any other operation.
    """
    for name, combine in _COMBINES.items():
        if op == name or (not isinstance(op, str) and op == getattr(dist.ReduceOp, name.upper())):
            return combine
    raise ValueError(f"`op={op}` has no fixed order here. HINT: use one of {', '.join(_COMBINES)}.")


def ring_chunks(num_bytes: int, element_size: int, n: int) -> list[slice]:
    """Element ranges of the N chunks into which gloo's ring all-reduce cuts a buffer.

    Args:
        num_bytes: size T of the buffer in bytes.
        element_size: bytes per element.
        n: number of ranks N.

    Returns:
        N slices in elements, in chunk order; late ones are empty for small buffers.
        Formula: gloo `allreduce.cc`, restated and measured in the project's design notes (section 4).
    """
    longest = element_size * max(1, _RING_SEGMENT_BYTES // element_size)
    segments = _round_up(max(-(-num_bytes // longest), 2 * n), n)
    segment = _round_up(-(-num_bytes // segments), element_size)
    step = segments // n * segment // element_size
    length = num_bytes // element_size
    return [slice(min(c * step, length), min((c + 1) * step, length)) for c in range(n)]


def ring_fold(
    parts: Sequence[Tensor], op: str | dist.ReduceOp | dist.ReduceOp.RedOpType = "sum", *, consume: bool = False
) -> Tensor:
    """What gloo's ring all-reduce over ``len(parts)`` processes leaves on every process.

    Args:
        parts: one flat tensor per rank, in rank order, same length and type. A part may wait in host memory while
            ``parts[-1]`` is on a device: it is then brought over chunk by chunk.
        op: the operation, see `combine_of`.
        consume: the parts may be overwritten. The result then lies in the memory of ``parts[0]`` when that is on the
            device of ``parts[-1]``, and nothing of a part's size is allocated.

    Returns:
        The folded tensor on the device of ``parts[-1]``, shape ``[length]``.
    """
    combine, n = combine_of(op), len(parts)
    check_parts(parts)
    device = parts[-1].device
    if n == 1:
        return parts[0] if consume else parts[0].clone()
    apart = any(part.device != device for part in parts)
    if n == 2 and not apart and combine in (_sum, _product):
        out = parts[0] if consume else torch.empty_like(parts[0])
        combine(parts[0], parts[1], out)
        return out
    in_place = consume and not apart
    out = parts[0] if in_place else torch.empty_like(parts[-1])
    if combine is _sum and not apart and device.type != "cpu":
        ring_sum(parts, out)
        return out
    for c, chunk in enumerate(ring_chunks(out.numel() * out.element_size(), out.element_size(), n)):
        if chunk.start == chunk.stop:
            continue
        chain = [parts[(c - k) % n][chunk].to(device, non_blocking=True) for k in range(1, n + 1)]
        # Overwriting the first link keeps rank 0's piece, which may stand later in the chain, intact until it is used.
        partial, into = chain[0], chain[0] if in_place else out[chunk]
        for own in chain[1:-1]:
            combine(own, partial, into)
            partial = into
        combine(chain[-1], partial, out[chunk])
    return out


def ring_sum(parts: Sequence[Tensor], out: Tensor) -> None:
    """`ring_fold` by sums where a launch costs more than an addition: one for each link of all chunks' chains.

    Args:
        parts: one flat tensor per rank, in rank order, on one device. They are overwritten if `out` is the first.
        out: takes the sums.
    """
    n = len(parts)
    chunks = ring_chunks(out.numel() * out.element_size(), out.element_size(), n)
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    pieces, sums = [part.split(sizes) for part in parts], list(out.split(sizes))
    partial = [pieces[c - 1][c] for c in range(n)]
    if out is not parts[0]:
        torch._foreach_copy_(sums, partial)
        partial = sums
    for k in range(2, n + 1):
        torch._foreach_add_(partial, [pieces[(c - k) % n][c] for c in range(n)])
    if out is parts[0]:
        # Only now: until its turn came, rank 0's piece was needed.
        torch._foreach_copy_(sums, partial)


def tree_fold(parts: Sequence[Tensor], *, consume: bool = False) -> Tensor:
    """Balanced binary tree sum over ranks.

    Args:
        parts: one flat tensor per rank, in rank order, same length, type and device.
        consume: the parts may be overwritten; the result then lies in the memory of ``parts[0]``.

    Returns:
        The folded tensor, shape ``[length]``.
    """
    check_parts(parts)
    blocks: list[tuple[int, int, Tensor]] = []
    for rank, part in enumerate(parts):
        push_block(blocks, rank, 1, part, consume=consume)
    return finish_blocks(blocks, consume=consume)


def carries(blocks: Sequence[tuple[Any, ...]], size: int) -> bool:
    """Whether the last of some aligned blocks and the next, of `size` ranks, are the halves of a larger one."""
    return bool(blocks) and blocks[-1][1] == size and blocks[-1][0] % (2 * size) == 0


def push_block(blocks: list[tuple[int, int, Tensor]], start: int, size: int, part: Tensor, *, consume: bool) -> None:
    """Append the sum of ranks ``start..start+size-1`` and carry, like a binary counter.

    Args:
        blocks: aligned blocks ``(start, size, sum)`` so far, ascending; changed in place.
        start: first rank of the new block, a multiple of `size`.
        size: number of ranks in it, a power of two.
        part: their sum, shape ``[length]``.
        consume: sums may be overwritten; a carry is then added into its left block. Without it, blocks of size 1 are
            the caller's and are kept.
    """
    while carries(blocks, size):
        start, _, left = blocks.pop()
        part = left.add_(part) if consume or size > 1 else left + part
        size *= 2
    blocks.append((start, size, part))


def finish_blocks(blocks: Sequence[tuple[int, int, Tensor]], *, consume: bool) -> Tensor:
    """Combine the blocks of N's binary form left to right; see `push_block` for the arguments."""
    (_, size, total), rest = blocks[0], blocks[1:]
    if not consume and size == 1:
        total = total.clone()
    for _, _, part in rest:
        total.add_(part)
    return total


def check_parts(parts: Sequence[Tensor]) -> None:
    """Refuse parts that are not flat, dense, contiguous and alike.

    Raises:
        ValueError: naming the first part that differs.
    """
    if not parts:
        raise ValueError("`parts` is empty. HINT: give one flat tensor per EST.")
    first = parts[0]
    for rank, part in enumerate(parts):
        if part.layout != torch.strided:
            raise ValueError(
                f"`parts[{rank}]` is a sparse tensor ({part.layout}); sparse gradients have no placement-independent"
                " order. HINT: build the embedding with `sparse=False`."
            )
        if part.dim() != 1 or not part.is_contiguous() or part.dtype != first.dtype or part.numel() != first.numel():
            raise ValueError(
                f"`parts[{rank}]` has shape {list(part.shape)} and type {part.dtype}, `parts[0]` has"
                f" {list(first.shape)} and {first.dtype}. HINT: give contiguous flat tensors of one length and type."
            )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
