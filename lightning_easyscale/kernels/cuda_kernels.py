"""The primitives of the format as Triton kernels.

Tile sizes are free: they choose which elements a program computes, never the operations of an element.

Launch all of them with ``enable_fp_fusion=False``. Where the length of a loop may be 1 it must not be specialised: the
compiler would drop the ``0 + x`` that keeps ``-0`` out of sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import cuda_functions as functions

SEGMENT: tl.constexpr = tl.constexpr(256)
BLOCK: tl.constexpr = tl.constexpr(4096)
LANES: tl.constexpr = tl.constexpr(128)
LOG_LANES: tl.constexpr = tl.constexpr(7)
SUM_BLOCK: tl.constexpr = tl.constexpr(4096)


@triton.jit(do_not_specialize=["m", "n", "k", "blocks"])
def matmul(
    a, b, base, out, m, n, k, blocks, ab, am, ak, bb, bk, bn, cb, cm, cn, BASE: tl.constexpr, SPAN: tl.constexpr,
    COLS: tl.constexpr, DEEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of the sum of SPAN values of k, a block or a segment: ``out[batch, span, m, n]``.

    Grid (tiles, batch * blocks), where `blocks` is the number of spans. `COLS` divides n, `DEEP` divides k. With
    `BASE`, of one span, the sum is added to `base`.
    """
    n, k = n // COLS * COLS, k // DEEP * DEEP
    columns = tl.cdiv(n, BN)
    rows = (tl.program_id(0) // columns).to(tl.int64) * BM + tl.arange(0, BM)
    cols = (tl.program_id(0) % columns).to(tl.int64) * BN + tl.arange(0, BN)
    batch = (tl.program_id(1) // blocks).to(tl.int64)
    start = (tl.program_id(1) % blocks) * SPAN
    end = tl.minimum(start + SPAN, k)
    a_rows = a + batch * ab + rows[:, None] * am
    b_cols = b + batch * bb + cols[None, :] * bn
    a_mask, b_mask = rows[:, None] < m, cols[None, :] < n
    total = tl.zeros([BM, BN], tl.float32)
    chain = tl.zeros([BM, BN], tl.float32)
    for first in range(start, end, BK):
        ks = first + tl.arange(0, BK).to(tl.int64)
        x = tl.load(a_rows + ks[None, :] * ak, mask=a_mask & (ks[None, :] < end), other=0.0)
        y = tl.load(b_cols + ks[:, None] * bk, mask=b_mask & (ks[:, None] < end), other=0.0)
        chain = tl.dot(x, y, chain, input_precision="ieee")
        if (first + BK) % SEGMENT == 0:
            total += chain
            chain = tl.zeros([BM, BN], tl.float32)
    total += chain
    if BASE:
        start_at = base + batch * cb + rows[:, None] * cm + cols[None, :] * cn
        total = tl.load(start_at, mask=a_mask & b_mask, other=0.0) + total
    where = tl.program_id(1).to(tl.int64) * m * n + rows[:, None] * n + cols[None, :]
    tl.store(out + where, total, mask=a_mask & b_mask)


@triton.jit(do_not_specialize=["count", "spans", "parts", "length"])
def fold(partial, out, count, spans, parts, length, CONTINUE: tl.constexpr, EACH: tl.constexpr, W: tl.constexpr):
    """``out[batch, part, i] = start + sum + sum + ...``, where a sum is +0 plus EACH of ``partial[batch, span, i]``.

    A part has `length` spans, which is a multiple of EACH where there are several; the last one may have fewer, and its
    last sum too. Grid (strips, batch * parts). With `CONTINUE`, `start` is what `out` holds, else +0.
    """
    at = tl.program_id(0).to(tl.int64) * W + tl.arange(0, W)
    mask = at < count
    batch, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    first = part * length
    end = tl.minimum(first + length, spans)
    base, step = partial + batch.to(tl.int64) * spans * count + at, count.to(tl.int64)
    target = out + tl.program_id(1).to(tl.int64) * count + at
    total = tl.zeros([W], tl.float32)
    if CONTINUE:
        total = tl.load(target, mask=mask, other=0.0)
    for start in range(first, end, EACH):
        if EACH == 1:
            total += tl.load(base + start * step, mask=mask, other=0.0)
        else:
            chain = tl.zeros([W], tl.float32)
            for i in tl.static_range(EACH):
                there = mask & (start + i < end)
                chain += tl.load(base + (start + i) * step, mask=there, other=0.0)
            total += chain
    tl.store(target, total, mask=mask)


@triton.jit(do_not_specialize=["rows", "inner", "blocks", "units"])
def sum_middle(x, out, rows, inner, blocks, units, U: tl.constexpr, W: tl.constexpr):
    """Sums of U blocks (of ``units = outer * blocks``) times W columns; grid (units / U, inner / W)."""
    unit = tl.program_id(0).to(tl.int64) * U + tl.arange(0, U)[None, :, None]
    cols = tl.program_id(1).to(tl.int64) * W + tl.arange(0, W)[None, None, :]
    lane = tl.arange(0, LANES)[:, None, None]
    first = (unit % blocks) * SUM_BLOCK
    there = tl.minimum(rows - first, SUM_BLOCK)
    inside = (unit < units) & (cols < inner)
    base = x + ((unit // blocks) * rows + first) * inner + cols
    lanes = tl.zeros([LANES, U, W], tl.float32)
    for row in range(0, tl.minimum(rows, SUM_BLOCK), LANES):
        at = row + lane
        lanes += tl.load(base + at.to(tl.int64) * inner, mask=inside & (at < there), other=0.0)
    for i in tl.static_range(LOG_LANES):
        halves = tl.reshape(lanes, [2, LANES >> (i + 1), U, W])
        low, high = tl.split(tl.permute(halves, (1, 2, 3, 0)))
        lanes = low + high
    tl.store(out + unit * inner + cols, lanes, mask=inside)


@triton.jit(do_not_specialize=["n"])
def unary(x, out, n, WHICH: tl.constexpr, W: tl.constexpr):
    """An elementary function of W elements, numbered as in the C++ switch."""
    at = tl.program_id(0).to(tl.int64) * W + tl.arange(0, W)
    v = tl.load(x + at, mask=at < n, other=0.0)
    if WHICH == 0:
        y = functions.exp(v)
    elif WHICH == 1:
        y = functions.expm1(v)
    elif WHICH == 2:
        y = functions.log(v)
    elif WHICH == 3:
        y = functions.log1p(v)
    elif WHICH == 4:
        y = functions.tanh(v)
    elif WHICH == 5:
        y = functions.erf(v)
    else:
        y = functions.square_root(v)
    tl.store(out + at, y, mask=at < n)


@triton.jit(do_not_specialize=["n"])
def quotient(x, out, number, n, REVERSED: tl.constexpr, W: tl.constexpr):
    """W elements divided by a number, or the number by them."""
    at = tl.program_id(0).to(tl.int64) * W + tl.arange(0, W)
    v = tl.load(x + at, mask=at < n, other=1.0)
    other = tl.full([W], number, tl.float32)
    y = functions.divide(other, v) if REVERSED else functions.divide(v, other)
    tl.store(out + at, y, mask=at < n)


@triton.jit(do_not_specialize=["key_low", "key_high", "n"])
def random(out, key_low, key_high, n, NORMAL: tl.constexpr, W: tl.constexpr):
    """Random numbers of W counters, four each."""
    group = tl.program_id(0).to(tl.int64) * W + tl.arange(0, W)
    w0, w1, w2, w3 = functions.philox(group, key_low, key_high)
    if NORMAL:
        v0, v1 = functions.normal_of(w0, w1)
        v2, v3 = functions.normal_of(w2, w3)
    else:
        v0 = functions.uniform_of(w0)
        v1 = functions.uniform_of(w1)
        v2 = functions.uniform_of(w2)
        v3 = functions.uniform_of(w3)
    at = group * 4
    tl.store(out + at, v0, mask=at < n)
    tl.store(out + at + 1, v1, mask=at + 1 < n)
    tl.store(out + at + 2, v2, mask=at + 2 < n)
    tl.store(out + at + 3, v3, mask=at + 3 < n)


@triton.jit(do_not_specialize=["rows", "width"])
def index_add(out, index, order, source, rows, width, W: tl.constexpr):
    """Adds the rows of one index, whose first place in the sorted ``index`` is this program; grid (rows, strips)."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1).to(tl.int64) * W + tl.arange(0, W)
    mask = cols < width
    mine = tl.load(index + row)
    before = tl.load(index + row - 1, mask=row > 0, other=-1)
    if mine != before:
        target = out + mine * width + cols
        total = tl.load(target, mask=mask, other=0.0)
        same = mine
        while same == mine:
            total += tl.load(source + tl.load(order + row) * width + cols, mask=mask, other=0.0)
            row += 1
            same = tl.load(index + row, mask=row < rows, other=-1)
        tl.store(target, total, mask=mask)
