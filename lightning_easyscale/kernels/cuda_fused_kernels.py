"""Operations of the format that are several steps elsewhere, as one Triton kernel each: softmax, normalizations, gelu.

They round where the composed forms round (`reductions.py`, `normalization.py`, `elementwise.py`), and a sum has the
lanes and blocks of `cuda_kernels.sum_middle`. Launches have the rules of `cuda_kernels.py`.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from . import cuda_functions as functions
from .cuda_kernels import LANES, LOG_LANES, SUM_BLOCK

_ROOT_HALF: tl.constexpr = tl.constexpr(math.sqrt(0.5))
_ROOT_TWO_OVER_PI: tl.constexpr = tl.constexpr(math.sqrt(2 / math.pi))
_HALF_ROOT: tl.constexpr = tl.constexpr(math.sqrt(2 / math.pi) / 2)
_CUBIC: tl.constexpr = tl.constexpr(0.044715)
_CUBIC_SLOPE: tl.constexpr = tl.constexpr(3 * 0.044715)
_INF: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit
def _tree(lanes, U: tl.constexpr):
    """Sums ``[U, 1]`` of lanes ``[U, LANES]``."""
    for i in tl.static_range(LOG_LANES):
        halves = tl.reshape(lanes, [U, 2, LANES >> (i + 1)])
        low, high = tl.split(tl.permute(halves, (0, 2, 1)))
        lanes = low + high
    return lanes


@triton.jit
def _quotient(a, b):
    return functions.divide(a, tl.full(a.shape, b, tl.float32))


@triton.jit(do_not_specialize=["rows", "length"])
def softmax(x, out, rows, length, LOG: tl.constexpr, U: tl.constexpr):
    """U rows of ``[rows, length]``: softmax, or its logarithm."""
    row = tl.program_id(0).to(tl.int64) * U + tl.arange(0, U)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    base = row * length
    largest = tl.full([U, LANES], -_INF, tl.float32)
    for first in range(0, length, LANES):
        at = first + lane
        there = (row < rows) & (at < length)
        largest = tl.maximum(largest, tl.load(x + base + at, mask=there, other=-_INF))
    top = tl.max(largest, 1, keep_dims=True)
    lanes = tl.zeros([U, LANES], tl.float32)
    for first in range(0, length, LANES):
        at = first + lane
        there = (row < rows) & (at < length)
        e = functions.exp(tl.load(x + base + at, mask=there, other=0.0) - top)
        lanes += tl.where(there, e, 0.0)
    total = _tree(lanes, U)
    if LOG:
        total = functions.log(total)
    for first in range(0, length, LANES):
        at = first + lane
        there = (row < rows) & (at < length)
        v = tl.load(x + base + at, mask=there, other=0.0) - top
        if LOG:
            y = v - total
        else:
            e = functions.exp(v)
            y = functions.divide(e, tl.broadcast_to(total, e.shape))
        tl.store(out + base + at, y, mask=there)


@triton.jit(do_not_specialize=["rows", "length"])
def softmax_backward(dy, y, out, rows, length, LOG: tl.constexpr, U: tl.constexpr):
    """The gradients of U rows of softmax, or of its logarithm."""
    row = tl.program_id(0).to(tl.int64) * U + tl.arange(0, U)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    base = row * length
    lanes = tl.zeros([U, LANES], tl.float32)
    for first in range(0, length, LANES):
        at = first + lane
        there = (row < rows) & (at < length)
        g = tl.load(dy + base + at, mask=there, other=0.0)
        if not LOG:
            g = tl.where(there, g * tl.load(y + base + at, mask=there, other=0.0), 0.0)
        lanes += g
    total = _tree(lanes, U)
    for first in range(0, length, LANES):
        at = first + lane
        there = (row < rows) & (at < length)
        g = tl.load(dy + base + at, mask=there, other=0.0)
        v = tl.load(y + base + at, mask=there, other=0.0)
        made = g - functions.exp(v) * total if LOG else (g - total) * v
        tl.store(out + base + at, made, mask=there)


@triton.jit(do_not_specialize=["rows", "length"])
def layer_norm(
    x, weight, bias, out, means, inverses, rows, length, count, eps,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """U rows of ``[rows, length]``; `count` is their length as a number."""
    row = tl.program_id(0).to(tl.int64) * U + tl.arange(0, U)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    base = row * length
    lanes = tl.zeros([U, LANES], tl.float32)
    for first in range(0, length, LANES):
        at = first + lane
        lanes += tl.load(x + base + at, mask=(row < rows) & (at < length), other=0.0)
    mean = _quotient(_tree(lanes, U), count)
    lanes = tl.zeros([U, LANES], tl.float32)
    for first in range(0, length, LANES):
        at = first + lane
        there = (row < rows) & (at < length)
        away = tl.load(x + base + at, mask=there, other=0.0) - mean
        lanes += tl.where(there, away * away, 0.0)
    inverse = _inverse_deviation(_quotient(_tree(lanes, U), count), eps)
    tl.store(means + row, mean, mask=row < rows)
    tl.store(inverses + row, inverse, mask=row < rows)
    for first in range(0, length, LANES):
        at = first + lane
        there = (row < rows) & (at < length)
        y = (tl.load(x + base + at, mask=there, other=0.0) - mean) * inverse
        if WEIGHT:
            y = y * tl.load(weight + at, mask=at < length, other=0.0)
        if BIAS:
            y = y + tl.load(bias + at, mask=at < length, other=0.0)
        tl.store(out + base + at, y, mask=there)


@triton.jit
def _inverse_deviation(variance, eps):
    root = functions.square_root(variance + eps)
    return functions.divide(tl.full(root.shape, 1.0, tl.float32), root)


@triton.jit(do_not_specialize=["rows", "length"])
def layer_norm_backward(
    dy, x, means, inverses, weight, out, products, rows, length, count, WEIGHT: tl.constexpr, U: tl.constexpr
):
    """The input's gradient of U rows, and the gradients times the normalized input, whose sums are the weight's."""
    row = tl.program_id(0).to(tl.int64) * U + tl.arange(0, U)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    base = row * length
    mean = tl.load(means + row, mask=row < rows, other=0.0)
    inverse = tl.load(inverses + row, mask=row < rows, other=0.0)
    first_lanes = tl.zeros([U, LANES], tl.float32)
    second_lanes = tl.zeros([U, LANES], tl.float32)
    for first in range(0, length, LANES):
        at = first + lane
        there = (row < rows) & (at < length)
        g = tl.load(dy + base + at, mask=there, other=0.0)
        normal = (tl.load(x + base + at, mask=there, other=0.0) - mean) * inverse
        tl.store(products + base + at, g * normal, mask=there)
        if WEIGHT:
            g = g * tl.load(weight + at, mask=at < length, other=0.0)
        first_lanes += tl.where(there, g, 0.0)
        second_lanes += tl.where(there, g * normal, 0.0)
    mean_g = _quotient(_tree(first_lanes, U), count)
    mean_product = _quotient(_tree(second_lanes, U), count)
    for first in range(0, length, LANES):
        at = first + lane
        there = (row < rows) & (at < length)
        g = tl.load(dy + base + at, mask=there, other=0.0)
        normal = (tl.load(x + base + at, mask=there, other=0.0) - mean) * inverse
        if WEIGHT:
            g = g * tl.load(weight + at, mask=at < length, other=0.0)
        tl.store(out + base + at, ((g - mean_g) - normal * mean_product) * inverse, mask=there)


@triton.jit
def _apart(product, there):
    """A product that is added, chosen by a mask first.

    Otherwise NVIDIA's assembler for compute capability 10.0 fuses pairs of products and sums (``mul.rn.f32x2``,
    ``add.rn.f32x2``) although told not to.
    """
    return tl.where(there, product, 0.0)


@triton.jit(do_not_specialize=["rows", "inner", "blocks", "units"])
def channel_sums(
    x, dy, means, inverses, weight, out, channels, inner, rows, blocks, units,
    KIND: tl.constexpr, WEIGHT: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Sums of U blocks (of ``units = channels * blocks``) over the images and pixels of ``[N, channels, inner]``.

    KIND 0 adds x, 1 squared distances to the mean. 2 makes the four sums of a normalization's backward: of the scaled
    gradient, of that times the normalized input, of the gradient times the normalized input, and of the gradient.
    """
    unit = tl.program_id(0).to(tl.int64) * U + tl.arange(0, U)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    c = unit // blocks
    start = ((unit % blocks) * SUM_BLOCK).to(tl.int32)
    known = unit < units
    mean = tl.zeros([U, 1], tl.float32)
    inverse = tl.zeros([U, 1], tl.float32)
    scale = tl.zeros([U, 1], tl.float32)
    if KIND > 0:
        mean = tl.load(means + c, mask=known, other=0.0)
    if KIND == 2:
        inverse = tl.load(inverses + c, mask=known, other=0.0)
        if WEIGHT:
            scale = tl.load(weight + c, mask=known, other=0.0)
    lanes = tl.zeros([U, LANES], tl.float32)
    products = tl.zeros([U, LANES], tl.float32)
    gradients = tl.zeros([U, LANES], tl.float32)
    scaled_products = tl.zeros([U, LANES], tl.float32)
    for row in range(0, tl.minimum(rows, SUM_BLOCK), LANES):
        r = start + row + lane
        there = known & (r < rows)
        at = ((r // inner).to(tl.int64) * channels + c) * inner + r % inner
        v = tl.load(x + at, mask=there, other=0.0)
        if KIND == 0:
            lanes += v
        elif KIND == 1:
            away = v - mean
            lanes += tl.where(there, away * away, 0.0)
        else:
            g = tl.load(dy + at, mask=there, other=0.0)
            normal = tl.where(there, (v - mean) * inverse, 0.0)
            gradients += g
            products += _apart(g * normal, there)
            if WEIGHT:
                g = _apart(g * scale, there)
                lanes += g
                scaled_products += _apart(g * normal, there)
    if KIND < 2:
        tl.store(out + unit, _tree(lanes, U), mask=known)
    else:
        total = _tree(gradients, U)
        product = _tree(products, U)
        tl.store(out + 2 * units + unit, product, mask=known)
        tl.store(out + 3 * units + unit, total, mask=known)
        if WEIGHT:
            total = _tree(lanes, U)
            product = _tree(scaled_products, U)
        tl.store(out + unit, total, mask=known)
        tl.store(out + units + unit, product, mask=known)


@triton.jit
def _sum_of_blocks(partial, unit, known, blocks, U: tl.constexpr):
    lane = tl.arange(0, LANES)[None, :]
    lanes = tl.zeros([U, LANES], tl.float32)
    for first in range(0, blocks, LANES):
        at = first + lane
        lanes += tl.load(partial + unit * blocks + at, mask=known & (at < blocks), other=0.0)
    return _tree(lanes, U)


@triton.jit(do_not_specialize=["channels", "blocks"])
def channel_moments(
    partial, means, inverses, running_mean, running_var, channels, blocks, count, eps, momentum, rest, unbias,
    KIND: tl.constexpr, RUNNING: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """From the blocks' sums of U channels: KIND 0 their means, 1 their inverse deviations and the running moments."""
    c = tl.program_id(0).to(tl.int64) * U + tl.arange(0, U)[:, None]
    known = c < channels
    moment = _quotient(_sum_of_blocks(partial, c, known, blocks, U), count)
    if KIND == 0:
        tl.store(means + c, moment, mask=known)
    else:
        tl.store(inverses + c, _inverse_deviation(moment, eps), mask=known)
        if RUNNING:
            mean = tl.load(means + c, mask=known, other=0.0)
            old = tl.load(running_mean + c, mask=known, other=0.0)
            tl.store(running_mean + c, old * rest + mean * momentum, mask=known)
            old = tl.load(running_var + c, mask=known, other=0.0)
            tl.store(running_var + c, old * rest + (moment * unbias) * momentum, mask=known)


@triton.jit(do_not_specialize=["channels", "blocks"])
def channel_gradients(partial, out, channels, blocks, count, U: tl.constexpr):
    """From the blocks' sums of KIND 2 in `channel_sums`: two means and two sums for each of U channels."""
    c = tl.program_id(0).to(tl.int64) * U + tl.arange(0, U)[:, None]
    known = c < channels
    for kind in tl.static_range(4):
        total = _sum_of_blocks(partial + kind * channels.to(tl.int64) * blocks, c, known, blocks, U)
        if kind < 2:
            total = _quotient(total, count)
        tl.store(out + kind * channels + c, total, mask=known)


@triton.jit(do_not_specialize=["n", "channels", "inner"])
def normalize_channels(
    x, means, inverses, weight, bias, out, n, channels, inner,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """W elements of ``[N, channels, inner]`` normalized."""
    at = tl.program_id(0).to(tl.int64) * W + tl.arange(0, W)
    there = at < n
    c = (at // inner) % channels
    away = tl.load(x + at, mask=there, other=0.0) - tl.load(means + c, mask=there, other=0.0)
    y = away * tl.load(inverses + c, mask=there, other=0.0)
    if WEIGHT:
        y = y * tl.load(weight + c, mask=there, other=0.0)
    if BIAS:
        y = y + tl.load(bias + c, mask=there, other=0.0)
    tl.store(out + at, y, mask=there)


@triton.jit(do_not_specialize=["n", "channels", "inner"])
def normalize_channels_backward(
    dy, x, means, inverses, weight, found, out, n, channels, inner, WEIGHT: tl.constexpr, W: tl.constexpr
):
    """The input's gradient for W elements; `found` is what `channel_gradients` made."""
    at = tl.program_id(0).to(tl.int64) * W + tl.arange(0, W)
    there = at < n
    c = (at // inner) % channels
    inverse = tl.load(inverses + c, mask=there, other=0.0)
    normal = (tl.load(x + at, mask=there, other=0.0) - tl.load(means + c, mask=there, other=0.0)) * inverse
    g = tl.load(dy + at, mask=there, other=0.0)
    if WEIGHT:
        g = g * tl.load(weight + c, mask=there, other=0.0)
    first = tl.load(found + c, mask=there, other=0.0)
    second = tl.load(found + channels + c, mask=there, other=0.0)
    tl.store(out + at, ((g - first) - normal * second) * inverse, mask=there)


@triton.jit
def _sigmoid(x):
    below = 1.0 + functions.exp(-x)
    return functions.divide(tl.full(below.shape, 1.0, tl.float32), below)


@triton.jit(do_not_specialize=["n"])
def activation(x, out, n, WHICH: tl.constexpr, W: tl.constexpr):
    """W elements of gelu, gelu by tanh, silu or sigmoid."""
    at = tl.program_id(0).to(tl.int64) * W + tl.arange(0, W)
    there = at < n
    v = tl.load(x + at, mask=there, other=0.0)
    if WHICH == 0:
        y = (v * 0.5) * (1.0 + functions.erf(v * _ROOT_HALF))
    elif WHICH == 1:
        y = (v * 0.5) * (1.0 + functions.tanh((v + _apart(v * v * v * _CUBIC, there)) * _ROOT_TWO_OVER_PI))
    elif WHICH == 2:
        y = v * _sigmoid(v)
    else:
        y = _sigmoid(v)
    tl.store(out + at, y, mask=there)


@triton.jit(do_not_specialize=["n"])
def activation_backward(dy, x, out, n, WHICH: tl.constexpr, W: tl.constexpr):
    """W gradients of `activation`, whose result, not its operand, is given for sigmoid."""
    at = tl.program_id(0).to(tl.int64) * W + tl.arange(0, W)
    there = at < n
    v = tl.load(x + at, mask=there, other=0.0)
    g = tl.load(dy + at, mask=there, other=0.0)
    square = v * v
    if WHICH == 0:
        normal = 0.5 * (1.0 + functions.erf(v * _ROOT_HALF))
        density = functions.exp(square * -0.5) * _HALF_ROOT
        made = g * (normal + _apart(v * density, there))
    elif WHICH == 1:
        t = functions.tanh((v + _apart(square * v * _CUBIC, there)) * _ROOT_TWO_OVER_PI)
        slope = (1.0 + _apart(square * _CUBIC_SLOPE, there)) * _ROOT_TWO_OVER_PI
        steep = (v * 0.5) * ((1.0 - _apart(t * t, there)) * slope)
        made = g * (_apart(0.5 * (1.0 + t), there) + _apart(steep, there))
    elif WHICH == 2:
        s = _sigmoid(v)
        made = (g * s) * (1.0 + _apart(v * (1.0 - s), there))
    else:
        made = (g * (1.0 - v)) * v
    tl.store(out + at, made, mask=there)


@triton.jit(do_not_specialize=["key_low", "key_high", "n"])
def dropout(x, out, kept, key_low, key_high, keep, n, W: tl.constexpr):
    """Dropout of 4 W elements, of which the part `keep` is kept, and which those are."""
    group = tl.program_id(0).to(tl.int64) * W + tl.arange(0, W)
    w0, w1, w2, w3 = functions.philox(group, key_low, key_high)
    word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    at = tl.program_id(0).to(tl.int64) * (4 * W) + tl.arange(0, 4 * W)
    chosen = functions.uniform_of(word) < keep
    y = tl.load(x + at, mask=at < n, other=0.0) * _noise(chosen, keep)
    tl.store(out + at, y, mask=at < n)
    tl.store(kept + at, chosen, mask=at < n)


@triton.jit(do_not_specialize=["n"])
def dropout_backward(dy, kept, out, keep, n, W: tl.constexpr):
    """The gradient of W elements."""
    at = tl.program_id(0).to(tl.int64) * W + tl.arange(0, W)
    chosen = tl.load(kept + at, mask=at < n, other=0) != 0
    tl.store(out + at, tl.load(dy + at, mask=at < n, other=0.0) * _noise(chosen, keep), mask=at < n)


@triton.jit
def _noise(chosen, keep):
    ones = tl.where(chosen, 1.0, 0.0)
    return functions.divide(ones, tl.full(ones.shape, keep, tl.float32))
