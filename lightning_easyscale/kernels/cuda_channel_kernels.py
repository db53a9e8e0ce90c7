"""Batch normalization of moderately many elements per channel as one Triton kernel forward, and one backward.

A program computes a channel: where its sums have at most `MOST` blocks, it keeps the lanes of all of them at once. So
what the kernels of `cuda_fused_kernels.py` hand each other through memory, five launches forward and three backward,
stays in registers, and an operand is read again from the cache. They round where those kernels round, and launches
have the rules of `cuda_kernels.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cuda_fused_kernels import _apart, _inverse_deviation, _quotient, _tree
from .cuda_kernels import LANES, SUM_BLOCK

MOST = 32
"""Blocks of a channel's sum that a program adds."""


@triton.jit
def _sum_of_lanes(lanes, B: tl.constexpr, LOG_B: tl.constexpr):
    """The sum ``[1, 1]`` of lanes ``[B, LANES]`` of B blocks, whose sums are in turn lanes of one block.

    That has 128 lanes: those from B on are +0, and change no sum, as none is -0.
    """
    sums = tl.reshape(_tree(lanes, B), [1, B])
    for i in tl.static_range(LOG_B):
        low, high = tl.split(tl.permute(tl.reshape(sums, [1, 2, B >> (i + 1)]), (0, 2, 1)))
        sums = low + high
    return sums


@triton.jit
def _start(channel, channels, inner, B: tl.constexpr):
    """Where the first element of each lane of B blocks is in ``[N, channels, inner]``, and which pixel that is."""
    first = tl.arange(0, B)[:, None] * SUM_BLOCK + tl.arange(0, LANES)[None, :]
    pixel = first % inner
    return ((first // inner) * channels + channel) * inner + pixel, pixel


@triton.jit
def _next(at, pixel, channels, inner):
    """The same of the next element of each lane, without a division for each."""
    pixel += LANES % inner
    at += LANES // inner * channels * inner + LANES % inner
    over = pixel >= inner
    return tl.where(over, at + (channels - 1) * inner, at), tl.where(over, pixel - inner, pixel)


@triton.jit(do_not_specialize=["channels", "inner", "rows"])
def batch_norm(
    x, weight, bias, out, means, inverses, running_mean, running_var, channels, inner, rows,
    count, eps, momentum, rest, unbias,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, RUNNING: tl.constexpr, B: tl.constexpr, LOG_B: tl.constexpr,
):  # fmt: skip
    """A channel of ``[N, channels, inner]`` normalized, with its mean, inverse deviation and running moments.

    `rows` is the number of its elements, at most B blocks, and `count` the same as a number; grid (channels).
    """
    c = tl.program_id(0)
    left = rows - tl.arange(0, B)[:, None] * SUM_BLOCK - tl.arange(0, LANES)[None, :]
    longest = tl.minimum(rows, SUM_BLOCK)
    at, pixel = _start(c, channels, inner, B)
    lanes = tl.zeros([B, LANES], tl.float32)
    for row in range(0, longest, LANES):
        lanes += tl.load(x + at, mask=row < left, other=0.0)
        at, pixel = _next(at, pixel, channels, inner)
    mean = _quotient(_sum_of_lanes(lanes, B, LOG_B), count)
    at, pixel = _start(c, channels, inner, B)
    lanes = tl.zeros([B, LANES], tl.float32)
    for row in range(0, longest, LANES):
        away = tl.load(x + at, mask=row < left, other=0.0) - mean
        lanes += _apart(away * away, row < left)
        at, pixel = _next(at, pixel, channels, inner)
    variance = _quotient(_sum_of_lanes(lanes, B, LOG_B), count)
    inverse = _inverse_deviation(variance, eps)
    here = c + tl.zeros([1, 1], tl.int32)
    tl.store(means + here, mean)
    tl.store(inverses + here, inverse)
    if RUNNING:
        tl.store(running_mean + here, tl.load(running_mean + here) * rest + mean * momentum)
        tl.store(running_var + here, tl.load(running_var + here) * rest + (variance * unbias) * momentum)
    at, pixel = _start(c, channels, inner, B)
    for row in range(0, longest, LANES):
        y = (tl.load(x + at, mask=row < left, other=0.0) - mean) * inverse
        if WEIGHT:
            y = _apart(y * tl.load(weight + c), row < left)
        if BIAS:
            y = y + tl.load(bias + c)
        tl.store(out + at, y, mask=row < left)
        at, pixel = _next(at, pixel, channels, inner)


@triton.jit(do_not_specialize=["channels", "inner", "rows"])
def batch_norm_backward(
    dy, x, means, inverses, weight, out, products, gradients, channels, inner, rows, count,
    WEIGHT: tl.constexpr, B: tl.constexpr, LOG_B: tl.constexpr,
):  # fmt: skip
    """The gradient of a channel's input, and its sums of gradients times the normalized input and of gradients."""
    c = tl.program_id(0)
    left = rows - tl.arange(0, B)[:, None] * SUM_BLOCK - tl.arange(0, LANES)[None, :]
    longest = tl.minimum(rows, SUM_BLOCK)
    mean, inverse = tl.load(means + c), tl.load(inverses + c)
    if WEIGHT:
        scale = tl.load(weight + c)
    at, pixel = _start(c, channels, inner, B)
    sums = tl.zeros([B, LANES], tl.float32)
    product_sums = tl.zeros([B, LANES], tl.float32)
    scaled_sums = tl.zeros([B, LANES], tl.float32)
    scaled_product_sums = tl.zeros([B, LANES], tl.float32)
    for row in range(0, longest, LANES):
        there = row < left
        g = tl.load(dy + at, mask=there, other=0.0)
        normal = (tl.load(x + at, mask=there, other=0.0) - mean) * inverse
        sums += g
        product_sums += _apart(g * normal, there)
        if WEIGHT:
            g = _apart(g * scale, there)
            scaled_sums += g
            scaled_product_sums += _apart(g * normal, there)
        at, pixel = _next(at, pixel, channels, inner)
    first = _sum_of_lanes(sums, B, LOG_B)
    second = _sum_of_lanes(product_sums, B, LOG_B)
    here = c + tl.zeros([1, 1], tl.int32)
    tl.store(gradients + here, first)
    tl.store(products + here, second)
    if WEIGHT:
        first = _sum_of_lanes(scaled_sums, B, LOG_B)
        second = _sum_of_lanes(scaled_product_sums, B, LOG_B)
    first, second = _quotient(first, count), _quotient(second, count)
    at, pixel = _start(c, channels, inner, B)
    for row in range(0, longest, LANES):
        there = row < left
        g = tl.load(dy + at, mask=there, other=0.0)
        normal = (tl.load(x + at, mask=there, other=0.0) - mean) * inverse
        if WEIGHT:
            g = g * scale
        product = tl.where(there, normal * second, 0.0)
        tl.store(out + at, ((g - first) - product) * inverse, mask=there)
        at, pixel = _next(at, pixel, channels, inner)
