"""Convolutions on CUDA tensors: how the Triton kernels of `cuda_convolution_kernels.py` are launched."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import cuda_convolution_kernels as kernels
from . import tuning
from .cuda import fold, span_of
from .cuda_kernels import BLOCK, SEGMENT
from .launch import Launch
from .plans import planned
from .tiles import Tiles, blocks_of, pick, power_of_two

if TYPE_CHECKING:
    from .convolution import Geometry

_LIMIT = 2**31 - 2**20  # elements that 32-bit offsets reach, tiles that stick out included
_LARGE = 1 << 29  # multiply-adds that take longer than copies
_PARTIAL = 1 << 27  # elements of blocks' sums that are kept at once


@planned
def takes(g: Geometry) -> bool:
    """Whether these kernels compute a convolution of this geometry."""
    size = max(math.prod(g.spatial) * g.channels, g.pixels * g.out_channels) * g.batch
    per = g.out_channels // g.groups
    return len(g.kernel) == 2 and 0 < size < _LIMIT and g.taps * per * g.channels < _LIMIT and 0 < per <= BLOCK.value


@planned
def _depthwise(g: Geometry) -> bool:
    """Whether each channel is a group: too little for tiles of products."""
    return g.groups > 1 and g.channels == g.groups == g.out_channels and g.taps <= SEGMENT.value


def _flat(g: Geometry) -> bool:
    """Whether each pixel comes from the pixel in its place."""
    return g.taps == 1 and all(s == 1 for s in g.stride) and not any(g.padding)


@planned
def _in_fours(g: Geometry) -> Geometry | None:
    """For large flat convolutions of images that cannot be loaded four pixels at a time: with images in which they can.

    Copies with some more pixels cost much less.
    """
    if not _flat(g) or g.pixels % 4 == 0 or g.pixels < 16 or g.batch * g.pixels * g.depth * g.out_channels < _LARGE:
        return None
    images = (g.batch, g.channels, 1, blocks_of(g.pixels, 4) * 4)
    return type(g)(images, (g.out_channels, g.channels // g.groups, 1, 1), (1, 1), (0, 0), (1, 1), g.groups)


def _widened(x: Tensor, g: Geometry, wide: Geometry) -> Tensor:
    return torch.constant_pad_nd(x.reshape(g.batch, -1, 1, g.pixels), [0, wide.pixels - g.pixels])


def _matrix(weight: Tensor, g: Geometry) -> Tensor:
    """The weight with its channels last; the taps are already where there is one channel or one tap."""
    return weight.contiguous() if g.depth in (g.taps, weight.shape[1]) else g.weight_matrix(weight)


def forward(x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    """``[N, OC, OH, OW]`` of ``[N, C, H, W]`` with any strides and ``[OC, C / groups, KH, KW]``."""
    if (wide := _in_fours(g)) is not None:
        made = forward(_widened(x, g, wide), weight, wide)
        return made[..., : g.pixels].reshape(g.batch, -1, *g.out)
    if _depthwise(g):
        out = x.new_empty(g.batch, g.out_channels, *g.out)
        _depthwise_forward(g, x.stride())(x, weight.contiguous(), out)
        return out
    if tuning.wanted:
        m, n = g.out_channels // g.groups, g.batch * g.pixels
        tuning.tune(("forward", m, n, g.depth), lambda: forward(x, weight, g), batch=g.groups, taps=g.taps)
    launch, blocks = _forward(g, x.stride())
    if blocks == 1:
        out = x.new_empty(g.batch, g.out_channels, *g.out)
        launch(x, _matrix(weight, g), out)
        return out
    made = x.new_empty(blocks, g.batch, g.out_channels, *g.out)
    launch(x, _matrix(weight, g), made)
    return fold(made.view(1, blocks, -1)).view(made.shape[1:])


@planned
def _depthwise_forward(g: Geometry, strides: tuple[int, ...]) -> Launch:
    n = g.batch * g.out_channels * g.pixels
    t = pick("depthwise", n)
    place = (*g.spatial, *g.out, *strides, *g.stride, *g.padding, *g.dilation, g.kernel[1])
    return _strips(kernels.depthwise_forward, n, (n, g.taps, g.channels, *place), t)


@planned
def _forward(g: Geometry, strides: tuple[int, ...]) -> tuple[Launch, int]:
    """The launch, and into how many blocks it cuts k."""
    flat = _flat(g) and strides[2:] == (g.spatial[1], 1)
    place = (*g.spatial, g.pixels, g.out[1], *strides, *g.stride, *g.padding, *g.dilation)
    m, n, per = g.out_channels // g.groups, g.batch * g.pixels, g.channels // g.groups
    t = pick("forward", m, n, g.depth, batch=g.groups, taps=g.taps)
    blocks = blocks_of(g.depth, BLOCK.value)
    whole = per % t.k == 0 or g.taps == 1
    launch = Launch(
        kernels.forward,
        (_programs(m, n, t), g.groups * blocks),
        (m, n, g.depth, blocks, per, *place),
        (g.kernel[1], whole, flat, math.gcd(g.pixels, 16), math.gcd(g.depth, 16), t.m, t.n, t.k),
        t.warps,
        t.stages,
    )
    return launch, blocks


def input_gradient(dy: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    """``[N, C, H, W]`` of ``[N, OC, OH, OW]`` and the weight."""
    if (wide := _in_fours(g)) is not None:
        made = input_gradient(_widened(dy, g, wide), weight, wide)
        return made[..., : g.pixels].reshape(g.batch, -1, *g.spatial)
    if _depthwise(g):
        out = dy.new_empty(g.batch, g.channels, *g.spatial)
        _depthwise_input_gradient(g, dy.stride())(dy, weight.contiguous(), out)
        return out
    dy = dy.contiguous()
    if tuning.wanted:
        for phase in _phases(g):
            launch = ("input_gradient", g.channels // g.groups, phase.n, g.out_channels // g.groups)
            tuning.tune(launch, lambda: input_gradient(dy, weight, g), batch=g.groups, taps=phase.taps)
    m, depth = g.channels // g.groups, g.out_channels // g.groups
    matrix = weight  # [groups, taps, output channels, input channels]
    if g.taps > 1:
        matrix = weight.reshape(g.groups, depth, m, g.taps).permute(0, 3, 1, 2)
    matrix = matrix.contiguous()
    everywhere = all(s == 1 for s in g.stride)
    out = (dy.new_empty if everywhere else dy.new_zeros)(g.batch, g.channels, *g.spatial)
    for phase in _phases(g):
        phase.launch(dy, matrix, out)
    return out


@planned
def _depthwise_input_gradient(g: Geometry, strides: tuple[int, ...]) -> Launch:
    n = g.batch * g.channels * math.prod(g.spatial)
    t = pick("depthwise", n)
    place = (*g.spatial, *g.out, *strides, *g.padding, *g.dilation, g.kernel[1])
    return _strips(kernels.depthwise_input_gradient, n, (n, g.taps, g.channels, *place), t, g.stride)


class _Phase(NamedTuple):
    """The places of an input that lie a stride apart: their launch, how many there are, and the taps that reach one."""

    launch: Launch
    n: int
    taps: int


@planned
def _phases(g: Geometry) -> list[_Phase]:
    m, depth = g.channels // g.groups, g.out_channels // g.groups
    found = []
    for first_h in range(min(g.stride[0], g.spatial[0])):
        for first_w in range(min(g.stride[1], g.spatial[1])):
            tap_h, step_h, taps_h = _reached_by(first_h, 0, g)
            tap_w, step_w, taps_w = _reached_by(first_w, 1, g)
            taps = taps_h * taps_w
            if taps == 0:
                continue
            rows_w = blocks_of(g.spatial[1] - first_w, g.stride[1])
            places = blocks_of(g.spatial[0] - first_h, g.stride[0]) * rows_w
            n = g.batch * places
            t = pick("input_gradient", m, n, depth, batch=g.groups, taps=taps)
            launch = Launch(
                kernels.input_gradient,
                (_programs(m, n, t), g.groups),
                (
                    *(m, n, depth, taps, g.taps, places, rows_w, *g.spatial, *g.out),
                    *(*g.padding, *g.dilation, g.kernel[1], first_h, first_w),
                    *(tap_h, tap_w, step_h, step_w, taps_w),
                ),
                (*g.stride, depth > SEGMENT.value, _flat(g), math.gcd(places, 16), math.gcd(m, 16), t.m, t.n, t.k),
                t.warps,
                t.stages,
            )
            found.append(_Phase(launch, n, taps))
    return found


def _reached_by(first: int, dim: int, g: Geometry) -> tuple[int, int, int]:
    """Kernel positions that reach the places ``first + i * stride``: the first, the step to the next, and how many."""
    size, stride, dilation = g.kernel[dim], g.stride[dim], g.dilation[dim]
    found = [k for k in range(size) if (first + g.padding[dim] - k * dilation) % stride == 0]
    return (found[0], stride // math.gcd(stride, dilation), len(found)) if found else (0, 1, 0)


def weight_gradient(x: Tensor, dy: Tensor, g: Geometry) -> Tensor:
    """``[OC, C / groups, KH, KW]`` of ``[N, C, H, W]`` and ``[N, OC, OH, OW]``."""
    last = torch.channels_last  # which tiles run along
    x, dy = x.contiguous(memory_format=last), dy.contiguous(memory_format=last)
    if _depthwise(g):
        return _depthwise_weight_gradient(x, dy, g)
    m, per = g.out_channels // g.groups, g.channels // g.groups
    if tuning.wanted:
        launch = ("weight_gradient", m, g.taps * per, g.batch * g.pixels)
        tuning.tune(launch, lambda: _weight_gradient(x, dy, g), batch=g.groups, taps=g.taps)
    total = _weight_gradient(x, dy, g)
    if g.taps == 1 or per == 1:
        return total.view(g.out_channels, per, *g.kernel)
    return total.view(g.out_channels, *g.kernel, per).permute(0, 3, 1, 2).contiguous()


def _weight_gradient(x: Tensor, dy: Tensor, g: Geometry) -> Tensor:
    """``[groups, rows * (taps, channels)]`` of operands in channels-last order."""
    parts, each = _weight_gradient_parts(g)
    total: Tensor | None = None
    for launch, shape in parts:
        sums = x.new_empty(shape)
        launch(x, dy, sums)
        total = fold(sums, each, total)
    assert total is not None
    return total


@planned
def _weight_gradient_parts(g: Geometry) -> tuple[list[tuple[Launch, tuple[int, int, int]]], int]:
    """Launches one after the other, each with the shape of its spans' sums, and how many spans are a block."""
    m, per, depth = g.out_channels // g.groups, g.channels // g.groups, g.batch * g.pixels
    n, oc = g.taps * per, g.out_channels
    t = pick("weight_gradient", m, n, depth, batch=g.groups, taps=g.taps)
    programs = _programs(m, n, t)
    span = span_of(depth, g.groups * programs, g.groups * m * n)
    blocks, each = blocks_of(depth, span), BLOCK.value // span
    at_once = max(1, _PARTIAL // (g.groups * m * n * each)) * each
    place = (g.pixels * oc, 1, oc, *g.stride, *g.padding, *g.dilation, g.kernel[1])
    parts = []
    for skip in range(0, blocks, at_once):
        there = min(at_once, blocks - skip)
        numbers = (m, n, depth, there, skip, per, *g.spatial, g.out[1], g.pixels, *_last_strides(g), *place)
        constants = (g.pixels % t.k == 0, span, math.gcd(m, 16), math.gcd(per, 16), t.m, t.n, t.k)
        grid = (programs, g.groups * there)
        launch = Launch(kernels.weight_gradient, grid, numbers, constants, t.warps, t.stages)
        parts.append((launch, (g.groups, there, m * n)))
    return parts, each


def _last_strides(g: Geometry) -> tuple[int, int, int, int]:
    """Strides of an input in channels-last order."""
    return g.spatial[0] * g.spatial[1] * g.channels, 1, g.spatial[1] * g.channels, g.channels


def _depthwise_weight_gradient(x: Tensor, dy: Tensor, g: Geometry) -> Tensor:
    segments = blocks_of(g.batch * g.pixels, SEGMENT.value)
    sums = x.new_empty(1, segments, g.channels * g.taps)
    _depthwise_segments(g)(x, dy, sums)
    return fold(sums, BLOCK.value // SEGMENT.value).view(g.channels, 1, *g.kernel)


@planned
def _depthwise_segments(g: Geometry) -> Launch:
    depth, c, oc = g.batch * g.pixels, g.channels, g.out_channels
    t = pick("depthwise", c)
    place = (g.pixels * oc, 1, g.out[1] * oc, oc, *g.stride, *g.padding, *g.dilation, g.kernel[1])
    numbers = (depth, g.taps, c, *g.spatial, g.out[1], g.pixels, *_last_strides(g), *place)
    taps = power_of_two(g.taps)
    segments = max(1, 32 // taps)  # of a program
    grid = (blocks_of(c, 32), blocks_of(blocks_of(depth, SEGMENT.value), segments))
    return Launch(kernels.depthwise_weight_gradient, grid, numbers, (taps, segments, 32), t.warps, t.stages)


def _strips(kernel: object, n: int, numbers: tuple[int, ...], t: Tiles, constants: tuple[int, ...] = ()) -> Launch:
    """A launch over n elements in strips."""
    return Launch(kernel, (blocks_of(n, t.width),), numbers, (*constants, t.width), t.warps, t.stages)


def _programs(m: int, n: int, t: Tiles) -> int:
    return blocks_of(m, t.m) * blocks_of(n, t.n)
