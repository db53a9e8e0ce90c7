"""Additions into places chosen by an index: each place adds its terms in ascending order of their position.

Sorting is here too: among equal elements the first stays first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import primitives


def index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    """``aten::index_add``."""
    source = source if alpha == 1 else source * alpha
    rows = x.movedim(dim, 0).float().clone(memory_format=torch.contiguous_format)
    terms = source.movedim(dim, 0).float().reshape(index.numel(), -1)
    index = torch.where(index < 0, index + rows.shape[0], index).long().reshape(-1)
    primitives.index_add(rows.view(rows.shape[0], -1), index, terms)
    return rows.movedim(0, dim).to(x.dtype).contiguous()


def embedding_backward(dy: Tensor, indices: Tensor, num: int, padding_idx: int, by_frequency: bool) -> Tensor:
    """``aten::embedding_dense_backward``.

    Raises:
        NotImplementedError: for `scale_grad_by_freq`.
    """
    if by_frequency:
        raise NotImplementedError("`scale_grad_by_freq=True` has no D2 kernel. HINT: leave it out.")
    width = dy.shape[-1]
    made = torch.zeros(num, width, device=dy.device)
    rows = dy.float().reshape(-1, width)
    index = indices.long().reshape(-1)
    primitives.index_add(made, index, rows)
    if 0 <= padding_idx < num:
        made[padding_idx] = 0
    return made.to(dy.dtype)


def scatter_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """``aten::scatter_add``."""
    if x.dim() == 0:
        return x + source
    flat = x.float().clone(memory_format=torch.contiguous_format)
    dim = dim % x.dim()
    inside = source[tuple(slice(0, size) for size in index.shape)]
    place = torch.zeros(index.shape, dtype=torch.int64, device=x.device)
    for d in range(x.dim()):
        shape = [1] * x.dim()
        shape[d] = index.shape[d]
        where = index if d == dim else torch.arange(index.shape[d], device=x.device).view(shape)
        place = place + where * flat.stride(d)
    primitives.index_add(flat.view(-1, 1), place.reshape(-1), inside.float().reshape(-1, 1))
    return flat.to(x.dtype)


def index_put(
    x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False, unsafe: bool = False
) -> Tensor:
    """``aten::index_put`` and ``_index_put_impl``; accumulation in ascending order of the values' positions."""
    if not accumulate:
        return torch.index_put(x, indices, values)  # type: ignore[arg-type]
    numbers = torch.arange(x.numel(), device=x.device).view(x.shape)
    places = numbers[tuple(slice(None) if i is None else i for i in indices)]
    flat = x.float().clone(memory_format=torch.contiguous_format)
    terms = values.float().expand(places.shape).reshape(-1, 1)
    primitives.index_add(flat.view(-1, 1), places.reshape(-1), terms)
    return flat.to(x.dtype)


def sort(x: Tensor, dim: int = -1, descending: bool = False, *, stable: bool | None = None) -> tuple[Tensor, Tensor]:
    """``aten::sort``, always stable."""
    made = torch.sort(x, dim=dim, descending=descending, stable=True)
    return made.values, made.indices


def topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:  # noqa: A002
    """``aten::topk``, from a stable sort."""
    values, indices = sort(x, dim, largest)
    return values.narrow(dim, 0, k).clone(), indices.narrow(dim, 0, k).clone()
