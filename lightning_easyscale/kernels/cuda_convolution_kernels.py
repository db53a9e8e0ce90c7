"""Convolutions of the format as Triton kernels that gather their operands instead of unfolding them in memory.

Tile sizes are free, as in `cuda_kernels.py`, and launches have the same rules. There are two spatial dimensions, and
offsets are 32-bit numbers. A sum over k keeps two levels in registers: the present segment and what was before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cuda_kernels import BLOCK, SEGMENT


@triton.jit
def _tile(m, n, BM: tl.constexpr, BN: tl.constexpr):
    """Rows and columns of this program; neighbours share columns, whose gathered operand is the larger one."""
    tiles = tl.cdiv(m, BM)
    rows = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    cols = (tl.program_id(0) // tiles) * BN + tl.arange(0, BN)
    return rows, cols


@triton.jit(do_not_specialize=["m", "n", "depth", "blocks", "pixels"])
def forward(
    x, w, out, m, n, depth, blocks, channels, height, width, pixels, out_width, xn, xc, xh, xw, stride_h, stride_w,
    pad_h, pad_w, dilation_h, dilation_w, KW: tl.constexpr, WHOLE: tl.constexpr, FLAT: tl.constexpr,
    ALIGNED: tl.constexpr, DEEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``out[block, image, group, row, pixel]``, from ``w[group, row, (tap, channel)]``; grid (tiles, groups * blocks).

    `channels`, `m`: input and output channels of a group; `n`: images times pixels. `WHOLE`: BK divides `channels`, or
    there is one tap. `FLAT`: each pixel is made from the pixel in its place. `ALIGNED` divides the number of pixels,
    `DEEP` the depth. Gathered tiles are loaded columns first, which was found to be faster.
    """
    n, pixels, depth = n // ALIGNED * ALIGNED, pixels // ALIGNED * ALIGNED, depth // DEEP * DEEP
    rows, cols = _tile(m, n, BM, BN)
    group, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    groups = tl.num_programs(1) // blocks
    image, pixel = cols // pixels, cols % pixels
    top, left = (pixel // out_width) * stride_h - pad_h, (pixel % out_width) * stride_w - pad_w
    start = block * BLOCK
    end = tl.minimum(start + BLOCK, depth)
    a_rows = w + (group * m + rows)[:, None] * depth
    x_cols = x + image * xn + group * channels * xc
    total = tl.zeros([BM, BN], tl.float32)
    chain = tl.zeros([BM, BN], tl.float32)
    for first in range(start, end, BK):
        ks = first + tl.arange(0, BK)
        a = tl.load(a_rows + ks[None, :], mask=(rows[:, None] < m) & (ks[None, :] < end), other=0.0)
        if FLAT:
            at = x_cols + pixel
            b = tl.load(at[None, :] + (ks * xc)[:, None], mask=(cols < n)[None, :] & (ks < end)[:, None], other=0.0)
        elif WHOLE:
            tap = first // channels
            c = first % channels + tl.arange(0, BK)
            y, z = top + (tap // KW) * dilation_h, left + (tap % KW) * dilation_w
            there = (y >= 0) & (y < height) & (z >= 0) & (z < width) & (cols < n)
            at = x_cols + y * xh + z * xw
            b = tl.load(at[:, None] + (c * xc)[None, :], mask=there[:, None] & (ks < end)[None, :], other=0.0)
            b = tl.trans(b)
        else:
            tap, c = ks // channels, ks % channels
            y = top[:, None] + ((tap // KW) * dilation_h)[None, :]
            z = left[:, None] + ((tap % KW) * dilation_w)[None, :]
            there = (y >= 0) & (y < height) & (z >= 0) & (z < width) & (cols < n)[:, None] & (ks < end)[None, :]
            b = tl.load(x_cols[:, None] + (y * xh + z * xw + (c * xc)[None, :]), mask=there, other=0.0)
            b = tl.trans(b)
        chain = tl.dot(a, b, chain, input_precision="ieee")
        if (first + BK) % SEGMENT == 0:
            total += chain
            chain = tl.zeros([BM, BN], tl.float32)
    total += chain
    place = out + block * groups * m * n + (image * groups + group) * m * pixels + pixel
    tl.store(place[None, :] + (rows * pixels)[:, None], total, mask=(rows[:, None] < m) & (cols[None, :] < n))


@triton.jit(do_not_specialize=["m", "n", "depth", "taps", "places"])
def input_gradient(
    dy, w, out, m, n, depth, taps, all_taps, places, rows_w, height, width, out_height, out_width,
    pad_h, pad_w, dilation_h, dilation_w, kernel_w, first_h, first_w, tap_h, tap_w, step_h, step_w, taps_w,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, LONG: tl.constexpr, FLAT: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``out[image, group, row, y, x]`` at ``y = first_h + i * STRIDE_H``, and x likewise; grid (tiles, groups).

    From ``w[group, tap, k, row]``. `m`, `depth`: input and output channels of a group; `n`: images times `places`, in
    rows of `rows_w`, which `taps` of all kernel positions reach: every `step_h`-th from `tap_h`, and so on. `LONG`:
    `depth` is longer than a segment. `FLAT`, `ALIGNED`: as in `forward`, the latter of places. `ROWS` divides m.
    """
    n, places, m = n // ALIGNED * ALIGNED, places // ALIGNED * ALIGNED, m // ROWS * ROWS
    rows, cols = _tile(m, n, BM, BN)
    group, groups = tl.program_id(1), tl.num_programs(1)
    image, place = cols // places, cols % places
    y, z = first_h + (place // rows_w) * STRIDE_H, first_w + (place % rows_w) * STRIDE_W
    pixels = out_height * out_width
    dy_cols = dy + (image * groups + group) * depth * pixels
    steps = tl.cdiv(depth, BK)
    result = tl.zeros([BM, BN], tl.float32)
    total = tl.zeros([BM, BN], tl.float32)
    chain = tl.zeros([BM, BN], tl.float32)
    for step in range(0, taps * steps):
        number, first = step // steps, (step % steps) * BK
        kh, kw = tap_h + (number // taps_w) * step_h, tap_w + (number % taps_w) * step_w
        up, over = y + pad_h - kh * dilation_h, z + pad_w - kw * dilation_w
        i, j = up // STRIDE_H, over // STRIDE_W
        there = cols < n
        if not FLAT:
            there = there & (up >= 0) & (i < out_height) & (over >= 0) & (j < out_width)
        ks = first + tl.arange(0, BK)
        weights = w + (group * all_taps + kh * kernel_w + kw) * depth * m
        a = tl.load(
            weights + ks[None, :] * m + rows[:, None], mask=(rows[:, None] < m) & (ks[None, :] < depth), other=0.0
        )
        if FLAT:
            at = dy_cols + place
            b = tl.load(at[None, :] + (ks * places)[:, None], mask=there[None, :] & (ks < depth)[:, None], other=0.0)
        else:
            at = dy_cols + i * out_width + j
            b = tl.load(at[:, None] + (ks * pixels)[None, :], mask=there[:, None] & (ks < depth)[None, :], other=0.0)
            b = tl.trans(b)
        chain = tl.dot(a, b, chain, input_precision="ieee")
        if LONG:
            if (first + BK) % SEGMENT == 0 or first + BK >= depth:
                total += chain
                chain = tl.zeros([BM, BN], tl.float32)
            if first + BK >= depth:
                result += tl.where(there[None, :], total, 0.0)
                total = tl.zeros([BM, BN], tl.float32)
        else:
            if first + BK >= depth:
                result += tl.where(there[None, :], chain, 0.0)
                chain = tl.zeros([BM, BN], tl.float32)
    size = places if FLAT else height * width
    target = out + (image * groups + group) * m * size + (place if FLAT else y * width + z)
    tl.store(target[None, :] + (rows * size)[:, None], result, mask=(rows[:, None] < m) & (cols[None, :] < n))


@triton.jit(do_not_specialize=["m", "n", "depth", "blocks", "skip"])
def weight_gradient(
    x, dy, out, m, n, depth, blocks, skip, channels, height, width, out_width, pixels, xn, xc, xh, xw, dn, dc, dp,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, kernel_w,
    WHOLE: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``out[group, block, row, (tap, channel)]``: sums of SPAN values of k, which runs over images, then pixels.

    `m`, `channels`: output and input channels of a group; grid (tiles, groups * blocks), whose first block is `skip`.
    `WHOLE`: BK divides `pixels`. `ROWS` divides m, `COLS` divides `channels`; neighbours are next to each other.
    """
    m, n, channels = m // ROWS * ROWS, n // COLS * COLS, channels // COLS * COLS
    rows, cols = _tile(m, n, BM, BN)
    group, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks + skip
    start = block * SPAN
    end = tl.minimum(start + SPAN, depth)
    tap, c = cols // channels, cols % channels
    top, left = (tap // kernel_w) * dilation_h - pad_h, (tap % kernel_w) * dilation_w - pad_w
    x_cols = x + (group * channels + c) * xc
    dy_rows = dy + (group * m + rows) * dc
    total = tl.zeros([BM, BN], tl.float32)
    chain = tl.zeros([BM, BN], tl.float32)
    for first in range(start, end, BK):
        if WHOLE:
            image = first // pixels
            pixel = first % pixels + tl.arange(0, BK)
        else:
            image = (first + tl.arange(0, BK)) // pixels
            pixel = (first + tl.arange(0, BK)) % pixels
        inside = first + tl.arange(0, BK) < end
        a = tl.load(
            dy_rows[:, None] + (image * dn + pixel * dp)[None, :], mask=(rows[:, None] < m) & inside[None, :], other=0.0
        )
        y = ((pixel // out_width) * stride_h)[:, None] + top[None, :]
        z = ((pixel % out_width) * stride_w)[:, None] + left[None, :]
        there = (y >= 0) & (y < height) & (z >= 0) & (z < width) & inside[:, None] & (cols < n)[None, :]
        images = image * xn + tl.zeros([BK], tl.int32)
        b = tl.load(x_cols[None, :] + (images[:, None] + y * xh + z * xw), mask=there, other=0.0)
        chain = tl.dot(a, b, chain, input_precision="ieee")
        if (first + BK) % SEGMENT == 0:
            total += chain
            chain = tl.zeros([BM, BN], tl.float32)
    total += chain
    place = out + tl.program_id(1).to(tl.int64) * m * n + rows[:, None] * n + cols[None, :]
    tl.store(place, total, mask=(rows[:, None] < m) & (cols[None, :] < n))


@triton.jit(do_not_specialize=["n", "taps"])
def depthwise_forward(
    x, w, out, n, taps, channels, height, width, out_height, out_width, xn, xc, xh, xw, stride_h, stride_w,
    pad_h, pad_w, dilation_h, dilation_w, kernel_w, W: tl.constexpr,
):  # fmt: skip
    """``out[image, channel, pixel]``, `n` elements, where each channel is a group; grid (strips)."""
    at = tl.program_id(0) * W + tl.arange(0, W)
    pixels = out_height * out_width
    plane, pixel = at // pixels, at % pixels
    image, channel = plane // channels, plane % channels
    top, left = (pixel // out_width) * stride_h - pad_h, (pixel % out_width) * stride_w - pad_w
    chain = tl.zeros([W], tl.float32)
    for tap in range(0, taps):
        y, z = top + (tap // kernel_w) * dilation_h, left + (tap % kernel_w) * dilation_w
        there = (y >= 0) & (y < height) & (z >= 0) & (z < width) & (at < n)
        weight = tl.load(w + channel * taps + tap, mask=at < n, other=0.0)
        chain = tl.fma(tl.load(x + image * xn + channel * xc + y * xh + z * xw, mask=there, other=0.0), weight, chain)
    tl.store(out + at, chain + 0.0, mask=at < n)


@triton.jit(do_not_specialize=["n", "taps"])
def depthwise_input_gradient(
    dy, w, out, n, taps, channels, height, width, out_height, out_width, dn, dc, dh, dw, pad_h, pad_w,
    dilation_h, dilation_w, kernel_w, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """``out[image, channel, y, x]``, `n` elements, where each channel is a group; grid (strips)."""
    at = tl.program_id(0) * W + tl.arange(0, W)
    plane, place = at // (height * width), at % (height * width)
    image, channel = plane // channels, plane % channels
    y, z = place // width, place % width
    result = tl.zeros([W], tl.float32)
    for tap in range(0, taps):
        up, over = y + pad_h - (tap // kernel_w) * dilation_h, z + pad_w - (tap % kernel_w) * dilation_w
        i, j = up // STRIDE_H, over // STRIDE_W
        there = (up >= 0) & (i * STRIDE_H == up) & (i < out_height) & (over >= 0) & (j * STRIDE_W == over)
        there = there & (j < out_width) & (at < n)
        weight = tl.load(w + channel * taps + tap, mask=at < n, other=0.0)
        gradient = tl.load(dy + image * dn + channel * dc + i * dh + j * dw, mask=there, other=0.0)
        result += tl.where(there, gradient * weight, 0.0)
    tl.store(out + at, result, mask=at < n)


@triton.jit(do_not_specialize=["depth"])
def depthwise_weight_gradient(
    x, dy, out, depth, taps, channels, height, width, out_width, pixels, xn, xc, xh, xw, dn, dc, dh, dw,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, kernel_w, T: tl.constexpr, S: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """``out[segment, channel, tap]``: chains of the segments of k; grid (channels / W, segments / S).

    A program computes all `taps`, at most T, so that it finds out once where each k is.
    """
    tap = tl.arange(0, T)[:, None, None]
    segment = tl.program_id(1) * S + tl.arange(0, S)[None, :, None]
    channel = tl.program_id(0) * W + tl.arange(0, W)[None, None, :]
    top, left = (tap // kernel_w) * dilation_h - pad_h, (tap % kernel_w) * dilation_w - pad_w
    chain = tl.zeros([T, S, W], tl.float32)
    for i in range(0, tl.minimum(depth, SEGMENT)):
        k = segment * SEGMENT + i
        inside = (k < depth) & (channel < channels)
        image, pixel = k // pixels, k % pixels
        row, column = pixel // out_width, pixel % out_width
        y, z = row * stride_h + top, column * stride_w + left
        there = inside & (tap < taps) & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        gradient = tl.load(dy + channel * dc + (image * dn + row * dh + column * dw), mask=inside, other=0.0)
        value = tl.load(x + channel * xc + (image * xn + y * xh + z * xw), mask=there, other=0.0)
        chain = tl.fma(tl.broadcast_to(gradient, [T, S, W]), value, chain)
    place = out + (segment * channels + channel) * taps + tap
    tl.store(place, chain + 0.0, mask=(segment * SEGMENT < depth) & (tap < taps) & (channel < channels))
