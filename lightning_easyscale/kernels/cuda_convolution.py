"""Convolutions on CUDA tensors: how the Triton kernels of `cuda_convolution_kernels.py` are launched."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from . import cuda_convolution_kernels as kernels
from .cuda import Tiles, blocks_of, fold, fold_spans, launch_options, pick, span_of
from .cuda_kernels import BLOCK, SEGMENT

if TYPE_CHECKING:
    from .convolution import Geometry

_LIMIT = 2**31 - 2**20  # elements that 32-bit offsets reach, tiles that stick out included
_PARTIAL = 1 << 27  # elements of blocks' sums that are kept at once


def takes(g: Geometry) -> bool:
    """Whether these kernels compute a convolution of this geometry."""
    size = max(math.prod(g.spatial) * g.channels, g.pixels * g.out_channels) * g.batch
    per = g.out_channels // g.groups
    return len(g.kernel) == 2 and 0 < size < _LIMIT and g.taps * per * g.channels < _LIMIT and 0 < per <= BLOCK.value


def _depthwise(g: Geometry) -> bool:
    """Whether each channel is a group: too little for tiles of products."""
    return g.groups > 1 and g.channels == g.groups == g.out_channels and g.taps <= SEGMENT.value


def _flat(g: Geometry) -> bool:
    """Whether each pixel comes from the pixel in its place."""
    return g.taps == 1 and all(s == 1 for s in g.stride) and not any(g.padding)


def forward(x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    """``[N, OC, OH, OW]`` of ``[N, C, H, W]`` with any strides and ``[OC, C / groups, KH, KW]``."""
    out = x.new_empty(g.batch, g.out_channels, *g.out)
    if _depthwise(g):
        place = (*g.spatial, *g.out, *x.stride(), *g.stride, *g.padding, *g.dilation)
        t = pick("depthwise", out.numel())
        grid = (blocks_of(out.numel(), t.width),)
        kernels.depthwise_forward[grid](
            *(x, weight.contiguous(), out, out.numel(), g.taps, g.channels),
            *(*place, g.kernel[1]),
            W=t.width,
            **launch_options(t),
        )
        return out
    flat = _flat(g) and x.stride()[2:] == (g.spatial[1], 1)
    place = (*g.spatial, g.pixels, g.out[1], *x.stride(), *g.stride, *g.padding, *g.dilation)
    m, n, per = g.out_channels // g.groups, g.batch * g.pixels, g.channels // g.groups
    t, blocks = pick("forward", m, n), blocks_of(g.depth, BLOCK.value)
    made = out if blocks == 1 else x.new_empty(blocks, *out.shape)
    kernels.forward[_grid(m, n, t), g.groups * blocks](
        *(x, g.weight_matrix(weight), made, m, n, g.depth, blocks, per, *place),
        **{"KW": g.kernel[1], "WHOLE": per % t.k == 0 or g.taps == 1, "FLAT": flat},
        **{"ALIGNED": math.gcd(g.pixels, 16), "DEEP": math.gcd(g.depth, 16)},
        **_tiles(t),
    )
    return out if blocks == 1 else fold(made.view(1, blocks, -1)).view(out.shape)


def input_gradient(dy: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    """``[N, C, H, W]`` of ``[N, OC, OH, OW]`` and the weight."""
    if _depthwise(g):
        out = dy.new_empty(g.batch, g.channels, *g.spatial)
        t = pick("depthwise", out.numel())
        kernels.depthwise_input_gradient[(blocks_of(out.numel(), t.width),)](
            *(dy, weight.contiguous(), out, out.numel(), g.taps, g.channels, *g.spatial, *g.out, *dy.stride()),
            *(*g.stride, *g.padding, *g.dilation, g.kernel[1]),
            W=t.width,
            **launch_options(t),
        )
        return out
    dy = dy.contiguous()
    m, depth = g.channels // g.groups, g.out_channels // g.groups
    # [groups, taps, output channels, input channels]
    matrix = weight.reshape(g.groups, depth, m, g.taps).permute(0, 3, 1, 2).contiguous()
    everywhere = all(s == 1 for s in g.stride)
    out = (dy.new_empty if everywhere else dy.new_zeros)(g.batch, g.channels, *g.spatial)
    for first_h in range(min(g.stride[0], g.spatial[0])):
        for first_w in range(min(g.stride[1], g.spatial[1])):
            tap_h, step_h, taps_h = _reached_by(first_h, 0, g)
            tap_w, step_w, taps_w = _reached_by(first_w, 1, g)
            if taps_h * taps_w == 0:
                continue
            rows_h, rows_w = (
                blocks_of(g.spatial[0] - first_h, g.stride[0]),
                blocks_of(g.spatial[1] - first_w, g.stride[1]),
            )
            n = g.batch * rows_h * rows_w
            t = pick("input_gradient", m, n)
            kernels.input_gradient[_grid(m, n, t), g.groups](
                *(dy, matrix, out, m, n, depth, taps_h * taps_w, g.taps, rows_h * rows_w, rows_w, *g.spatial, *g.out),
                *(*g.stride, *g.padding, *g.dilation, g.kernel[1], first_h, first_w),
                *(tap_h, tap_w, step_h, step_w, taps_w),
                **{"LONG": depth > SEGMENT.value, "FLAT": _flat(g), "ALIGNED": math.gcd(rows_h * rows_w, 16)},
                ROWS=math.gcd(m, 16),
                **_tiles(t),
            )
    return out


def _reached_by(first: int, dim: int, g: Geometry) -> tuple[int, int, int]:
    """Kernel positions that reach the places ``first + i * stride``: the first, the step to the next, and how many."""
    size, stride, dilation = g.kernel[dim], g.stride[dim], g.dilation[dim]
    found = [k for k in range(size) if (first + g.padding[dim] - k * dilation) % stride == 0]
    return (found[0], stride // math.gcd(stride, dilation), len(found)) if found else (0, 1, 0)


def weight_gradient(x: Tensor, dy: Tensor, g: Geometry) -> Tensor:
    """``[OC, C / groups, KH, KW]`` of ``[N, C, H, W]`` and ``[N, OC, OH, OW]``."""
    x, dy = (v.permute(0, 2, 3, 1).contiguous() for v in (x, dy))  # channels last, which tiles run along
    per, m, depth = g.channels // g.groups, g.out_channels // g.groups, g.batch * g.pixels
    n, c, oc = g.taps * per, g.channels, g.out_channels
    x_strides = (g.spatial[0] * g.spatial[1] * c, 1, g.spatial[1] * c, c)
    place = (*g.stride, *g.padding, *g.dilation, g.kernel[1])
    if _depthwise(g):
        segments, each = blocks_of(depth, SEGMENT.value), BLOCK.value // SEGMENT.value
        sums = x.new_zeros(blocks_of(segments, each) * each, g.taps, c)
        t = pick("depthwise", c)
        kernels.depthwise_weight_gradient[blocks_of(c, 32), blocks_of(segments, 8), g.taps](
            *(x, dy, sums, depth, c, *g.spatial, g.out[1], g.pixels, *x_strides),
            *(g.pixels * oc, 1, g.out[1] * oc, oc, *place),
            **{"S": 8, "W": 32},
            **launch_options(t),
        )
        folded = fold(fold(sums.view(-1, each, g.taps * c))[None])
        return folded.view(g.taps, c).t().reshape(c, 1, *g.kernel)
    t = pick("weight_gradient", m, n)
    span = span_of(depth, g.groups * _grid(m, n, t))
    blocks, each = blocks_of(depth, span), BLOCK.value // span
    at_once = max(1, _PARTIAL // (g.groups * m * n * each)) * each
    total: Tensor | None = None
    for skip in range(0, blocks, at_once):
        there = min(at_once, blocks - skip)
        sums = x.new_empty(g.groups, there, m * n)
        kernels.weight_gradient[_grid(m, n, t), g.groups * there](
            *(x, dy, sums, m, n, depth, there, skip, per, *g.spatial, g.out[1], g.pixels, *x_strides),
            *(g.pixels * oc, 1, oc, *place),
            **{"WHOLE": g.pixels % t.k == 0, "SPAN": span, "ROWS": math.gcd(m, 16), "COLS": math.gcd(per, 16)},
            **_tiles(t),
        )
        total = fold_spans(sums, each, total)
    assert total is not None
    return total.view(oc, *g.kernel, per).permute(0, 3, 1, 2).contiguous()


def _grid(m: int, n: int, t: Tiles) -> int:
    return blocks_of(m, t.m) * blocks_of(n, t.n)


def _tiles(t: Tiles) -> dict[str, int | bool]:
    return {"BM": t.m, "BN": t.n, "BK": t.k, **launch_options(t)}
