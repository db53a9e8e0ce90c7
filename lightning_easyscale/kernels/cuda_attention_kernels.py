"""What lies between the products of attention as Triton kernels: masks, softmax, dropout, and their gradients.

They round where the composed form rounds (`attention.py`), and a sum over keys has the lanes and blocks of
`cuda_kernels.sum_middle`. They work in place: a thread reads an element before it writes there. The scores of a row of
few keys stay in registers; a longer row is read again for each of its passes. Launches have the rules of
`cuda_kernels.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import cuda_functions as functions
from .cuda_kernels import LANES, LOG_LANES, SUM_BLOCK

_INF: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit
def _rows(bias, rows, queries, heads, length, unit, query, bb, bh, bq, U: tl.constexpr):
    """U rows of a head: where they begin, their number among all rows, if they are there, query, what is added."""
    blocks = tl.cdiv(rows, U)
    head = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks) * U + tl.arange(0, U)[:, None]
    begin = (head.to(tl.int64) * rows + row) * length
    head += unit
    query += row
    place = head.to(tl.int64) * queries + query
    added = bias + (head // heads).to(tl.int64) * bb + (head % heads).to(tl.int64) * bh + query.to(tl.int64) * bq
    return begin, place, row < rows, query, added


@triton.jit
def _masked(scores, bias, query, column, there, bk, BIAS: tl.constexpr, CAUSAL: tl.constexpr):
    """Scores of columns with what is added to them, and minus infinity where no key is."""
    v = tl.load(scores + column, mask=there, other=0.0)
    if BIAS:
        v = v + tl.load(bias + column.to(tl.int64) * bk, mask=there, other=0.0).to(tl.float32)
    if CAUSAL:
        v = v + tl.where(column <= query, 0.0, -_INF)
    return tl.where(there, v, -_INF)


@triton.jit
def _largest(largest, v):
    """The maxima so far. NaN counts as infinity: with either the row's sum is NaN, and so is all that it divides."""
    return tl.maximum(largest, tl.where(v != v, _INF, v))


@triton.jit
def _start_of(largest):
    """What is subtracted from U rows of scores, and whether their keys are all masked."""
    top = tl.max(largest, 1, keep_dims=True)
    nothing = top == -_INF
    return tl.where(nothing, 0.0, top), nothing


@triton.jit
def _noise(
    place, start, length, key_low, key_high, keep, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, U: tl.constexpr
):
    """What LANES weights of U rows are multiplied by: DROPOUT 1 drops some, 2 all. ALIGNED divides lengths."""
    if DROPOUT == 2:
        part = tl.zeros([U, LANES], tl.float32)
    else:
        if ALIGNED % 4 == 0:
            group = ((place * length + start) >> 2) + tl.arange(0, LANES // 4)[None, :]
            w0, w1, w2, w3 = functions.philox(group, key_low, key_high)
            word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        else:
            element = place * length + start + tl.arange(0, LANES)[None, :]
            w0, w1, w2, w3 = functions.philox(element >> 2, key_low, key_high)
            odd = (element & 1) != 0
            word = tl.where((element & 2) != 0, tl.where(odd, w3, w2), tl.where(odd, w1, w0))
        part = functions.divide(tl.full([U, LANES], 1.0, tl.float32), tl.full([U, LANES], keep, tl.float32))
        part = tl.where(functions.uniform_of(word) < keep, part, 0.0)
    return part


@triton.jit
def _tree(lanes, U: tl.constexpr):
    """Sums ``[U, 1]`` of lanes ``[U, LANES]``: the first half and the second are added, until one lane is left.

    A sum of two has no order. So said, threads hand each other lanes; split tensors would be whole in every thread.
    """
    for i in tl.static_range(LOG_LANES):
        lanes = tl.sum(tl.reshape(lanes, [U, 2, LANES >> (i + 1)]), 1)
    return lanes


@triton.jit
def _quotient(e, total):
    return functions.divide(e, tl.broadcast_to(total, e.shape))


@triton.jit
def _with_block(sums, lanes, start, length, U: tl.constexpr):
    """Sums of a row's blocks, each in a lane of its own, with that of the block that ends here; and new lanes."""
    last = start + LANES
    if (last % SUM_BLOCK == 0) | (last >= length):
        block = start // SUM_BLOCK
        sums = tl.where(tl.arange(0, LANES)[None, :] == block, tl.broadcast_to(_tree(lanes, U), sums.shape), sums)
        lanes = tl.zeros([U, LANES], tl.float32)
    return sums, lanes


@triton.jit
def _moments(scores, bias, query, known, length, bk, BIAS: tl.constexpr, CAUSAL: tl.constexpr, U: tl.constexpr):
    """What softmax subtracts from U rows of scores and divides them by."""
    lane = tl.arange(0, LANES)[None, :]
    largest = tl.full([U, LANES], -_INF, tl.float32)
    for start in range(0, length, LANES):
        column = start + lane
        there = known & (column < length)
        largest = _largest(largest, _masked(scores, bias, query, column, there, bk, BIAS, CAUSAL))
    top, nothing = _start_of(largest)
    sums = tl.zeros([U, LANES], tl.float32)
    lanes = tl.zeros([U, LANES], tl.float32)
    for start in range(0, length, LANES):
        column = start + lane
        there = known & (column < length)
        e = functions.exp(_masked(scores, bias, query, column, there, bk, BIAS, CAUSAL) - top)
        lanes += tl.where(there, e, 0.0)
        sums, lanes = _with_block(sums, lanes, start, length, U)
    return top, tl.where(nothing, 1.0, _tree(sums, U))


@triton.jit
def _exponentials(
    scores, bias, query, known, length, bk,
    BIAS: tl.constexpr, CAUSAL: tl.constexpr, CHUNKS: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Of U rows of CHUNKS times LANES scores: what softmax divides, and by what."""
    lane = tl.arange(0, LANES)[None, :]
    largest = tl.full([U, LANES], -_INF, tl.float32)
    scored = ()
    for chunk in tl.static_range(CHUNKS):
        column = chunk * LANES + lane
        v = _masked(scores, bias, query, column, known & (column < length), bk, BIAS, CAUSAL)
        scored += (v,)  # type: ignore[assignment]
        largest = _largest(largest, v)
    top, nothing = _start_of(largest)
    lanes = tl.zeros([U, LANES], tl.float32)
    made = ()
    for chunk in tl.static_range(CHUNKS):
        there = known & (chunk * LANES + lane < length)
        e = tl.where(there, functions.exp(scored[chunk] - top), 0.0)
        made += (e,)  # type: ignore[assignment]
        lanes += e
    return made, tl.where(nothing, 1.0, _tree(lanes, U))


@triton.jit(do_not_specialize=["key_low", "key_high", "rows", "queries", "heads", "length", "unit", "query"])
def attention_weights(
    scores, bias, key_low, key_high, keep, rows, queries, heads, length, unit, query, bb, bh, bq, bk,
    BIAS: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, CHUNKS: tl.constexpr,
    U: tl.constexpr,
):  # fmt: skip
    """Weights of U rows in place of their scores; CHUNKS times LANES hold a row, or CHUNKS is 0."""
    lane = tl.arange(0, LANES)[None, :]
    length = length // ALIGNED * ALIGNED
    begin, place, known, query, bias = _rows(bias, rows, queries, heads, length, unit, query, bb, bh, bq, U)
    scores += begin
    if CHUNKS > 0:
        made, total = _exponentials(scores, bias, query, known, length, bk, BIAS, CAUSAL, CHUNKS, U)
        for chunk in tl.static_range(CHUNKS):
            there = known & (chunk * LANES + lane < length)
            noise = _noise(place, chunk * LANES, length, key_low, key_high, keep, DROPOUT, ALIGNED, U)
            y = _quotient(made[chunk], total)
            tl.store(scores + chunk * LANES + lane, y * noise if DROPOUT else y, mask=there)
    else:
        top, total = _moments(scores, bias, query, known, length, bk, BIAS, CAUSAL, U)
        for start in range(0, length, LANES):
            column = start + lane
            there = known & (column < length)
            v = _masked(scores, bias, query, column, there, bk, BIAS, CAUSAL)
            noise = _noise(place, start, length, key_low, key_high, keep, DROPOUT, ALIGNED, U)
            y = _quotient(functions.exp(v - top), total)
            tl.store(scores + column, y * noise if DROPOUT else y, mask=there)


@triton.jit(do_not_specialize=["key_low", "key_high", "rows", "queries", "heads", "length", "unit", "query"])
def attention_weights_backward(
    scores, gradients, bias, key_low, key_high, keep, rows, queries, heads, length, unit, query, bb, bh, bq, bk,
    BIAS: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, CHUNKS: tl.constexpr,
    U: tl.constexpr,
):  # fmt: skip
    """Weights of U rows in place of their scores, and the gradients of scores in place of those of weights."""
    lane = tl.arange(0, LANES)[None, :]
    length = length // ALIGNED * ALIGNED
    begin, place, known, query, bias = _rows(bias, rows, queries, heads, length, unit, query, bb, bh, bq, U)
    scores += begin
    gradients += begin
    lanes = tl.zeros([U, LANES], tl.float32)
    if CHUNKS > 0:
        made, total = _exponentials(scores, bias, query, known, length, bk, BIAS, CAUSAL, CHUNKS, U)
        ys = ()
        gs = ()
        for chunk in tl.static_range(CHUNKS):
            column = chunk * LANES + lane
            there = known & (column < length)
            y = _quotient(made[chunk], total)
            g = tl.load(gradients + column, mask=there, other=0.0)
            if DROPOUT:
                noise = _noise(place, chunk * LANES, length, key_low, key_high, keep, DROPOUT, ALIGNED, U)
                g = g * noise
                tl.store(scores + column, y * noise, mask=there)
            else:
                tl.store(scores + column, y, mask=there)
            lanes += tl.where(there, g * y, 0.0)
            ys += (y,)  # type: ignore[assignment]
            gs += (g,)  # type: ignore[assignment]
        dot = _tree(lanes, U)
        for chunk in tl.static_range(CHUNKS):
            there = known & (chunk * LANES + lane < length)
            tl.store(gradients + chunk * LANES + lane, (gs[chunk] - dot) * ys[chunk], mask=there)
    else:
        top, total = _moments(scores, bias, query, known, length, bk, BIAS, CAUSAL, U)
        sums = tl.zeros([U, LANES], tl.float32)
        for start in range(0, length, LANES):
            column = start + lane
            there = known & (column < length)
            v = _masked(scores, bias, query, column, there, bk, BIAS, CAUSAL)
            g = tl.load(gradients + column, mask=there, other=0.0)
            if DROPOUT:
                g = g * _noise(place, start, length, key_low, key_high, keep, DROPOUT, ALIGNED, U)
            lanes += tl.where(there, g * _quotient(functions.exp(v - top), total), 0.0)
            sums, lanes = _with_block(sums, lanes, start, length, U)
        dot = _tree(sums, U)
        for start in range(0, length, LANES):
            column = start + lane
            there = known & (column < length)
            y = _quotient(functions.exp(_masked(scores, bias, query, column, there, bk, BIAS, CAUSAL) - top), total)
            g = tl.load(gradients + column, mask=there, other=0.0)
            if DROPOUT:
                noise = _noise(place, start, length, key_low, key_high, keep, DROPOUT, ALIGNED, U)
                g = g * noise
                tl.store(scores + column, y * noise, mask=there)
            else:
                tl.store(scores + column, y, mask=there)
            tl.store(gradients + column, (g - dot) * y, mask=there)
