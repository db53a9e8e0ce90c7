"""Sums and what is made of them: mean, variance, norms, softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import primitives
from .arithmetic import divide, square_root

Dims = int | Sequence[int] | None


def _dims(x: Tensor, dim: Dims) -> list[int]:
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return list(range(x.dim()))
    return sorted(d % max(x.dim(), 1) for d in ([dim] if isinstance(dim, int) else dim))


def tree_sum(x: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """Sum over dimensions, whose elements are taken in row-major order of the dimensions ascending.

    Args:
        x: the operand; integers are added exactly, reduced types in fp32.
        dim: dimensions; default all.
        keepdim: keep them with size 1.
        dtype: type of the result.
    """
    if not (x.is_floating_point() or (dtype is not None and dtype.is_floating_point)):
        return torch.sum(x, _dims(x, dim), keepdim=keepdim, dtype=dtype)
    if x.dim() == 0:
        return x.to(dtype or x.dtype, copy=True)
    s = _summed(x.shape, tuple(_dims(x, dim)))
    wide = primitives.wide(x) if x.dtype != torch.float64 else x
    if s.middle is not None and x.is_contiguous():
        made = primitives.sum_middle(wide.reshape(s.middle))
    elif s.kept == [1] and (fused := primitives.fused(x)) is not None and fused.takes_channels(x):
        made = fused.channel_sum(wide)
    else:
        made = primitives.sum_middle(wide.permute(s.order).reshape(math.prod(s.shape), s.rows, 1))
    return primitives.cast(made.view(s.with_ones if keepdim else s.shape), dtype or x.dtype)


class _Summed(NamedTuple):
    """A sum over dimensions of a shape.

    Args:
        kept: the other dimensions.
        order: those, then the summed ones.
        rows: elements of a sum.
        middle: the shape as one before, of and behind the summed dimensions, if those are neighbours.
        shape: of the result.
        with_ones: of the result with the summed dimensions kept.
    """

    kept: list[int]
    order: tuple[int, ...]
    rows: int
    middle: tuple[int, int, int] | None
    shape: list[int]
    with_ones: list[int]


@lru_cache(4096)
def _summed(shape: Sequence[int], dims: tuple[int, ...]) -> _Summed:
    kept = [d for d in range(len(shape)) if d not in dims]
    rows = math.prod(shape[d] for d in dims)
    middle = None
    if dims == tuple(range(dims[0], dims[-1] + 1)):
        middle = (math.prod(shape[: dims[0]]), rows, math.prod(shape[dims[-1] + 1 :]))
    with_ones = [1 if d in dims else size for d, size in enumerate(shape)]
    return _Summed(kept, (*kept, *dims), rows, middle, [shape[d] for d in kept], with_ones)


def product(x: Tensor, dim: int | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """``aten::prod``: the first half of the elements times the second, until one is left; a last odd one waits."""
    target = dtype or (x.dtype if x.is_floating_point() else torch.int64)
    if not target.is_floating_point:
        return torch.prod(x, dtype=target) if dim is None else torch.prod(x, dim, keepdim, dtype=target)
    left = x.float().flatten() if dim is None else x.float().movedim(dim, -1)
    if left.shape[-1] == 0:
        made = left.new_ones(left.shape[:-1])
    else:
        while (size := left.shape[-1]) > 1:
            half = size // 2
            pairs = left[..., :half] * left[..., half : 2 * half]
            left = torch.cat([pairs, left[..., 2 * half :]], -1) if size % 2 else pairs
        made = left.squeeze(-1)
    return (made.unsqueeze(dim) if keepdim and dim is not None else made).to(target)


def _count(x: Tensor, dim: Dims) -> int:
    return math.prod(x.shape[d] for d in _dims(x, dim)) if x.dim() else 1


def mean(x: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """The sum, divided by the number of elements."""
    target = dtype or x.dtype
    return primitives.cast(divide(tree_sum(x, dim, keepdim, dtype=torch.float32), _count(x, dim)), target)


def var_mean(
    x: Tensor, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """Variance, from squared distances to the mean, and mean."""
    centre = mean(x, dim, True, dtype=torch.float32)
    away = x.float() - centre
    count = max(0.0, _count(x, dim) - (1 if correction is None else correction))
    variance = divide(tree_sum(away * away, dim, keepdim), count)
    return variance.to(x.dtype), centre.view(variance.shape).to(x.dtype)


def var(x: Tensor, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    """Variance."""
    return var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


def std(x: Tensor, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    """Root of the variance."""
    return square_root(var_mean(x.float(), dim, correction=correction, keepdim=keepdim)[0]).to(x.dtype)


def vector_norm(
    x: Tensor,
    ord: float = 2,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,  # noqa: A002
) -> Tensor:
    """``aten::linalg_vector_norm`` for the orders 0, 1, 2 and the infinities.

    Raises:
        NotImplementedError: for other orders.
    """
    target = dtype or x.dtype
    x = x.to(target)
    if ord in (math.inf, -math.inf):
        pick = torch.amax if ord > 0 else torch.amin
        return pick(x.abs(), _dims(x, dim), keepdim)
    if ord == 0:
        return tree_sum((x != 0).float(), dim, keepdim).to(target)
    wide = x.float()
    if ord == 1:
        return tree_sum(wide.abs(), dim, keepdim).to(target)
    if ord == 2:
        return square_root(tree_sum(wide * wide, dim, keepdim)).to(target)
    raise NotImplementedError(f"the norm of order {ord} has no D2 kernel. HINT: use the order 0, 1, 2 or infinity.")


def norm(x: Tensor, p: float | None = 2, dim: Dims = None, keepdim: bool = False) -> Tensor:
    """``aten::norm``."""
    return vector_norm(x, 2 if p is None else p, dim, keepdim)


def _rows(x: Tensor, dim: int) -> ModuleType | None:
    """The module that computes softmax of the last dimension as one kernel, where it takes this operand."""
    fused = primitives.fused(x)
    last = x.dim() > 0 and dim % x.dim() == x.dim() - 1
    return fused if fused is not None and last and fused.takes_rows(x.shape[-1]) else None


def softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    """``exp(x - max) / sum(exp(x - max))``."""
    target = torch.float32 if half_to_float else x.dtype
    if x.numel() == 0:
        return torch.empty_like(x, dtype=target)
    if (fused := _rows(x, dim)) is not None:
        return primitives.cast(fused.softmax(primitives.wide(x), log=False), target)
    x = x.float()
    e = primitives.unary("exp", x - x.amax(dim, keepdim=True))
    return divide(e, tree_sum(e, dim, True)).to(target)


def safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """`softmax`, and 0 where all elements are minus infinity (masked attention)."""
    x = x if dtype is None else x.to(dtype)
    masked = (x == -math.inf).all(dim, keepdim=True)
    return torch.where(masked, torch.zeros((), dtype=x.dtype, device=x.device), softmax(x, dim))


def softmax_backward(dy: Tensor, y: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    """``(dy - sum(dy * y)) * y``."""
    g, y = primitives.wide(dy), primitives.wide(y)
    if y.numel() and (fused := _rows(y, dim)) is not None:
        return primitives.cast(fused.softmax_backward(g, y, log=False), input_dtype)
    return ((g - tree_sum(g * y, dim, True)) * y).to(input_dtype)


def log_softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    """``(x - max) - log(sum(exp(x - max)))``."""
    target = torch.float32 if half_to_float else x.dtype
    if x.numel() == 0:
        return torch.empty_like(x, dtype=target)
    if (fused := _rows(x, dim)) is not None:
        return primitives.cast(fused.softmax(primitives.wide(x), log=True), target)
    x = x.float()
    shifted = x - x.amax(dim, keepdim=True)
    total = tree_sum(primitives.unary("exp", shifted), dim, True)
    return (shifted - primitives.unary("log", total)).to(target)


def log_softmax_backward(dy: Tensor, y: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    """``dy - exp(y) * sum(dy)``."""
    g = dy.float()
    if y.numel() and (fused := _rows(y, dim)) is not None:
        return fused.softmax_backward(g, y.float(), log=True).to(input_dtype)
    return (g - primitives.unary("exp", y.float()) * tree_sum(g, dim, True)).to(input_dtype)


def logsumexp(x: Tensor, dim: Dims, keepdim: bool = False) -> Tensor:
    """``max + log(sum(exp(x - max)))``; an infinite maximum is left out of the differences."""
    dims, wide = _dims(x, dim), x.float()
    largest = wide.amax(dims, keepdim=True)
    largest = torch.where(largest.isinf(), torch.zeros_like(largest), largest)
    total = primitives.unary("log", tree_sum(primitives.unary("exp", wide - largest), dims, True)) + largest
    return (total if keepdim else total.squeeze(tuple(dims))).to(x.dtype)
