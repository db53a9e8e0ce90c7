"""The primitives of the format on CUDA tensors: how the Triton kernels of `cuda_kernels.py` are launched."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import cuda_kernels as kernels
from .cpu import UNARY


class Tiles(NamedTuple):
    """Tile sizes of a launch: any choice gives the same bits.

    Args:
        m: rows of a product's tile, a power of two of at least 16.
        n: columns of a product's tile, likewise.
        k: steps of k that are loaded at once: a power of two from 16 to 256.
        warps: warps of a program.
        stages: depth of the software pipeline.
        width: elements of an elementwise program, a power of two.
    """

    m: int = 64
    n: int = 64
    k: int = 16
    warps: int = 4
    stages: int = 2
    width: int = 1024


_ENOUGH = 256  # programs that keep a device busy
_forced: Tiles | None = None


@contextmanager
def tiles(choice: Tiles) -> Iterator[None]:
    """Use these tile sizes for the time of a ``with`` block."""
    global _forced
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before


def pick(kind: str, m: int, n: int = 1) -> Tiles:
    """The tiles of a launch of a kind of kernel whose result has m rows and n columns; chosen on an H100."""
    if _forced is not None:
        return _forced
    if kind == "rows":
        return Tiles(warps=1, stages=3)  # with more, the tree of lanes does not fit the registers
    few = blocks_of(m, 64) * blocks_of(n, 128) < _ENOUGH
    if kind == "matmul" and m > 32:
        return Tiles(64, 64, 32, 4, 3) if n > 32 else Tiles(32, 32, 32, 2, 3)
    if kind == "forward" and m > 32:
        return Tiles(64, 64, 32, 4, 3) if few else Tiles(64, 256, 16, 8, 3)
    if kind == "weight_gradient" and m > 64:
        return Tiles(128, 128, 16, 8, 3) if n > 64 else Tiles(128, 64, 16, 4, 4)
    if kind == "weight_gradient" and m > 32:
        return Tiles(64, 64, 16, 4, 3)
    if m <= 32:
        return Tiles(32, 128, 16, 4, 4) if n > 64 else Tiles(32, 64, 16, 4, 3)
    return Tiles(64, 64, 32, 4, 3) if n <= 64 or few else Tiles(64, 128, 16, 4, 3)


def launch_options(t: Tiles) -> dict[str, int | bool]:
    """Of every launch: how it is compiled, and without fusing products and sums."""
    return {"num_warps": t.warps, "num_stages": t.stages, "enable_fp_fusion": False}


def blocks_of(length: int, block: int) -> int:
    """How many blocks a length has."""
    return -(-length // block)


def span_of(k: int, programs: int) -> int:
    """How many values of k one program adds, a segment or a block, if every span of k has so many programs."""
    block, segment = kernels.BLOCK.value, kernels.SEGMENT.value
    return block if programs * blocks_of(k, block) >= _ENOUGH or k <= segment else segment


def matmul(a: Tensor, b: Tensor, into: Tensor | None = None) -> Tensor:
    """Batched product; see `primitives.matmul`."""
    (batch, m, k), n = a.shape, b.shape[2]
    if n > 1 and m > 32 and b.stride(2) != 1:
        b = b.contiguous()  # a copy costs less than tiles whose columns are far apart
    t = pick("matmul", m, n)
    tiles = blocks_of(m, t.m) * blocks_of(n, t.n)
    span = span_of(k, batch * tiles)
    spans = blocks_of(k, span)
    partial = a.new_empty(batch, spans, m * n)
    kernels.matmul[tiles, batch * spans](
        *(a, b, partial, m, n, k, spans, *a.stride(), *b.stride()),
        **{"SPAN": span, "COLS": math.gcd(n, 16), "DEEP": math.gcd(k, 16), "BM": t.m, "BN": t.n, "BK": t.k},
        **launch_options(t),
    )
    return fold_spans(partial, kernels.BLOCK.value // span, into).view(batch, m, n)


def fold_spans(partial: Tensor, each: int, into: Tensor | None = None) -> Tensor:
    """The sums ``[batch, count]`` of ``[batch, spans, count]``, `each` spans to a block; those of `into` go on."""
    batch, spans, count = partial.shape
    if each > 1 and spans > 1:
        whole = spans // each * each
        folded = [fold(partial[:, :whole].reshape(-1, each, count)).view(batch, -1, count)] if whole else []
        rest = [fold(partial[:, whole:])[:, None]] if whole < spans else []
        partial = torch.cat([*folded, *rest], 1)
    return partial[:, 0] if partial.shape[1] == 1 and into is None else fold(partial, into)


def fold(partial: Tensor, into: Tensor | None = None) -> Tensor:
    """The sums ``[batch, count]`` of ``[batch, blocks, count]`` over the blocks, ascending; those of `into` go on."""
    batch, blocks, count = partial.shape
    partial = partial.contiguous()
    out = partial.new_empty(batch, count) if into is None else into
    t = _forced or Tiles()
    grid = (blocks_of(count, t.width), batch)
    kernels.fold[grid](partial, out, count, blocks, CONTINUE=into is not None, W=t.width, **launch_options(t))
    return out


def sum_middle(x: Tensor) -> Tensor:
    """Sums over the middle of a contiguous ``[outer, rows, inner]``; see `primitives.sum_middle`."""
    outer, rows, inner = x.shape
    t = _forced or Tiles()
    while True:
        blocks = blocks_of(rows, kernels.SUM_BLOCK.value)
        out = x.new_empty(outer * blocks * inner)
        columns = min(triton.next_power_of_2(inner), max(1, t.width // 64))
        units = max(1, min(t.width // 64 // columns, triton.next_power_of_2(outer * blocks)))
        grid = (blocks_of(outer * blocks, units), blocks_of(inner, columns))
        kernels.sum_middle[grid](x, out, rows, inner, blocks, outer * blocks, U=units, W=columns, **launch_options(t))
        if blocks == 1:
            return out.view(outer, inner)
        x, rows = out, blocks


def unary(name: str, x: Tensor) -> Tensor:
    """An elementary function of a dense tensor; see `primitives.unary`."""
    out = torch.empty_like(x)
    t = _forced or Tiles()
    grid = (blocks_of(x.numel(), t.width),)
    kernels.unary[grid](x, out, x.numel(), WHICH=UNARY.index(name), W=t.width, **launch_options(t))
    return out


def random(kind: str, key: int, out: Tensor) -> Tensor:
    """Fill a contiguous tensor; see `primitives.random`."""
    t = _forced or Tiles()
    grid = (blocks_of(out.numel(), 4 * t.width),)
    low, high = key & 0xFFFFFFFF, key >> 32
    kernels.random[grid](out, low, high, out.numel(), NORMAL=kind == "normal", W=t.width, **launch_options(t))
    return out


def index_add(out: Tensor, index: Tensor, source: Tensor) -> Tensor:
    """Add rows in ascending order; see `primitives.index_add`."""
    rows, width = source.shape
    ordered, order = torch.sort(index, stable=True)
    t = _forced or Tiles()
    strip = min(triton.next_power_of_2(width), t.width)
    grid = (rows, blocks_of(width, strip))
    kernels.index_add[grid](out, ordered, order, source, rows, width, W=strip, **launch_options(t))
    return out
