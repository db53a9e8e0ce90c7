"""Elementwise operations that round more than once, written as operations that round once.

Each line below fixes an order of operations; torch's own kernels fuse some of them on some devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import primitives
from .arithmetic import add, divide, operand, square_root


def arange(*limits: float, **options: Any) -> Tensor:
    """``start + i * step``, made from whole numbers, otherwise in double precision, and rounded to its type once."""
    start, end, step = {1: (0, *limits, 1), 2: (*limits, 1)}.get(len(limits), limits)
    dtype = options.pop("dtype", None)
    if all(isinstance(v, int) for v in (start, end, step)):
        return torch.arange(start, end, step, dtype=torch.int64, **options).to(dtype or torch.int64)
    count = max(0, math.ceil((end - start) / step))
    made = torch.arange(count, device=options.get("device")).double() * step + start
    return made.float().to(dtype or torch.get_default_dtype())


def linspace(start: float, end: float, steps: int, **options: Any) -> Tensor:
    """``start + i * ((end - start) / (steps - 1))``, made in double precision."""
    at = torch.arange(steps, device=options.get("device")).double()
    made = at * ((end - start) / max(1, steps - 1)) + start
    if steps > 1:
        made[-1] = end
    return made.float().to(options.get("dtype") or torch.get_default_dtype())


def elementary(name: str) -> Callable[[Tensor], Tensor]:
    """The operation of a function of `primitives.unary`, in any floating-point type."""

    def apply(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            x = x.to(torch.get_default_dtype())
        return primitives.unary(name, x.float()).to(x.dtype)

    return apply


def addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    """``x + (value * a) * b``."""
    return add(x, (a if value == 1 else a * value) * b)


def addcdiv(x: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    """``x + (value * a) / b``."""
    return add(x, divide(a if value == 1 else a * value, b))


def lerp(x: Tensor, end: Tensor, weight: Tensor | float) -> Tensor:
    """``x + weight * (end - x)`` below a weight of one half, else ``end - (end - x) * (1 - weight)``."""
    wide, last = x.float(), end.float()
    away = last - wide
    if isinstance(weight, Tensor):
        w = operand(weight, x)
        made = torch.where(w.abs() < 0.5, wide + w * away, last - away * (1 - w))
    else:
        made = wide + away * weight if abs(weight) < 0.5 else last - away * (1 - weight)
    return made.to(x.dtype)


def rsqrt(x: Tensor) -> Tensor:
    """``1 / sqrt(x)``."""
    return divide(1.0, square_root(x.float())).to(x.dtype)


def threshold(x: Tensor, limit: float, value: float) -> Tensor:
    """``aten::threshold``; the limit is compared in fp32."""
    return torch.where(x.float() <= limit, torch.full((), value, dtype=x.dtype, device=x.device), x)


def threshold_backward(dy: Tensor, x: Tensor, limit: float) -> Tensor:
    """``aten::threshold_backward``."""
    if limit == 0:  # which every type has
        return torch.ops.aten.threshold_backward(dy, x, limit)
    return torch.where(x.float() <= limit, torch.zeros_like(dy), dy)


def hardtanh_backward(dy: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """``aten::hardtanh_backward``; the limits are compared in fp32."""
    wide = x.float()
    return torch.where((wide <= low) | (wide >= high), torch.zeros_like(dy), dy)


def _fused(name: str, x: Tensor, dy: Tensor | None = None) -> Tensor | None:
    """An activation, or its gradient, as one kernel, where there is one."""
    fused = primitives.fused(x)
    if fused is None or x.numel() == 0:
        return None
    made: Tensor
    if dy is None:
        made = primitives.cast(fused.activation(name, primitives.wide(x)), x.dtype)
    else:
        made = fused.activation_backward(name, primitives.wide(dy), primitives.wide(x))
        made = primitives.cast(made, dy.dtype)
    return made


def sigmoid(x: Tensor) -> Tensor:
    """``1 / (1 + exp(-x))``."""
    if (made := _fused("sigmoid", x)) is not None:
        return made
    return divide(1.0, 1 + primitives.unary("exp", -x.float())).to(x.dtype)


def sigmoid_backward(dy: Tensor, y: Tensor) -> Tensor:
    """``(dy * (1 - y)) * y``."""
    if (made := _fused("sigmoid", y, dy)) is not None:
        return made
    g, y32 = dy.float(), y.float()
    return ((g * (1 - y32)) * y32).to(dy.dtype)


def tanh_backward(dy: Tensor, y: Tensor) -> Tensor:
    """``dy * (1 - y * y)``."""
    g, y32 = dy.float(), y.float()
    return (g * (1 - y32 * y32)).to(dy.dtype)


def silu(x: Tensor) -> Tensor:
    """``x * sigmoid(x)``."""
    if (made := _fused("silu", x)) is not None:
        return made
    wide = x.float()
    return (wide * sigmoid(wide)).to(x.dtype)


def silu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """``(dy * s) * (1 + x * (1 - s))`` with ``s = sigmoid(x)``."""
    if (made := _fused("silu", x, dy)) is not None:
        return made
    g, wide = dy.float(), x.float()
    s = sigmoid(wide)
    return ((g * s) * (1 + wide * (1 - s))).to(dy.dtype)


_ROOT_HALF = math.sqrt(0.5)
_ROOT_TWO_OVER_PI = math.sqrt(2 / math.pi)
_CUBIC = 0.044715
_GELU = {"none": "gelu", "tanh": "gelu by tanh"}


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """``(x / 2) * (1 + erf(x / sqrt(2)))``, or the approximation by tanh."""
    if (made := _fused(_GELU[approximate], x)) is not None:
        return made
    wide = x.float()
    if approximate == "tanh":
        inner = (wide + wide * wide * wide * _CUBIC) * _ROOT_TWO_OVER_PI
        return ((wide * 0.5) * (1 + primitives.unary("tanh", inner))).to(x.dtype)
    return ((wide * 0.5) * (1 + primitives.unary("erf", wide * _ROOT_HALF))).to(x.dtype)


def gelu_backward(dy: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    """The derivative of `gelu`, times ``dy``."""
    if (made := _fused(_GELU[approximate], x, dy)) is not None:
        return made
    g, wide = dy.float(), x.float()
    square = wide * wide
    if approximate == "tanh":
        t = primitives.unary("tanh", (wide + square * wide * _CUBIC) * _ROOT_TWO_OVER_PI)
        slope = (1 + square * (3 * _CUBIC)) * _ROOT_TWO_OVER_PI
        derivative = 0.5 * (1 + t) + (wide * 0.5) * ((1 - t * t) * slope)
    else:
        normal = 0.5 * (1 + primitives.unary("erf", wide * _ROOT_HALF))
        density = primitives.unary("exp", square * -0.5) * (_ROOT_TWO_OVER_PI / 2)
        derivative = normal + wide * density
    return (g * derivative).to(dy.dtype)


def softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """``log1p(exp(beta * x)) / beta``, and ``x`` above the threshold."""
    scaled = x.float() * beta
    soft = divide(primitives.unary("log1p", primitives.unary("exp", scaled)), beta)
    return torch.where(scaled > threshold, x.float(), soft).to(x.dtype)


def softplus_backward(dy: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    """``dy * (z / (1 + z))`` with ``z = exp(beta * x)``, and ``dy`` above the threshold."""
    scaled, g = x.float() * beta, dy.float()
    z = primitives.unary("exp", scaled)
    return torch.where(scaled > threshold, g, g * divide(z, z + 1)).to(dy.dtype)


def log_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    """``min(x, 0) - log1p(exp(-|x|))``, and the empty buffer that torch's operation returns."""
    wide = x.float()
    made = wide.clamp(max=0) - primitives.unary("log1p", primitives.unary("exp", -wide.abs()))
    return made.to(x.dtype), x.new_empty(0)


def log_sigmoid_backward(dy: Tensor, x: Tensor, buffer: Tensor) -> Tensor:
    """``dy * sigmoid(-x)``."""
    return (dy.float() * sigmoid(-x.float())).to(dy.dtype)


def power(x: Tensor | float, exponent: Tensor | float) -> Tensor:
    """Powers with the exponents 0, 0.5, 1, 2, 3 and their negatives, as products and roots.

    Raises:
        NotImplementedError: for any other power.
    """
    if isinstance(x, Tensor) and not x.is_floating_point() and isinstance(exponent, int):
        return torch.pow(x, exponent)
    if not isinstance(x, Tensor) or isinstance(exponent, Tensor) or abs(exponent) not in (0, 0.5, 1, 2, 3):
        raise NotImplementedError(
            f"the power with exponent {exponent} has no D2 kernel. HINT: use the exponents 0, 0.5, 1, 2 or 3, or their"
            " negatives."
        )
    wide = x.float()
    size = abs(exponent)
    if size == 0.5:
        made = square_root(wide)
    else:
        made = torch.ones_like(wide)
        for i in range(int(size)):
            made = made * wide if i else wide.clone()
    return (divide(1.0, made) if exponent < 0 else made).to(x.dtype)
