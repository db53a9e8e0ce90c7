"""Pooling on CUDA tensors: how the Triton kernels of `cuda_pooling_kernels.py` are launched.

Operands are fp32, ``[*, height, width]``; windows are pairs of rows and columns. See `pooling.py`.
"""

from __future__ import annotations

import math

from torch import Tensor

from . import cuda_pooling_kernels as kernels
from .launch import Launch
from .plans import planned
from .tiles import blocks_of, pick

_LIMIT = 2**31 - 2**20  # elements that 32-bit offsets reach, strips that stick out included
_Pair = tuple[int, int]


def takes(x: Tensor, y: Tensor) -> bool:
    """Whether these kernels pool an operand of this shape to such a result."""
    return 0 < x.numel() < _LIMIT and 0 < y.numel() < _LIMIT


def max_pool_backward(
    dy: Tensor, index: Tensor, shape: tuple[int, ...], kernel: _Pair, stride: _Pair, padding: _Pair, dilation: _Pair
) -> Tensor:
    """The gradient of an operand of this shape."""
    out = dy.new_empty(shape)
    launch = _max_pool_backward(shape, (dy.shape[-2], dy.shape[-1]), kernel, stride, padding, dilation)
    launch(dy.contiguous(), index.contiguous(), out)
    return out


@planned
def _max_pool_backward(
    shape: tuple[int, ...], windows: _Pair, kernel: _Pair, stride: _Pair, padding: _Pair, dilation: _Pair
) -> Launch:
    numbers = (*shape[-2:], *windows, *padding, *dilation, kernel[1])
    return _strips("max_pool_backward", math.prod(shape), kernel, numbers, stride)


def avg_pool(
    x: Tensor, windows: _Pair, kernel: _Pair, stride: _Pair, padding: _Pair, divisor: int, *, padded: bool
) -> Tensor:
    """The means of ``[*, *windows]``; a divisor of 0 stands for the number of positions, with or without padding."""
    out = x.new_empty(*x.shape[:-2], *windows)
    _avg_pool(x.shape, windows, kernel, stride, padding, divisor, padded)(x.contiguous(), out)
    return out


@planned
def _avg_pool(
    shape: tuple[int, ...], windows: _Pair, kernel: _Pair, stride: _Pair, padding: _Pair, divisor: int, padded: bool
) -> Launch:
    numbers = (*shape[-2:], *windows, *stride, *padding, *kernel, divisor)
    return _strips("avg_pool", math.prod((*shape[:-2], *windows)), kernel, numbers, (padded,))


def avg_pool_backward(
    dy: Tensor,
    shape: tuple[int, ...],
    kernel: _Pair,
    stride: _Pair,
    padding: _Pair,
    divisor: int,
    *,
    padded: bool,
) -> Tensor:
    """The gradient of an operand of this shape."""
    out = dy.new_empty(shape)
    launch = _avg_pool_backward(shape, (dy.shape[-2], dy.shape[-1]), kernel, stride, padding, divisor, padded)
    launch(dy.contiguous(), out)
    return out


@planned
def _avg_pool_backward(
    shape: tuple[int, ...], windows: _Pair, kernel: _Pair, stride: _Pair, padding: _Pair, divisor: int, padded: bool
) -> Launch:
    numbers = (*shape[-2:], *windows, *padding, *kernel, divisor)
    return _strips("avg_pool_backward", math.prod(shape), kernel, numbers, (*stride, padded))


def _strips(name: str, n: int, kernel: _Pair, numbers: tuple[int, ...], constants: tuple[int | bool, ...]) -> Launch:
    """A launch over n elements in strips."""
    t = pick("plain", n)
    given = (n, math.prod(kernel), *numbers)
    return Launch(getattr(kernels, name), (blocks_of(n, t.width),), given, (*constants, t.width), t.warps, t.stages)
