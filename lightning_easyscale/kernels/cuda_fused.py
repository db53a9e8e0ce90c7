"""Fused operations on CUDA tensors: how the Triton kernels of `cuda_fused_kernels.py` are launched.

Operands are fp32. What these functions do not take is composed of single operations instead.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import cuda_channel_kernels as channel_kernels
from . import cuda_fused_kernels as kernels
from .cuda import sum_middle, words_of
from .cuda_kernels import SUM_BLOCK
from .launch import Launch
from .plans import planned
from .tiles import blocks_of, pick, power_of_two

_MANY = 4096  # rows that keep a device busy two by two
_LIMIT = 2**31 - 2**20  # elements that 32-bit offsets reach, lanes that stick out included
ACTIVATIONS = ("gelu", "gelu by tanh", "silu", "sigmoid")


@planned
def _rows(kernel: str, rows: int, numbers: tuple[int | float, ...], constants: tuple[int | bool, ...]) -> Launch:
    """A launch over rows, one or two to a program."""
    t, u = pick("rows", rows), _units(rows)
    return Launch(getattr(kernels, kernel), (blocks_of(rows, u),), numbers, (*constants, u), t.warps, t.stages)


@planned
def _strips(kernel: str, n: int, numbers: tuple[int, ...], constants: tuple[int | bool, ...]) -> Launch:
    """A launch over n elements in strips."""
    t = pick("elementwise", n)
    return Launch(getattr(kernels, kernel), (blocks_of(n, t.width),), numbers, (*constants, t.width), t.warps, t.stages)


def _units(count: int) -> int:
    """Rows of a program."""
    return 2 if count >= _MANY else 1


def takes_rows(length: int) -> bool:
    """Whether sums of rows of this length are of one block."""
    return 0 < length <= SUM_BLOCK.value


def takes_channels(x: Tensor) -> bool:
    """Whether the sums over all dimensions but the second are of at most a block of blocks."""
    rows = x.numel() // max(1, x.shape[1]) if x.dim() > 1 else 0
    return 0 < rows <= SUM_BLOCK.value * SUM_BLOCK.value


def softmax(x: Tensor, *, log: bool) -> Tensor:
    """Over the last dimension; see `reductions.softmax` and `log_softmax`."""
    x = x.contiguous()
    out, length = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // length
    _rows("softmax", rows, (rows, length), (log,))(x, out)
    return out


def softmax_backward(dy: Tensor, y: Tensor, *, log: bool) -> Tensor:
    """Over the last dimension."""
    dy, y = dy.contiguous(), y.contiguous()
    out, length = torch.empty_like(y), y.shape[-1]
    rows = y.numel() // length
    _rows("softmax_backward", rows, (rows, length), (log,))(dy, y, out)
    return out


def layer_norm(
    x: Tensor, length: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, means and inverse deviations (``[rows]``) of rows of a length; see `normalization.layer_norm`."""
    x, rows = x.contiguous(), x.numel() // length
    out, means, inverses = torch.empty_like(x), x.new_empty(rows), x.new_empty(rows)
    numbers = (rows, length, float(length), float(eps))
    launch = _rows("layer_norm", rows, numbers, (weight is not None, bias is not None))
    launch(x, _dense(weight, x), _dense(bias, x), out, means, inverses)
    return out, means, inverses


def layer_norm_backward(
    dy: Tensor, x: Tensor, length: int, mean: Tensor, inverse: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, and of weight and bias (``[length]``)."""
    dy, x, rows = dy.contiguous(), x.contiguous(), x.numel() // length
    out, products = torch.empty_like(x), torch.empty_like(x)
    launch = _rows("layer_norm_backward", rows, (rows, length, float(length)), (weight is not None,))
    launch(dy, x, mean.contiguous(), inverse.contiguous(), _dense(weight, x), out, products)
    return out, sum_middle(products.view(1, rows, length))[0], sum_middle(dy.view(1, rows, length))[0]


class _Channels:
    """Sizes of ``[N, C, *]`` whose moments are taken for each channel."""

    def __init__(self, images: int, channels: int, inner: int) -> None:
        self.channels, self.inner, self.rows = channels, inner, images * inner
        self.blocks = blocks_of(self.rows, SUM_BLOCK.value)
        self.units = channels * self.blocks

    @classmethod
    def of(cls, x: Tensor) -> _Channels:
        return _channels(x.shape[0], x.shape[1], math.prod(x.shape[2:]))

    def sums(
        self, x: Tensor, kind: int, dy: Tensor, means: Tensor, inverses: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """What `channel_sums` makes."""
        out = x.new_empty(4 if kind == 2 else 1, self.units)
        numbers = (self.channels, self.inner, self.rows, self.blocks, self.units)
        launch = _rows("channel_sums", self.units, numbers, (kind, weight is not None))
        launch(x, dy, means, inverses, _dense(weight, x), out)
        return out

    def per_channel(self, kernel: str, numbers: tuple[int | float, ...], constants: tuple[int | bool, ...]) -> Launch:
        """A launch of a program for each channel."""
        return _per_channel(kernel, self.channels, self.units, numbers, constants)

    def whole(self, kernel: str, numbers: tuple[int | float, ...], constants: tuple[bool, ...]) -> Launch | None:
        """A launch of a program for each channel that does all for it, if it is not too long."""
        if self.blocks > channel_kernels.MOST or self.rows * self.channels > _LIMIT:
            return None
        blocks = power_of_two(self.blocks)
        given = (*constants, blocks, blocks.bit_length() - 1)
        warps = min(blocks, 8)  # a thread has four lanes, or more
        return Launch(getattr(channel_kernels, kernel), (self.channels,), numbers, given, warps, 2)


@planned
def _channels(images: int, channels: int, inner: int) -> _Channels:
    return _Channels(images, channels, inner)


@planned
def _per_channel(
    kernel: str, channels: int, units: int, numbers: tuple[int | float, ...], constants: tuple[int | bool, ...]
) -> Launch:
    t = pick("rows", units)
    return Launch(getattr(kernels, kernel), (channels,), numbers, (*constants, 1), t.warps, t.stages)


def channel_sum(x: Tensor) -> Tensor:
    """Sums over all dimensions but the second."""
    x = x.contiguous()
    c = _Channels.of(x)
    return sum_middle(c.sums(x, 0, x, x, x).view(c.channels, c.blocks, 1)).view(-1)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor, Tensor] | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, means and inverse deviations (``[C]``) in training; see `normalization.batch_norm`.

    Args:
        x: ``[N, C, *]``.
        weight: ``[C]``.
        bias: ``[C]``.
        running: fp32 running mean and variance, dense, updated in place.
        momentum: weight of the new moments.
        eps: added to variances.
    """
    x = x.contiguous()
    out, means, inverses = torch.empty_like(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
    options = (weight is not None, bias is not None, running is not None)
    launch = _batch_norm(x.shape, *options, float(eps), float(momentum))
    if launch is not None:
        launch(x, _dense(weight, x), _dense(bias, x), out, means, inverses, *(running or (means, means)))
        return out, means, inverses
    c = _Channels.of(x)
    unbias = c.rows / max(1, c.rows - 1)
    numbers = (c.channels, c.blocks, float(c.rows), float(eps), float(momentum), 1.0 - momentum, unbias)
    for kind in (0, 1):
        partial = c.sums(x, kind, x, means, inverses)
        launch = c.per_channel("channel_moments", numbers, (kind, running is not None))
        launch(partial, means, inverses, *(running or (means, means)))
    return normalize(x, means, inverses, weight, bias), means, inverses


@planned
def _batch_norm(
    shape: tuple[int, ...], weight: bool, bias: bool, running: bool, eps: float, momentum: float
) -> Launch | None:
    """The launch that does all, where the channels are not too long."""
    c = _channels(shape[0], shape[1], math.prod(shape[2:]))
    numbers = (c.channels, c.inner, c.rows, float(c.rows), eps, momentum, 1.0 - momentum, c.rows / max(1, c.rows - 1))
    return c.whole("batch_norm", numbers, (weight, bias, running))


def normalize(x: Tensor, means: Tensor, inverses: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``(x - mean) * inverse * weight + bias`` for each channel."""
    x = x.contiguous()
    out, n, c = torch.empty_like(x), x.numel(), _Channels.of(x)
    constants = (weight is not None, bias is not None)
    launch = _strips("normalize_channels", n, (n, c.channels, c.inner), constants)
    launch(x, means, inverses, _dense(weight, x), _dense(bias, x), out)
    return out


def batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, means: Tensor, inverses: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, the weight and the bias in training."""
    dy, x = dy.contiguous(), x.contiguous()
    launch, out = _batch_norm_backward(x.shape, weight is not None), torch.empty_like(x)
    if launch is not None:
        products, gradients = x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
        launch(dy, x, means, inverses, _dense(weight, x), out, products, gradients)
        return out, products, gradients
    c, found, n = _Channels.of(x), x.new_empty(4, x.shape[1]), x.numel()
    partial = c.sums(x, 2, dy, means, inverses, weight)
    c.per_channel("channel_gradients", (c.channels, c.blocks, float(c.rows)), ())(partial, found)
    launch = _strips("normalize_channels_backward", n, (n, c.channels, c.inner), (weight is not None,))
    launch(dy, x, means, inverses, _dense(weight, x), found, out)
    return out, found[2], found[3]


@planned
def _batch_norm_backward(shape: tuple[int, ...], weight: bool) -> Launch | None:
    c = _channels(shape[0], shape[1], math.prod(shape[2:]))
    return c.whole("batch_norm_backward", (c.channels, c.inner, c.rows, float(c.rows)), (weight,))


def activation(name: str, x: Tensor) -> Tensor:
    """One of `ACTIVATIONS`; keeps the memory format."""
    out, n = torch.empty_like(x), x.numel()
    x = x if out.stride() == x.stride() else torch.empty_like(out).copy_(x)
    _strips("activation", n, (n,), (ACTIVATIONS.index(name),))(x, out)
    return out


def activation_backward(name: str, dy: Tensor, x: Tensor) -> Tensor:
    """Its gradient, of the operand, or for ``sigmoid`` of the result."""
    out, n = torch.empty_like(x), x.numel()
    x, dy = (v if out.stride() == v.stride() else torch.empty_like(out).copy_(v) for v in (x, dy))
    _strips("activation_backward", n, (n,), (ACTIVATIONS.index(name),))(dy, x, out)
    return out


def dropout(x: Tensor, key: int, keep: float) -> tuple[Tensor, Tensor]:
    """Result and mask of a dense tensor in row-major order; see `random.dropout`."""
    out, kept = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
    _dropout(x.numel(), keep)(x, out, kept, free=words_of(key))
    return out, kept


@planned
def _dropout(n: int, keep: float) -> Launch:
    t = pick("plain", n)
    strip = max(1, t.width // 4)
    return Launch(kernels.dropout, (blocks_of(n, 4 * strip),), (keep, n), (strip,), t.warps, t.stages)


def dropout_backward(dy: Tensor, kept: Tensor, keep: float) -> Tensor:
    """The gradient of dense tensors in row-major order."""
    out = torch.empty_like(dy)
    _dropout_backward(dy.numel(), keep)(dy, kept, out)
    return out


@planned
def _dropout_backward(n: int, keep: float) -> Launch:
    t = pick("plain", n)
    return Launch(kernels.dropout_backward, (blocks_of(n, t.width),), (keep, n), (t.width,), t.warps, t.stages)


def _dense(parameter: Tensor | None, like: Tensor) -> Tensor:
    """A kernel's argument for an optional parameter."""
    if parameter is None:
        return like
    return (parameter if parameter.dtype is torch.float32 else parameter.float()).contiguous()
