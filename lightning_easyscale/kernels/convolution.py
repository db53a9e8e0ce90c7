"""Convolutions as products of the format.

A convolution is the product of its weight with the unfolded input, whose k runs over kernel positions (row-major), then
channels; the zeros of the padding are operands like others. Its input gradient is, for each kernel position, a product
over output channels; the positions are added in ascending order. Its weight gradient is one product whose k runs over
images, then output positions. Here the input is unfolded in memory; `cuda_convolution.py` does without. 3x3 kernels
over many channels take fewer products (`winograd.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import primitives, winograd
from .primitives import BLOCK
from .reductions import tree_sum

_UNFOLDED = 1 << 25
"""Elements of unfolded input that are made at once."""


class Geometry:
    """Sizes of one convolution over any number of spatial dimensions.

    Args:
        x: shape of the input, ``[N, C, *spatial]``.
        weight: shape of the weight, ``[OC, C / groups, *kernel]``.
        stride: steps per dimension, and so on as for `torch.nn.functional.conv2d`.
    """

    def __init__(
        self,
        x: Sequence[int],
        weight: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        dims = len(x) - 2
        self.stride, self.padding, self.dilation = (tuple(v) * (dims // len(v)) for v in (stride, padding, dilation))
        self.batch, self.channels, self.groups = x[0], x[1], groups
        self.out_channels, self.kernel = weight[0], tuple(weight[2:])
        self.padded = tuple(size + 2 * p for size, p in zip(x[2:], self.padding, strict=True))
        self.spatial = tuple(x[2:])
        self.out = tuple(
            (size - d * (k - 1) - 1) // s + 1
            for size, d, k, s in zip(self.padded, self.dilation, self.kernel, self.stride, strict=True)
        )
        self.pixels, self.taps = math.prod(self.out), math.prod(self.kernel)
        self.depth = self.taps * (self.channels // groups)

    def pad(self, x: Tensor) -> Tensor:
        """The input with its padding."""
        amounts = [p for p in reversed(self.padding) for _ in range(2)]
        return torch.constant_pad_nd(x, amounts) if any(amounts) else x

    def windows(self, padded: Tensor) -> Tensor:
        """View ``[N, groups, C / groups, *kernel, *out]`` of a padded input."""
        n, c, *rest = padded.stride()
        per = self.channels // self.groups
        shape = (padded.shape[0], self.groups, per, *self.kernel, *self.out)
        kernel = (s * d for s, d in zip(rest, self.dilation, strict=True))
        out = (s * t for s, t in zip(rest, self.stride, strict=True))
        return padded.as_strided(shape, (n, c * per, c, *kernel, *out), padded.storage_offset())

    def unfold(self, x: Tensor, order: str) -> Tensor:
        """Unfolded input: ``[N, groups, depth, pixels]`` ("image") or ``[groups, depth, N * pixels]`` ("channel")."""
        dims = len(self.kernel)
        windows = self.windows(self.pad(x))
        kernel, out = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
        if order == "image":
            return windows.permute(0, 1, *kernel, 2, *out).reshape(x.shape[0], self.groups, self.depth, self.pixels)
        return windows.permute(1, *kernel, 2, 0, *out).reshape(self.groups, self.depth, x.shape[0] * self.pixels)

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """``[groups, OC / groups, depth]``."""
        per = self.out_channels // self.groups
        order = (0, 1, *range(3, 3 + len(self.kernel)), 2)
        return weight.reshape(self.groups, per, -1, *self.kernel).permute(order).reshape(self.groups, per, self.depth)

    def images_at_once(self) -> int:
        """How many images are unfolded at once."""
        return max(1, _UNFOLDED // max(1, self.groups * self.depth * self.pixels))


@lru_cache(1024)
def _geometry(x: tuple[int, ...], weight: tuple[int, ...], *rest: Any) -> Geometry:
    return Geometry(x, weight, *rest)


def _without_unfolding(x: Tensor, g: Geometry) -> ModuleType | None:
    """Winograd's algorithm or the kernels that gather their operands, where they take this convolution."""
    if winograd.takes(g):
        return winograd
    found = primitives.module("cuda_convolution") if x.is_cuda else None
    return found if found is not None and found.takes(g) else None


def _per_image(matrix: Tensor, images: int) -> Tensor:
    """``[groups, ...]`` repeated for each image: ``[images * groups, ...]``, without a copy for one group."""
    return matrix.expand(images, *matrix.shape).flatten(0, 1) if matrix.shape[0] > 1 else matrix.expand(images, -1, -1)


def _forward(x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    if (direct := _without_unfolding(x, g)) is not None:
        made: Tensor = direct.forward(primitives.wide(x), primitives.wide(weight), g)
        return primitives.cast(made, x.dtype)
    matrix = g.weight_matrix(weight.float())
    parts = []
    for images in x.float().split(g.images_at_once()):
        columns = g.unfold(images, "image").flatten(0, 1)
        parts.append(primitives.matmul(_per_image(matrix, images.shape[0]), columns))
    made = torch.cat(parts) if len(parts) > 1 else parts[0]
    return made.view(x.shape[0], g.out_channels, *g.out).to(x.dtype)


def _input_gradient(dy: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    if (direct := _without_unfolding(dy, g)) is not None:
        made: Tensor = direct.input_gradient(primitives.wide(dy), primitives.wide(weight), g)
        return primitives.cast(made, dy.dtype)
    matrix = g.weight_matrix(weight.float()).transpose(1, 2)
    padded = torch.zeros(g.batch, g.channels, *g.padded, device=dy.device)
    per = g.out_channels // g.groups
    for images, target in zip(dy.float().split(g.images_at_once()), padded.split(g.images_at_once()), strict=True):
        n = images.shape[0]
        columns = primitives.matmul(_per_image(matrix, n), images.reshape(n * g.groups, per, g.pixels))
        columns = columns.view(n, g.groups, *g.kernel, g.channels // g.groups, *g.out)
        windows = g.windows(target)
        for tap in itertools.product(*(range(k) for k in g.kernel)):
            windows[(slice(None),) * 3 + tap] += columns[(slice(None),) * 2 + tap]
    inner = tuple(slice(p, p + size) for p, size in zip(g.padding, g.spatial, strict=True))
    return padded[(slice(None),) * 2 + inner].to(dy.dtype, copy=True, memory_format=torch.contiguous_format)


def _weight_gradient(x: Tensor, dy: Tensor, g: Geometry) -> Tensor:
    if (direct := _without_unfolding(x, g)) is not None:
        made: Tensor = direct.weight_gradient(primitives.wide(x), primitives.wide(dy), g)
        return primitives.cast(made, dy.dtype)
    per = g.out_channels // g.groups
    rows = dy.float().reshape(g.batch, g.groups, per, g.pixels).permute(1, 2, 0, 3).reshape(g.groups, per, -1)
    length = g.batch * g.pixels
    # Whole blocks of k at a time, so that the sum goes on as if there were one product.
    step = max(1, _UNFOLDED // max(1, g.groups * g.depth) // BLOCK) * BLOCK
    total: Tensor | None = None
    for start in range(0, length, step):
        end = min(start + step, length)
        first, last = start // g.pixels, -(-end // g.pixels)
        columns = g.unfold(x[first:last].float(), "channel")[:, :, start - first * g.pixels : end - first * g.pixels]
        total = primitives.matmul(rows[:, :, start:end], columns.transpose(1, 2), total)
    if total is None:
        total = rows.new_zeros(g.groups, per, g.depth)
    dims = len(g.kernel)
    made = total.view(g.out_channels, *g.kernel, g.channels // g.groups)
    return made.permute(0, dims + 1, *range(1, dims + 1)).to(dy.dtype).contiguous()


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """``aten::convolution``; a transposed one is the input gradient of the other."""
    if transposed:
        dims = x.dim() - 2
        s, p, d, o = (tuple(v) * (dims // len(v)) for v in (stride, padding, dilation, output_padding))
        kernel = weight.shape[2:]
        spatial = [(x.shape[2 + i] - 1) * s[i] - 2 * p[i] + d[i] * (kernel[i] - 1) + o[i] + 1 for i in range(dims)]
        shape = (x.shape[0], weight.shape[1] * groups, *spatial)
        made = _input_gradient(x, weight, _geometry(shape, weight.shape, s, p, d, groups))
    else:
        g = _geometry(x.shape, weight.shape, tuple(stride), tuple(padding), tuple(dilation), groups)
        made = _forward(x, weight, g)
    if bias is not None:
        made += bias.reshape(-1, *[1] * (x.dim() - 2))
    return primitives.like_layout(made, x)


def convolution_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``aten::convolution_backward``: gradients of input, weight and bias."""
    small, large = (x, dy) if transposed else (dy, x)
    g = _geometry(large.shape, weight.shape, tuple(stride), tuple(padding), tuple(dilation), groups)
    dx = dw = db = None
    if output_mask[0]:
        dx = primitives.like_layout(_forward(dy, weight, g) if transposed else _input_gradient(dy, weight, g), x)
    if output_mask[1]:
        dw = _weight_gradient(large, small, g)
    if output_mask[2]:
        db = tree_sum(dy, [0, *range(2, dy.dim())])
    return dx, dw, db
