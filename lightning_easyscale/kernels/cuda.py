"""The primitives of the format on CUDA tensors: how the Triton kernels of `cuda_kernels.py` are launched."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import cuda_kernels as kernels
from . import tuning
from .cpu import UNARY
from .launch import Launch
from .plans import planned
from .tiles import Tiles, blocks_of, few_programs, pick, power_of_two, tiles

__all__ = ["Tiles", "fold", "index_add", "matmul", "quotient", "random", "span_of", "sum_middle", "tiles", "unary"]

_FOLDED_AT_ONCE = 32  # blocks whose spans one launch adds; with more, programs would wait for memory too often
_FOLDED_WIDTH = 128  # elements of a program that does
_BLOCK, _SEGMENT, _SUM_BLOCK = kernels.BLOCK.value, kernels.SEGMENT.value, kernels.SUM_BLOCK.value


def span_of(k: int, programs: int, size: int) -> int:
    """How many values of k one program adds, a segment or a block.

    Args:
        k: length of the sums.
        programs: for every span of k.
        size: how many such sums there are.
    """
    return _SEGMENT if few_programs(programs * blocks_of(k, _BLOCK), k * size) and k > _SEGMENT else _BLOCK


def matmul(a: Tensor, b: Tensor, into: Tensor | None = None, *, base: Tensor | None = None) -> Tensor:
    """Product of matrices or of batches of them; see `primitives.matmul` and `primitives.sum_with_matmul`."""
    m, n, k = a.shape[-2], b.shape[-1], a.shape[-1]
    if n > 1 and m > 32 and b.stride(-1) != 1:
        b = b.contiguous()  # a copy costs less than tiles whose columns are far apart
    batch = a.shape[0] if a.dim() > 2 else 1
    if tuning.wanted:
        tuning.tune(("matmul", m, n, k), lambda: matmul(a, b), batch=batch)
    launch, spans, each = _matmul(batch, m, n, k, a.stride(), b.stride(), base.stride() if base is not None else ())
    if spans == 1 and into is None:
        out = a.new_empty(*a.shape[:-1], n)
        launch(a, b, a if base is None else base, out)
        return out
    partial = a.new_empty(batch, spans, m * n)
    launch(a, b, a, partial)
    made = fold(partial, each, into).view(*a.shape[:-1], n)
    return made if base is None else base + made


@planned
def _matmul(
    batch: int, m: int, n: int, k: int, a: tuple[int, ...], b: tuple[int, ...], base: tuple[int, ...]
) -> tuple[Launch, int, int]:
    """The launch for operands with these strides, into how many spans it cuts k, and how many of them are a block."""
    t = pick("matmul", m, n, k, batch=batch)
    programs = blocks_of(m, t.m) * blocks_of(n, t.n)
    span = span_of(k, batch * programs, batch * m * n)
    spans = blocks_of(k, span)
    strides = (*(0, *a)[-3:], *(0, *b)[-3:], *(0, 0, 0, *base)[-3:])
    based = bool(base) and spans == 1
    launch = Launch(
        kernels.matmul,
        (programs, batch * spans),
        (m, n, k, spans, *strides),
        (based, span, math.gcd(n, 16), math.gcd(k, 16), t.m, t.n, t.k),
        t.warps,
        t.stages,
    )
    return launch, spans, _BLOCK // span


def fold(partial: Tensor, each: int = 1, into: Tensor | None = None) -> Tensor:
    """The sums ``[batch, count]`` of ``[batch, spans, count]`` over blocks of `each` spans, ascending.

    Args:
        partial: contiguous.
        each: spans of a block, whose sum is one summand.
        into: contiguous, as the result; sums that go on in place.
    """
    batch, spans, count = partial.shape
    if spans == 1 and into is None:
        return partial.view(batch, count)
    first, last = _fold(batch, spans, count, each, into is not None)
    if first is not None:
        blocks = partial.new_empty(batch, blocks_of(spans, each), count)
        first(partial, blocks)
        partial = blocks
    out = partial.new_empty(batch, count) if into is None else into
    last(partial, out)
    return out


@planned
def _fold(batch: int, spans: int, count: int, each: int, go_on: bool) -> tuple[Launch | None, Launch]:
    """The launch that adds the spans of each block, where that is one of its own, and the one that makes the result."""
    first, blocks = None, blocks_of(spans, each)
    if each > 1 and blocks > _FOLDED_AT_ONCE:
        t = pick("plain", count)
        grid = (blocks_of(count, t.width), batch * blocks)
        first = Launch(kernels.fold, grid, (count, spans, blocks, each), (False, 1, t.width), t.warps, t.stages)
        spans, each = blocks, 1
    t = pick("plain", count)
    width = t.width if each == 1 else min(t.width, _FOLDED_WIDTH)
    grid = (blocks_of(count, width), batch)
    last = Launch(kernels.fold, grid, (count, spans, 1, spans), (go_on, each, width), t.warps, t.stages)
    return first, last


def sum_middle(x: Tensor) -> Tensor:
    """Sums over the middle of a contiguous ``[outer, rows, inner]``; see `primitives.sum_middle`."""
    outer, rows, inner = x.shape
    while True:
        launch, blocks = _sum_middle(outer, rows, inner)
        out = x.new_empty(outer, inner) if blocks == 1 else x.new_empty(outer, blocks, inner)
        launch(x, out)
        if blocks == 1:
            return out
        x, rows = out, blocks


@planned
def _sum_middle(outer: int, rows: int, inner: int) -> tuple[Launch, int]:
    """The launch, and into how many blocks it cuts the rows."""
    t = pick("plain", inner)
    blocks = blocks_of(rows, _SUM_BLOCK)
    columns = min(power_of_two(inner), max(1, t.width // 64))
    units = max(1, min(t.width // 64 // columns, power_of_two(outer * blocks)))
    grid = (blocks_of(outer * blocks, units), blocks_of(inner, columns))
    numbers = (rows, inner, blocks, outer * blocks)
    return Launch(kernels.sum_middle, grid, numbers, (units, columns), t.warps, t.stages), blocks


def unary(name: str, x: Tensor) -> Tensor:
    """An elementary function of a dense tensor; see `primitives.unary`."""
    out = torch.empty_like(x)
    _unary(name, x.numel())(x, out)
    return out


@planned
def _unary(name: str, n: int) -> Launch:
    t = pick("plain", n)
    return Launch(kernels.unary, (blocks_of(n, t.width),), (n,), (UNARY.index(name), t.width), t.warps, t.stages)


def quotient(x: Tensor, number: float, *, of_number: bool = False) -> Tensor:
    """``x / number``, or ``number / x``; see `primitives.quotient`."""
    out = torch.empty_like(x)
    x = x if out.stride() == x.stride() else torch.empty_like(out).copy_(x)
    _quotient(x.numel(), of_number)(x, out, free=(number,))
    return out


@planned
def _quotient(n: int, of_number: bool) -> Launch:
    t = pick("plain", n)
    return Launch(kernels.quotient, (blocks_of(n, t.width),), (n,), (of_number, t.width), t.warps, t.stages)


def random(kind: str, key: int, out: Tensor) -> Tensor:
    """Fill a contiguous tensor; see `primitives.random`."""
    _random(kind, out.numel())(out, free=words_of(key))
    return out


@planned
def _random(kind: str, n: int) -> Launch:
    t = pick("plain", n)
    return Launch(kernels.random, (blocks_of(n, 4 * t.width),), (n,), (kind == "normal", t.width), t.warps, t.stages)


def words_of(key: int) -> tuple[int, int]:
    """The halves of a 64-bit key, each as a signed number of 32 bits, of which the kernels use the bits."""
    low, high = key & 0xFFFFFFFF, key >> 32
    return (low ^ 0x80000000) - 0x80000000, (high ^ 0x80000000) - 0x80000000


def index_add(out: Tensor, index: Tensor, source: Tensor) -> Tensor:
    """Add rows in ascending order; see `primitives.index_add`."""
    ordered, order = torch.sort(index, stable=True)
    _index_add(*source.shape)(out, ordered, order, source)
    return out


@planned
def _index_add(rows: int, width: int) -> Launch:
    t = pick("plain", width)
    strip = min(power_of_two(width), t.width)
    grid = (rows, blocks_of(width, strip))
    return Launch(kernels.index_add, grid, (rows, width), (strip,), t.warps, t.stages)
