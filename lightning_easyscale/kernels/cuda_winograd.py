"""Winograd's transforms on CUDA tensors: how the Triton kernels of `cuda_winograd_kernels.py` are launched.

The functions are those of `cpu_winograd.py` and have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import cuda_winograd_kernels as kernels
from .launch import Launch
from .plans import planned
from .tiles import blocks_of

_PLAIN = (256, 4, 1)  # elements of a block, warps, stages
_ALONG = (256, 1)  # squares and channels of a block where squares lie side by side
_ACROSS = (16, 32)  # where channels do in the result, and squares in the input


def input_squares(
    x: Tensor, padding: Sequence[int], out: Sequence[int], start: int, end: int, *, last: bool = False
) -> Tensor:
    """See `cpu_winograd.input_squares`."""
    channels, squares = x.shape[1], end - start
    made = x.new_empty((16, squares, channels) if last else (16, channels, squares))
    launch = _input_squares(x.shape, x.stride(), tuple(padding), tuple(out), squares, start, last)
    launch(x, made)
    return made


@planned
def _input_squares(
    x: Sequence[int],
    strides: tuple[int, ...],
    padding: tuple[int, ...],
    out: tuple[int, ...],
    squares: int,
    start: int,
    last: bool,
) -> Launch:
    channels, height, width = x[1:]
    sides = tuple(-(-size // 2) for size in out)
    to = (channels, 1) if last else (1, squares)
    numbers = (squares, start, channels * squares, channels, *sides, height, width, *strides, *padding, *to)
    return _over(kernels.input_squares, squares, channels, numbers, _ACROSS if last else _ALONG)


def output_squares(products: Tensor, out: Tensor, start: int) -> None:
    """See `cpu_winograd.output_squares`; `out` is contiguous."""
    _output_squares(tuple(out.shape[1:]), products.shape[2], start)(products, out)


@planned
def _output_squares(out: tuple[int, ...], squares: int, start: int) -> Launch:
    channels, height, width = out
    numbers = (squares, start, channels * squares, channels, -(-height // 2), -(-width // 2), height, width)
    return _over(kernels.output_squares, squares, channels, numbers, _ALONG)


def gradient_squares(dy: Tensor, start: int, end: int) -> Tensor:
    """See `cpu_winograd.gradient_squares`."""
    made = dy.new_empty(16, dy.shape[1], end - start)
    _gradient_squares(tuple(dy.shape[1:]), dy.stride(), end - start, start)(dy, made)
    return made


@planned
def _gradient_squares(dy: tuple[int, ...], strides: tuple[int, ...], squares: int, start: int) -> Launch:
    channels, height, width = dy
    sides = (-(-height // 2), -(-width // 2))
    numbers = (squares, start, channels * squares, channels, *sides, height, width, *strides)
    return _over(kernels.gradient_squares, squares, channels, numbers, _ALONG)


def weight_squares(weight: Tensor, *, turned: bool) -> Tensor:
    """See `cpu_winograd.weight_squares`."""
    oc, c = weight.shape[:2]
    made = weight.new_empty((16, c, oc) if turned else (16, oc, c))
    _weight_squares((oc, c), weight.stride(), turned)(weight, made)
    return made


@planned
def _weight_squares(shape: tuple[int, int], strides: tuple[int, ...], turned: bool) -> Launch:
    (rows, columns), (wr, wc, wh, ww) = shape, strides
    numbers = (rows, columns, wr, wc, wh, ww, 0)
    if turned:
        numbers = (columns, rows, wc, wr, -wh, -ww, 2 * (wh + ww))
    width, warps, stages = _PLAIN
    return Launch(kernels.weight_squares, (blocks_of(rows * columns, width),), numbers, (width,), warps, stages)


def weight_gradient(sums: Tensor) -> Tensor:
    """See `cpu_winograd.weight_gradient`."""
    made = sums.new_empty(*sums.shape[1:], 3, 3)
    _weight_gradient(sums.shape[1] * sums.shape[2])(sums, made)
    return made


@planned
def _weight_gradient(size: int) -> Launch:
    width, warps, stages = _PLAIN
    return Launch(kernels.gradient_of_squares, (blocks_of(size, width),), (size,), (width,), warps, stages)


def _over(kernel: object, squares: int, channels: int, numbers: tuple[int, ...], block: tuple[int, int]) -> Launch:
    """A launch over squares and channels."""
    grid = (blocks_of(squares, block[0]), blocks_of(channels, block[1]))
    return Launch(kernel, grid, numbers, block, *_PLAIN[1:])
