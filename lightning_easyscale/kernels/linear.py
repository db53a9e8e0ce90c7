"""Matrix products of the format."""

from __future__ import annotations

import torch
from torch import Tensor

from . import primitives


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of two matrices or of batches of them, in their type."""
    if a.dtype == b.dtype == torch.float32:
        return primitives.matmul(a, b)
    return primitives.matmul(a.float(), b.float()).to(torch.promote_types(a.dtype, b.dtype))


def mm(a: Tensor, b: Tensor) -> Tensor:
    """``[m, k] @ [k, n]``."""
    return _product(a, b)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """``[batch, m, k] @ [batch, k, n]``."""
    return _product(a, b)


def mv(a: Tensor, b: Tensor) -> Tensor:
    """``[m, k] @ [k]``."""
    return mm(a, b[:, None])[:, 0]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """``[k] @ [k]``."""
    return mm(a[None], b[:, None])[0, 0]


def _scaled(base: Tensor, product: Tensor, beta: float, alpha: float) -> Tensor:
    product = product if alpha == 1 else product * alpha
    if beta == 0:
        return product.clone()
    return (base if beta == 1 else base * beta) + product


def addmm(base: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta * base + alpha * (a @ b)``: the product is rounded to its type first."""
    if beta == 1 and alpha == 1 and (made := primitives.sum_with_matmul(base, a, b)) is not None:
        return made
    return _scaled(base, mm(a, b), beta, alpha)


def addmv(base: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """As `addmm`, with a vector."""
    return _scaled(base, mv(a, b), beta, alpha)


def baddbmm(base: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """As `addmm`, batched."""
    if beta == 1 and alpha == 1 and (made := primitives.sum_with_matmul(base, a, b)) is not None:
        return made
    return _scaled(base, bmm(a, b), beta, alpha)
