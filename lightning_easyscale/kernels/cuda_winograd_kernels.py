"""Winograd's transforms as Triton kernels, as `winograd.h` has them.

Sixteen values of a square are numbered by rows. Squares are cut into blocks of `BS`, channels into blocks of `BC`; both
are free. Offsets are 64-bit numbers, as operands may have any size. Strides end in n, c, h, w for images, channels,
rows and columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _taken(a, b, c, d):
    return a - c, b + c, c - b, b - d


@triton.jit
def _spread(a, b, c):
    ends = a + c
    return a, (ends + b) * 0.5, (ends - b) * 0.5, c


@triton.jit
def _gathered(a, b, c, d):
    return (a + b) + c, (b - c) - d


@triton.jit
def _scattered(a, b):
    return a, a + b, a - b, 0.0 - b


@triton.jit
def _collected(a, b, c, d):
    middle = (b + c) * 0.5
    return a + middle, (b - c) * 0.5, middle + d


@triton.jit
def _place(start, rows, columns, BS: tl.constexpr):
    """Numbers of this program's squares in the launch, their images, and twice their rows and columns."""
    squares = tl.program_id(0) * BS + tl.arange(0, BS)
    number = start + squares
    image, y, z = number // (rows * columns), number // columns % rows * 2, number % columns * 2
    return squares.to(tl.int64), image.to(tl.int64), y.to(tl.int64), z.to(tl.int64)


@triton.jit
def _row(at, y, z, there, height, width, xh, xw, K: tl.constexpr):
    """Row K of each 4x4 inputs."""
    up = there & (y + K >= 0) & (y + K < height)
    at += (y + K) * xh
    return (
        tl.load(at + z * xw, mask=up & (z >= 0) & (z < width), other=0.0),
        tl.load(at + (z + 1) * xw, mask=up & (z + 1 >= 0) & (z + 1 < width), other=0.0),
        tl.load(at + (z + 2) * xw, mask=up & (z + 2 >= 0) & (z + 2 < width), other=0.0),
        tl.load(at + (z + 3) * xw, mask=up & (z + 3 >= 0) & (z + 3 < width), other=0.0),
    )


@triton.jit
def _four(at, there, step, a, b, c, d):
    """Store the four values of a row."""
    tl.store(at, a, mask=there)
    tl.store(at + step, b, mask=there)
    tl.store(at + 2 * step, c, mask=there)
    tl.store(at + 3 * step, d, mask=there)


@triton.jit(do_not_specialize=["squares", "start", "step"])
def input_squares(
    x, out, squares, start, step, channels, rows, columns, height, width, xn, xc, xh, xw, pad_h, pad_w, os, oc,
    BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``out[i, square, channel]`` with strides `step`, `os`, `oc`, for `squares` squares from `start` on."""
    number, image, y, z = _place(start, rows, columns, BS)
    step = step.to(tl.int64)
    channel = (tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC))[None, :]
    there = (number < squares)[:, None] & (channel < channels)
    y, z = (y - pad_h)[:, None], (z - pad_w)[:, None]
    at = x + (image * xn)[:, None] + channel * xc
    a0, a1, a2, a3 = _row(at, y, z, there, height, width, xh, xw, 0)
    b0, b1, b2, b3 = _row(at, y, z, there, height, width, xh, xw, 1)
    c0, c1, c2, c3 = _row(at, y, z, there, height, width, xh, xw, 2)
    d0, d1, d2, d3 = _row(at, y, z, there, height, width, xh, xw, 3)
    a0, b0, c0, d0 = _taken(a0, b0, c0, d0)
    a1, b1, c1, d1 = _taken(a1, b1, c1, d1)
    a2, b2, c2, d2 = _taken(a2, b2, c2, d2)
    a3, b3, c3, d3 = _taken(a3, b3, c3, d3)
    to = out + (number * os)[:, None] + channel * oc
    a0, a1, a2, a3 = _taken(a0, a1, a2, a3)
    _four(to, there, step, a0, a1, a2, a3)
    b0, b1, b2, b3 = _taken(b0, b1, b2, b3)
    _four(to + 4 * step, there, step, b0, b1, b2, b3)
    c0, c1, c2, c3 = _taken(c0, c1, c2, c3)
    _four(to + 8 * step, there, step, c0, c1, c2, c3)
    d0, d1, d2, d3 = _taken(d0, d1, d2, d3)
    _four(to + 12 * step, there, step, d0, d1, d2, d3)


@triton.jit(do_not_specialize=["squares", "start", "step"])
def output_squares(
    products, out, squares, start, step, channels, rows, columns, height, width, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``out[image, channel, y, x]``, from ``products[i, channel, square]`` with strides `step` and `squares`."""
    number, image, y, z = _place(start, rows, columns, BS)
    step = step.to(tl.int64)
    channel = (tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC))[:, None]
    there = (number < squares)[None, :] & (channel < channels)
    at = products + channel * squares + number[None, :]
    a0, a1, a2, a3 = _load_four(at, there, step)
    b0, b1, b2, b3 = _load_four(at + 4 * step, there, step)
    c0, c1, c2, c3 = _load_four(at + 8 * step, there, step)
    d0, d1, d2, d3 = _load_four(at + 12 * step, there, step)
    a0, b0 = _gathered(a0, b0, c0, d0)
    a1, b1 = _gathered(a1, b1, c1, d1)
    a2, b2 = _gathered(a2, b2, c2, d2)
    a3, b3 = _gathered(a3, b3, c3, d3)
    a0, a1 = _gathered(a0, a1, a2, a3)
    b0, b1 = _gathered(b0, b1, b2, b3)
    y, z = y[None, :], z[None, :]
    to = out + (image[None, :] * channels + channel) * height * width + y * width + z
    right, down = z + 1 < width, y + 1 < height
    tl.store(to, a0, mask=there)
    tl.store(to + 1, a1, mask=there & right)
    tl.store(to + width, b0, mask=there & down)
    tl.store(to + width + 1, b1, mask=there & down & right)


@triton.jit
def _load_four(at, there, step):
    return (
        tl.load(at, mask=there, other=0.0),
        tl.load(at + step, mask=there, other=0.0),
        tl.load(at + 2 * step, mask=there, other=0.0),
        tl.load(at + 3 * step, mask=there, other=0.0),
    )


@triton.jit(do_not_specialize=["squares", "start", "step"])
def gradient_squares(
    dy, out, squares, start, step, channels, rows, columns, height, width, yn, yc, yh, yw,
    BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``out[i, channel, square]`` with strides `step` and `squares`, for `squares` squares from `start` on."""
    number, image, y, z = _place(start, rows, columns, BS)
    step = step.to(tl.int64)
    channel = (tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC))[:, None]
    there = (number < squares)[None, :] & (channel < channels)
    y, z = y[None, :], z[None, :]
    at = dy + image[None, :] * yn + channel * yc + y * yh + z * yw
    right, down = there & (z + 1 < width), there & (y + 1 < height)
    a0 = tl.load(at, mask=there, other=0.0)
    a1 = tl.load(at + yw, mask=right, other=0.0)
    b0 = tl.load(at + yh, mask=down, other=0.0)
    b1 = tl.load(at + yh + yw, mask=down & right, other=0.0)
    a0, b0, c0, d0 = _scattered(a0, b0)
    a1, b1, c1, d1 = _scattered(a1, b1)
    to = out + channel * squares + number[None, :]
    a0, a1, a2, a3 = _scattered(a0, a1)
    _four(to, there, step, a0, a1, a2, a3)
    b0, b1, b2, b3 = _scattered(b0, b1)
    _four(to + 4 * step, there, step, b0, b1, b2, b3)
    c0, c1, c2, c3 = _scattered(c0, c1)
    _four(to + 8 * step, there, step, c0, c1, c2, c3)
    d0, d1, d2, d3 = _scattered(d0, d1)
    _four(to + 12 * step, there, step, d0, d1, d2, d3)


@triton.jit
def weight_squares(w, out, rows, columns, wr, wc, wh, ww, first, BS: tl.constexpr):
    """``out[i, row, column]`` of ``w[row, column, 3, 3]`` with any strides, whose first value is number `first`."""
    place = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    size = tl.full((), rows, tl.int64) * columns
    there = place < size
    at = w + first + place // columns * wr + place % columns * wc
    a0, a1, a2 = _three(at, there, ww)
    b0, b1, b2 = _three(at + wh, there, ww)
    c0, c1, c2 = _three(at + 2 * wh, there, ww)
    a0, b0, c0, d0 = _spread(a0, b0, c0)
    a1, b1, c1, d1 = _spread(a1, b1, c1)
    a2, b2, c2, d2 = _spread(a2, b2, c2)
    a0, a1, a2, a3 = _spread(a0, a1, a2)
    _four(out + place, there, size, a0, a1, a2, a3)
    b0, b1, b2, b3 = _spread(b0, b1, b2)
    _four(out + place + 4 * size, there, size, b0, b1, b2, b3)
    c0, c1, c2, c3 = _spread(c0, c1, c2)
    _four(out + place + 8 * size, there, size, c0, c1, c2, c3)
    d0, d1, d2, d3 = _spread(d0, d1, d2)
    _four(out + place + 12 * size, there, size, d0, d1, d2, d3)


@triton.jit
def _three(at, there, step):
    return (
        tl.load(at, mask=there, other=0.0),
        tl.load(at + step, mask=there, other=0.0),
        tl.load(at + 2 * step, mask=there, other=0.0),
    )


@triton.jit
def gradient_of_squares(sums, out, size, BS: tl.constexpr):
    """``out[place, 3, 3]`` of ``sums[i, place]``."""
    place = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    size = tl.full((), size, tl.int64)
    there = place < size
    a0, a1, a2, a3 = _load_four(sums + place, there, size)
    b0, b1, b2, b3 = _load_four(sums + place + 4 * size, there, size)
    c0, c1, c2, c3 = _load_four(sums + place + 8 * size, there, size)
    d0, d1, d2, d3 = _load_four(sums + place + 12 * size, there, size)
    a0, b0, c0 = _collected(a0, b0, c0, d0)
    a1, b1, c1 = _collected(a1, b1, c1, d1)
    a2, b2, c2 = _collected(a2, b2, c2, d2)
    a3, b3, c3 = _collected(a3, b3, c3, d3)
    to = out + place * 9
    a0, a1, a2 = _collected(a0, a1, a2, a3)
    tl.store(to, a0, mask=there)
    tl.store(to + 1, a1, mask=there)
    tl.store(to + 2, a2, mask=there)
    b0, b1, b2 = _collected(b0, b1, b2, b3)
    tl.store(to + 3, b0, mask=there)
    tl.store(to + 4, b1, mask=there)
    tl.store(to + 5, b2, mask=there)
    c0, c1, c2 = _collected(c0, c1, c2, c3)
    tl.store(to + 6, c0, mask=there)
    tl.store(to + 7, c1, mask=there)
    tl.store(to + 8, c2, mask=there)
