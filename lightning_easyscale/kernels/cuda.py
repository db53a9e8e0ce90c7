"""The primitives of the format on CUDA tensors: how the Triton kernels of `cuda_kernels.py` are launched."""

from __future__ import annotations

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


_LARGE = Tiles(128, 128, 16, 8, 3)
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


def _pick(m: int, n: int) -> Tiles:
    if _forced is not None:
        return _forced
    return _LARGE if m * n >= 512 * 1024 and min(m, n) >= 128 else Tiles()


def _options(t: Tiles) -> dict[str, int | bool]:
    return {"num_warps": t.warps, "num_stages": t.stages, "enable_fp_fusion": False}


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def matmul(a: Tensor, b: Tensor, into: Tensor | None = None) -> Tensor:
    """Batched product; see `primitives.matmul`."""
    (batch, m, k), n = a.shape, b.shape[2]
    t = _pick(m, n)
    blocks = _blocks(k, kernels.BLOCK.value)
    grid = (_blocks(m, t.m) * _blocks(n, t.n), batch * blocks)
    partial = a.new_empty(batch, blocks, m, n)
    kernels.matmul[grid](
        *(a, b, partial, m, n, k, blocks), *a.stride(), *b.stride(), BM=t.m, BN=t.n, BK=t.k, **_options(t)
    )
    if blocks == 1 and into is None:
        return partial[:, 0]
    out = a.new_empty(batch, m, n) if into is None else into
    grid = (_blocks(m * n, t.width), batch)
    kernels.fold[grid](partial, out, m * n, blocks, CONTINUE=into is not None, W=t.width, **_options(t))
    return out


def sum_middle(x: Tensor) -> Tensor:
    """Sums over the middle of a contiguous ``[outer, rows, inner]``; see `primitives.sum_middle`."""
    outer, rows, inner = x.shape
    t = _forced or Tiles()
    while True:
        blocks = _blocks(rows, kernels.SUM_BLOCK.value)
        out = x.new_empty(outer * blocks * inner)
        columns = min(triton.next_power_of_2(inner), max(1, t.width // 64))
        units = max(1, min(t.width // 64 // columns, triton.next_power_of_2(outer * blocks)))
        grid = (_blocks(outer * blocks, units), _blocks(inner, columns))
        kernels.sum_middle[grid](x, out, rows, inner, blocks, outer * blocks, U=units, W=columns, **_options(t))
        if blocks == 1:
            return out.view(outer, inner)
        x, rows = out, blocks


def unary(name: str, x: Tensor) -> Tensor:
    """An elementary function of a dense tensor; see `primitives.unary`."""
    out = torch.empty_like(x)
    t = _forced or Tiles()
    grid = (_blocks(x.numel(), t.width),)
    kernels.unary[grid](x, out, x.numel(), WHICH=UNARY.index(name), W=t.width, **_options(t))
    return out


def random(kind: str, key: int, out: Tensor) -> Tensor:
    """Fill a contiguous tensor; see `primitives.random`."""
    t = _forced or Tiles()
    grid = (_blocks(out.numel(), 4 * t.width),)
    low, high = key & 0xFFFFFFFF, key >> 32
    kernels.random[grid](out, low, high, out.numel(), NORMAL=kind == "normal", W=t.width, **_options(t))
    return out


def index_add(out: Tensor, index: Tensor, source: Tensor) -> Tensor:
    """Add rows in ascending order; see `primitives.index_add`."""
    rows, width = source.shape
    ordered, order = torch.sort(index, stable=True)
    t = _forced or Tiles()
    strip = min(triton.next_power_of_2(width), t.width)
    grid = (rows, _blocks(width, strip))
    kernels.index_add[grid](out, ordered, order, source, rows, width, W=strip, **_options(t))
    return out
