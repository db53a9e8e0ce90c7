"""Attention on CUDA tensors: how the Triton kernels of `cuda_attention_kernels.py` are launched."""

from __future__ import annotations

import math

from torch import Tensor

from . import cuda_attention_kernels as kernels
from .attention import Rows
from .cuda import words_of
from .cuda_kernels import LANES, SUM_BLOCK
from .launch import Launch
from .plans import planned
from .tiles import blocks_of, pick

_LONGEST = LANES.value * SUM_BLOCK.value
_IN_REGISTERS = 8  # chunks of LANES keys
_MANY = 4096  # rows that keep a device busy two by two


def takes(scores: Tensor) -> bool:
    """Whether there are scores, and sums of a row of them are of so many blocks that these are summed at once."""
    return scores.numel() > 0 and scores.shape[-1] <= _LONGEST


def weights(scores: Tensor, rows: Rows) -> Tensor:
    """See `attention`; in place of scores ``[heads, queries, keys]``, dense."""
    bias = scores if rows.bias is None else rows.bias
    _plan("attention_weights", scores, rows)(scores, bias, free=words_of(rows.key))
    return scores


def weights_backward(scores: Tensor, dw: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """The weights in place of `scores`, and the gradients of scores in place of `dw`."""
    bias = scores if rows.bias is None else rows.bias
    _plan("attention_weights_backward", scores, rows)(scores, dw, bias, free=words_of(rows.key))
    return scores, dw


def _plan(kernel: str, scores: Tensor, rows: Rows) -> Launch:
    strides = None if rows.bias is None else rows.bias.stride()
    numbers = (rows.queries, rows.heads, rows.units.start, rows.rows.start)
    return _launch(kernel, scores.shape, numbers, strides, rows.causal, rows.dropout)


@planned
def _launch(
    kernel: str,
    shape: tuple[int, ...],
    numbers: tuple[int, ...],
    strides: tuple[int, ...] | None,
    causal: bool,
    dropout: float,
) -> Launch:
    units, rows, length = shape
    queries, heads, unit, query = numbers
    t, u = pick("rows", units * rows), 2 if units * rows >= _MANY else 1
    chunks = blocks_of(length, LANES.value)
    kind = 0 if dropout == 0 else 1 if dropout < 1 else 2
    constants = (strides is not None, causal, kind, math.gcd(length, 16), chunks if chunks <= _IN_REGISTERS else 0, u)
    return Launch(
        getattr(kernels, kernel),
        (units * blocks_of(rows, u),),
        (1.0 - dropout, rows, queries, heads, length, unit, query, *(strides or (0, 0, 0, 0))),
        constants,
        t.warps,
        t.stages,
    )
