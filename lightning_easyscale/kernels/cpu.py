"""The primitives of the format on CPU tensors: torch tensors in and out, C++ in between (`kernels.cpp`)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import build

UNARY = ("exp", "expm1", "log", "log1p", "tanh", "erf", "sqrt")
"""Elementary functions, in the order of the C++ switch."""

_width: str | None = None


@contextmanager
def vector_width(width: str) -> Iterator[None]:
    """Use the build for another vector width (a key of `build.WIDTHS`) for the time of a ``with`` block."""
    global _width
    before, _width = _width, width
    try:
        yield
    finally:
        _width = before


def library() -> ctypes.CDLL:
    """The C++ library for the present vector width."""
    return build.load(_width or build.default_width())


def matmul(a: Tensor, b: Tensor, into: Tensor | None = None) -> Tensor:
    """Product of matrices or of batches of them; see `primitives.matmul`."""
    (batch, m, k), n = (1, *a.shape)[-3:], b.shape[-1]
    out = a.new_empty(*a.shape[:-1], n) if into is None else into
    library().es_matmul(
        *(a.data_ptr(), *(0, *a.stride())[-3:], b.data_ptr(), *(0, *b.stride())[-3:], out.data_ptr()),
        *(batch, m, n, k, into is not None, torch.get_num_threads()),
    )
    return out


def sum_middle(x: Tensor) -> Tensor:
    """Sums over the middle of a contiguous ``[outer, rows, inner]``; see `primitives.sum_middle`."""
    outer, rows, inner = x.shape
    out = x.new_empty(outer, inner)
    library().es_sum(x.data_ptr(), out.data_ptr(), outer, rows, inner, torch.get_num_threads())
    return out


def unary(name: str, x: Tensor) -> Tensor:
    """An elementary function of a dense tensor; see `primitives.unary`."""
    out = torch.empty_like(x)
    library().es_unary(UNARY.index(name), x.data_ptr(), out.data_ptr(), x.numel(), torch.get_num_threads())
    return out


def random(kind: str, key: int, out: Tensor) -> Tensor:
    """Fill a contiguous tensor; see `primitives.random`."""
    library().es_random(kind == "normal", key, out.data_ptr(), out.numel(), torch.get_num_threads())
    return out


def index_add(out: Tensor, index: Tensor, source: Tensor) -> Tensor:
    """Add rows in ascending order; see `primitives.index_add`."""
    rows, width = source.shape
    threads = torch.get_num_threads()
    library().es_index_add(out.data_ptr(), index.data_ptr(), source.data_ptr(), rows, width, threads)
    return out
