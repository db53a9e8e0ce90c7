"""Winograd's transforms for F(2x2, 3x3) on CPU tensors (`winograd.h`); `winograd.py` says which they are.

Sixteen values of a square are numbered by rows. `cuda_winograd.py` has the same functions with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cpu import library


def input_squares(
    x: Tensor, padding: Sequence[int], out: Sequence[int], start: int, end: int, *, last: bool = False
) -> Tensor:
    """``B^T d B`` for the squares `start` to `end` of an output of `out` rows and columns.

    Args:
        x: ``[N, C, H, W]``, any strides.
        padding: rows and columns of zeros before the first.
        out: rows and columns of the output.
        start: first square.
        end: behind the last square.
        last: channels come last.

    Returns:
        ``[16, C, end - start]``, or ``[16, end - start, C]``.
    """
    made = x.new_empty(16, x.shape[1], end - start)
    sides = (-(-size // 2) for size in out)
    library().es_input_squares(
        *(x.data_ptr(), *x.stride(), made.data_ptr(), *x.shape[1:], *padding, *sides, start, end),
        torch.get_num_threads(),
    )
    return made.transpose(1, 2) if last else made


def output_squares(products: Tensor, out: Tensor, start: int) -> None:
    """``A^T m A``: write squares from `start` on, made of ``[16, C, squares]``, to a contiguous ``[N, C, H, W]``."""
    threads = torch.get_num_threads()
    library().es_output_squares(products.data_ptr(), out.data_ptr(), *out.shape[1:], start, products.shape[2], threads)


def gradient_squares(dy: Tensor, start: int, end: int) -> Tensor:
    """``A y A^T``: ``[16, C, end - start]`` of the output's gradient ``[N, C, H, W]`` with any strides."""
    made = dy.new_empty(16, dy.shape[1], end - start)
    library().es_gradient_squares(
        *(dy.data_ptr(), *dy.stride(), made.data_ptr(), *dy.shape[1:], start, end), torch.get_num_threads()
    )
    return made


def weight_squares(weight: Tensor, *, turned: bool) -> Tensor:
    """``G g G^T``: ``[16, OC, C]`` of ``[OC, C, 3, 3]``; `turned`: ``[16, C, OC]`` of that turned by 180 degrees."""
    if turned:
        weight = weight.transpose(0, 1).flip(2, 3)
    made = weight.new_empty(16, *weight.shape[:2])
    library().es_weight_squares(
        *(weight.data_ptr(), *weight.stride(), made.data_ptr(), *weight.shape[:2]), torch.get_num_threads()
    )
    return made


def weight_gradient(sums: Tensor) -> Tensor:
    """``G^T s G``: ``[OC, C, 3, 3]`` of a contiguous ``[16, OC, C]``."""
    made = sums.new_empty(*sums.shape[1:], 3, 3)
    library().es_weight_gradient(sums.data_ptr(), made.data_ptr(), sums[0].numel(), torch.get_num_threads())
    return made
