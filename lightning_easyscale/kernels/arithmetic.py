"""Arithmetic that rounds once per element: in fp32, then to the type of the result.

Not all of torch's kernels do. On CUDA a division by a number multiplies by the number's reciprocal; on the CPU a square
root is MKL's, which is one unit off for a seventh of all arguments; a sum of a bf16 tensor and a number rounds the
number to bf16 on the CPU and not on CUDA; a bf16 range adds rounded numbers on the CPU; the remainder of a vector is
inexact for large quotients. These are the forms that have no such freedom.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import primitives

_REDUCED = (torch.float16, torch.bfloat16)


def operand(value: Tensor | float, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """An operand as a tensor on the device of `like`, where a number is one without dimensions."""
    if isinstance(value, Tensor):
        if value.device == like.device:
            return value.to(dtype)
        value = float(value)
    return torch.full((), value, dtype=dtype, device=like.device)


def _pair(a: Tensor | float, b: Tensor | float) -> tuple[Tensor, Tensor]:
    tensors = [x for x in (a, b) if isinstance(x, Tensor)]
    like = max(tensors, key=lambda x: (x.dim() > 0, x.device.type != "cpu"))
    dtype = torch.float64 if torch.result_type(a, b) == torch.float64 else torch.float32
    return operand(a, like, dtype), operand(b, like, dtype)


def _result(a: Tensor | float, b: Tensor | float) -> torch.dtype:
    dtype = torch.result_type(a, b)
    return dtype if dtype.is_floating_point else torch.get_default_dtype()


def divide(a: Tensor | float, b: Tensor | float, *, rounding_mode: str | None = None) -> Tensor:
    """``aten::div``: the quotient, rounded to nearest; `rounding_mode` as in torch."""
    if rounding_mode is not None and not torch.result_type(a, b).is_floating_point:
        return torch.div(a, b, rounding_mode=rounding_mode)
    if rounding_mode is None and (made := primitives.quotient(a, b)) is not None:
        return made
    x, y = _pair(a, b)
    if rounding_mode == "floor":
        made = torch.div(x.double(), y.double(), rounding_mode="floor")
    else:
        made = x / y
        made = made.trunc() if rounding_mode == "trunc" else made
    return made.to(_result(a, b))


def square_root(x: Tensor) -> Tensor:
    """``aten::sqrt``, rounded to nearest."""
    return primitives.unary("sqrt", x.float()).to(_result(x, 1.0))


def reciprocal(x: Tensor) -> Tensor:
    """``aten::reciprocal``."""
    return divide(1.0, x)


def _exact_in_double(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def apply(a: Tensor | float, b: Tensor | float) -> Tensor:
        if not torch.result_type(a, b).is_floating_point:
            return function(a, b)  # type: ignore[arg-type]
        x, y = _pair(a, b)
        return function(x.double(), y.double()).to(_result(a, b))

    return apply


fmod = _exact_in_double(torch.fmod)
remainder = _exact_in_double(torch.remainder)


def floor_divide(a: Tensor | float, b: Tensor | float) -> Tensor:
    """``aten::floor_divide``."""
    return divide(a, b, rounding_mode="floor")


def _once(function: Callable[..., Tensor], a: Tensor | float, b: Tensor | float) -> Tensor:
    """`function` of two operands, in fp32 where torch would compute in a reduced type."""
    dtype = torch.result_type(a, b)
    if dtype not in _REDUCED:
        return function(a, b)
    return function(*_pair(a, b)).to(dtype)


def _scaled(x: Tensor | float, alpha: float) -> Tensor | float:
    return x if alpha == 1 else x * alpha


def add(x: Tensor, other: Tensor | float, alpha: float = 1) -> Tensor:
    """``x + alpha * other``: the product is rounded first."""
    return _once(torch.add, x, _scaled(other, alpha))


def add_(x: Tensor, other: Tensor | float, alpha: float = 1) -> Tensor:
    """`add` in place."""
    if x.dtype in _REDUCED or x.dtype != torch.result_type(x, other):
        return x.copy_(add(x, other, alpha))
    return x.add_(_scaled(other, alpha))


def sub(x: Tensor, other: Tensor | float, alpha: float = 1) -> Tensor:
    """``x - alpha * other``."""
    return _once(torch.sub, x, _scaled(other, alpha))


def rsub(x: Tensor, other: Tensor | float, alpha: float = 1) -> Tensor:
    """``other - alpha * x``."""
    return _once(torch.rsub, _scaled(x, alpha), other)  # type: ignore[arg-type]
