"""Fused operations on CUDA tensors: how the Triton kernels of `cuda_fused_kernels.py` are launched.

Operands are fp32. What these functions do not take is composed of single operations instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cuda_fused_kernels as kernels
from .cuda import blocks_of, launch_options, pick, sum_middle
from .cuda_kernels import SUM_BLOCK

_MANY = 4096  # rows that keep a device busy two by two
ACTIVATIONS = ("gelu", "gelu by tanh", "silu", "sigmoid")


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
    out, rows = torch.empty_like(x), x.numel() // x.shape[-1]
    t = pick("rows", rows)
    u = _units(rows)
    kernels.softmax[(blocks_of(rows, u),)](x, out, rows, x.shape[-1], LOG=log, U=u, **launch_options(t))
    return out


def softmax_backward(dy: Tensor, y: Tensor, *, log: bool) -> Tensor:
    """Over the last dimension."""
    dy, y = dy.contiguous(), y.contiguous()
    out, rows = torch.empty_like(y), y.numel() // y.shape[-1]
    t = pick("rows", rows)
    u = _units(rows)
    kernels.softmax_backward[(blocks_of(rows, u),)](dy, y, out, rows, y.shape[-1], LOG=log, U=u, **launch_options(t))
    return out


def layer_norm(
    x: Tensor, length: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, means and inverse deviations (``[rows]``) of rows of a length; see `normalization.layer_norm`."""
    x, rows = x.contiguous(), x.numel() // length
    out, moments = torch.empty_like(x), x.new_empty(2, rows)
    t = pick("rows", rows)
    u = _units(rows)
    kernels.layer_norm[(blocks_of(rows, u),)](
        *(x, _dense(weight, x), _dense(bias, x), out, moments[0], moments[1], rows, length, float(length), eps),
        **{"WEIGHT": weight is not None, "BIAS": bias is not None, "U": u},
        **launch_options(t),
    )
    return out, moments[0], moments[1]


def layer_norm_backward(
    dy: Tensor, x: Tensor, length: int, mean: Tensor, inverse: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, and of weight and bias (``[length]``)."""
    dy, x, rows = dy.contiguous(), x.contiguous(), x.numel() // length
    out, products = torch.empty_like(x), torch.empty_like(x)
    t = pick("rows", rows)
    u = _units(rows)
    kernels.layer_norm_backward[(blocks_of(rows, u),)](
        *(dy, x, mean.contiguous(), inverse.contiguous(), _dense(weight, x), out, products),
        *(rows, length, float(length)),
        **{"WEIGHT": weight is not None, "U": u},
        **launch_options(t),
    )
    return out, sum_middle(products.view(1, rows, length))[0], sum_middle(dy.view(1, rows, length))[0]


class _Channels:
    """Sizes of ``[N, C, *]`` whose moments are taken for each channel."""

    def __init__(self, x: Tensor) -> None:
        self.channels = x.shape[1]
        self.inner = x[0, 0].numel()
        self.rows = x.shape[0] * self.inner
        self.blocks = blocks_of(self.rows, SUM_BLOCK.value)
        self.units = self.channels * self.blocks
        self.tiles = pick("rows", self.units)

    def sums(
        self, x: Tensor, kind: int, dy: Tensor, means: Tensor, inverses: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        out = x.new_empty(4 if kind == 2 else 1, self.units)
        u = _units(self.units)
        kernels.channel_sums[(blocks_of(self.units, u),)](
            *(x, dy, means, inverses, _dense(weight, x), out),
            *(self.channels, self.inner, self.rows, self.blocks, self.units),
            **{"KIND": kind, "WEIGHT": weight is not None, "U": u},
            **launch_options(self.tiles),
        )
        return out


def channel_sum(x: Tensor) -> Tensor:
    """Sums over all dimensions but the second."""
    x = x.contiguous()
    c = _Channels(x)
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
    c, moments = _Channels(x), x.new_empty(2, x.shape[1])
    means, inverses = moments[0], moments[1]
    for kind in (0, 1):
        partial = c.sums(x, kind, x, means, inverses)
        kernels.channel_moments[(c.channels,)](
            *(partial, means, inverses, *(running or (means, means)), c.channels, c.blocks, float(c.rows), eps),
            *(float(momentum), 1.0 - momentum, c.rows / max(1, c.rows - 1)),
            **{"KIND": kind, "RUNNING": running is not None, "U": 1},
            **launch_options(c.tiles),
        )
    return normalize(x, means, inverses, weight, bias), means, inverses


def normalize(x: Tensor, means: Tensor, inverses: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``(x - mean) * inverse * weight + bias`` for each channel."""
    x = x.contiguous()
    out, t = torch.empty_like(x), pick("elementwise", x.numel())
    kernels.normalize_channels[(blocks_of(x.numel(), t.width),)](
        *(x, means, inverses, _dense(weight, x), _dense(bias, x), out, x.numel(), x.shape[1], x[0, 0].numel()),
        **{"WEIGHT": weight is not None, "BIAS": bias is not None, "W": t.width},
        **launch_options(t),
    )
    return out


def batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, means: Tensor, inverses: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, the weight and the bias in training."""
    dy, x = dy.contiguous(), x.contiguous()
    c, found, out = _Channels(x), x.new_empty(4, x.shape[1]), torch.empty_like(x)
    partial = c.sums(x, 2, dy, means, inverses, weight)
    kernels.channel_gradients[(c.channels,)](
        partial, found, c.channels, c.blocks, float(c.rows), U=1, **launch_options(c.tiles)
    )
    t = pick("elementwise", x.numel())
    kernels.normalize_channels_backward[(blocks_of(x.numel(), t.width),)](
        *(dy, x, means, inverses, _dense(weight, x), found, out, x.numel(), c.channels, c.inner),
        **{"WEIGHT": weight is not None, "W": t.width},
        **launch_options(t),
    )
    return out, found[2], found[3]


def activation(name: str, x: Tensor) -> Tensor:
    """One of `ACTIVATIONS`; keeps the memory format."""
    out = torch.empty_like(x)
    x = x if out.stride() == x.stride() else torch.empty_like(out).copy_(x)
    t = pick("elementwise", x.numel())
    kernels.activation[(blocks_of(x.numel(), t.width),)](
        x, out, x.numel(), WHICH=ACTIVATIONS.index(name), W=t.width, **launch_options(t)
    )
    return out


def activation_backward(name: str, dy: Tensor, x: Tensor) -> Tensor:
    """Its gradient, of the operand, or for ``sigmoid`` of the result."""
    out = torch.empty_like(x)
    x, dy = (v if out.stride() == v.stride() else torch.empty_like(out).copy_(v) for v in (x, dy))
    t = pick("elementwise", x.numel())
    kernels.activation_backward[(blocks_of(x.numel(), t.width),)](
        dy, x, out, x.numel(), WHICH=ACTIVATIONS.index(name), W=t.width, **launch_options(t)
    )
    return out


def _dense(parameter: Tensor | None, like: Tensor) -> Tensor:
    """A kernel's argument for an optional parameter."""
    return like if parameter is None else parameter.float().contiguous()
