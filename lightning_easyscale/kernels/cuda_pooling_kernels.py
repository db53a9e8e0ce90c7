"""Pooling of the format as Triton kernels: a program adds, for W results, what each position of a window gives them.

Positions ascend, and a sum starts at +0, as in `pooling.py`; a position that gives nothing adds +0. Launches have the
rules of `cuda_kernels.py`, and offsets are 32-bit numbers. Operands are ``[planes, height, width]``, contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import cuda_functions as functions


@triton.jit
def _source(y, tap, stride: tl.constexpr, pad, dilation, size):
    """The window that has row (or column) y at its position `tap`, and whether there is one among `size`."""
    up = y + pad - tap * dilation
    i = up // stride
    return i, (up >= 0) & (i * stride == up) & (i < size)


@triton.jit
def _counted(i, size, kernel, stride, pad, PADDED: tl.constexpr):
    """How many rows (or columns) of window i are counted."""
    start = i * stride - pad
    end = tl.minimum(start + kernel, size + pad)
    return end - start if PADDED else tl.minimum(end, size) - tl.maximum(start, 0)


@triton.jit(do_not_specialize=["n", "taps"])
def max_pool_backward(
    dy, index, out, n, taps, height, width, out_height, out_width, pad_h, pad_w, dilation_h, dilation_w, kernel_w,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The gradient of W of n elements: of each window whose largest element, as `index` says, that is."""
    at = tl.program_id(0) * W + tl.arange(0, W)
    plane, place = at // (height * width), at % (height * width)
    y, z = place // width, place % width
    total = tl.zeros([W], tl.float32)
    for tap in range(0, taps):
        i, tall = _source(y, tap // kernel_w, STRIDE_H, pad_h, dilation_h, out_height)
        j, wide = _source(z, tap % kernel_w, STRIDE_W, pad_w, dilation_w, out_width)
        there = tall & wide & (at < n)
        window = (plane * out_height + i) * out_width + j
        there = there & (tl.load(index + window, mask=there, other=-1) == place)
        total += tl.load(dy + window, mask=there, other=0.0)
    tl.store(out + at, total, mask=at < n)


@triton.jit(do_not_specialize=["n", "taps"])
def avg_pool(
    x, out, n, taps, height, width, out_height, out_width, stride_h, stride_w, pad_h, pad_w, kernel_h, kernel_w,
    divisor, PADDED: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """W of n windows' sums divided by `divisor`, or if that is 0 by the number of positions that are counted."""
    at = tl.program_id(0) * W + tl.arange(0, W)
    pixels = out_height * out_width
    plane, i, j = at // pixels, (at % pixels) // out_width, at % out_width
    top, left = i * stride_h - pad_h, j * stride_w - pad_w
    total = tl.zeros([W], tl.float32)
    for tap in range(0, taps):
        y, z = top + tap // kernel_w, left + tap % kernel_w
        there = (y >= 0) & (y < height) & (z >= 0) & (z < width) & (at < n)
        total += tl.load(x + (plane * height + y) * width + z, mask=there, other=0.0)
    count = _counted(i, height, kernel_h, stride_h, pad_h, PADDED)
    count = count * _counted(j, width, kernel_w, stride_w, pad_w, PADDED)
    count = tl.where(divisor == 0, count, divisor)
    tl.store(out + at, functions.divide(total, count.to(tl.float32)), mask=at < n)


@triton.jit(do_not_specialize=["n", "taps"])
def avg_pool_backward(
    dy, out, n, taps, height, width, out_height, out_width, pad_h, pad_w, kernel_h, kernel_w, divisor,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PADDED: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The gradient of W of n elements: their shares of their windows' gradients."""
    at = tl.program_id(0) * W + tl.arange(0, W)
    plane, y, z = at // (height * width), (at % (height * width)) // width, at % width
    total = tl.zeros([W], tl.float32)
    for tap in range(0, taps):
        i, tall = _source(y, tap // kernel_w, STRIDE_H, pad_h, 1, out_height)
        j, wide = _source(z, tap % kernel_w, STRIDE_W, pad_w, 1, out_width)
        there = tall & wide & (at < n)
        count = _counted(i, height, kernel_h, STRIDE_H, pad_h, PADDED)
        count = count * _counted(j, width, kernel_w, STRIDE_W, pad_w, PADDED)
        count = tl.where(divisor == 0, count, divisor)
        g = tl.load(dy + (plane * out_height + i) * out_width + j, mask=there, other=0.0)
        total += tl.where(there, functions.divide(g, count.to(tl.float32)), 0.0)
    tl.store(out + at, total, mask=at < n)
