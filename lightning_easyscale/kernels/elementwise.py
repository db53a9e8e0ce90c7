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


def arange(*limits: float, **options: Any) -> Tensor:
    """``start + i * step``, made in double precision from whole numbers."""
    start, end, step = {1: (0, *limits, 1), 2: (*limits, 1)}.get(len(limits), limits)
    dtype = options.pop("dtype", None)
    if all(isinstance(v, int) for v in (start, end, step)):
        return torch.arange(start, end, step, dtype=dtype, **options)
    count = max(0, math.ceil((end - start) / step))
    made = torch.arange(count, device=options.get("device")).double() * step + start
    return made.to(dtype or torch.get_default_dtype())


def linspace(start: float, end: float, steps: int, **options: Any) -> Tensor:
    """``start + i * ((end - start) / (steps - 1))``, made in double precision."""
    at = torch.arange(steps, device=options.get("device")).double()
    made = at * ((end - start) / max(1, steps - 1)) + start
    if steps > 1:
        made[-1] = end
    return made.to(options.get("dtype") or torch.get_default_dtype())


def elementary(name: str) -> Callable[[Tensor], Tensor]:
    """The operation of a function of `primitives.unary`, in any floating-point type."""

    def apply(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            x = x.to(torch.get_default_dtype())
        return primitives.unary(name, x.float()).to(x.dtype)

    return apply


def add(x: Tensor, other: Tensor | float, alpha: float = 1) -> Tensor:
    """``x + alpha * other``: the product is rounded first."""
    return torch.add(x, other if alpha == 1 else other * alpha)


def sub(x: Tensor, other: Tensor | float, alpha: float = 1) -> Tensor:
    """``x - alpha * other``."""
    return torch.sub(x, other if alpha == 1 else other * alpha)


def rsub(x: Tensor, other: Tensor | float, alpha: float = 1) -> Tensor:
    """``other - alpha * x``."""
    return torch.rsub(x if alpha == 1 else x * alpha, other)


def addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    """``x + (value * a) * b``."""
    return x + (a if value == 1 else a * value) * b


def addcdiv(x: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    """``x + (value * a) / b``."""
    return x + (a if value == 1 else a * value) / b


def lerp(x: Tensor, end: Tensor, weight: Tensor | float) -> Tensor:
    """``x + weight * (end - x)`` below a weight of one half, else ``end - (end - x) * (1 - weight)``."""
    away = end - x
    if isinstance(weight, Tensor):
        return torch.where(weight.abs() < 0.5, x + weight * away, end - away * (1 - weight))
    return x + away * weight if abs(weight) < 0.5 else end - away * (1 - weight)


def rsqrt(x: Tensor) -> Tensor:
    """``1 / sqrt(x)``."""
    return (1 / x.float().sqrt()).to(x.dtype)


def sigmoid(x: Tensor) -> Tensor:
    """``1 / (1 + exp(-x))``."""
    return (1 / (1 + primitives.unary("exp", -x.float()))).to(x.dtype)


def sigmoid_backward(dy: Tensor, y: Tensor) -> Tensor:
    """``(dy * (1 - y)) * y``."""
    g, y32 = dy.float(), y.float()
    return ((g * (1 - y32)) * y32).to(dy.dtype)


def tanh_backward(dy: Tensor, y: Tensor) -> Tensor:
    """``dy * (1 - y * y)``."""
    g, y32 = dy.float(), y.float()
    return (g * (1 - y32 * y32)).to(dy.dtype)


def silu(x: Tensor) -> Tensor:
    """``x * sigmoid(x)``."""
    wide = x.float()
    return (wide * sigmoid(wide)).to(x.dtype)


def silu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """``(dy * s) * (1 + x * (1 - s))`` with ``s = sigmoid(x)``."""
    g, wide = dy.float(), x.float()
    s = sigmoid(wide)
    return ((g * s) * (1 + wide * (1 - s))).to(dy.dtype)


_ROOT_HALF = math.sqrt(0.5)
_ROOT_TWO_OVER_PI = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """``(x / 2) * (1 + erf(x / sqrt(2)))``, or the approximation by tanh."""
    wide = x.float()
    if approximate == "tanh":
        inner = (wide + wide * wide * wide * _CUBIC) * _ROOT_TWO_OVER_PI
        return ((wide * 0.5) * (1 + primitives.unary("tanh", inner))).to(x.dtype)
    return ((wide * 0.5) * (1 + primitives.unary("erf", wide * _ROOT_HALF))).to(x.dtype)


def gelu_backward(dy: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    """The derivative of `gelu`, times ``dy``."""
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
    soft = primitives.unary("log1p", primitives.unary("exp", scaled)) / beta
    return torch.where(scaled > threshold, x.float(), soft).to(x.dtype)


def softplus_backward(dy: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    """``dy * (z / (1 + z))`` with ``z = exp(beta * x)``, and ``dy`` above the threshold."""
    scaled, g = x.float() * beta, dy.float()
    z = primitives.unary("exp", scaled)
    return torch.where(scaled > threshold, g, g * (z / (z + 1))).to(dy.dtype)


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
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    size = abs(exponent)
    if size == 0.5:
        made = wide.sqrt()
    else:
        made = torch.ones_like(wide)
        for i in range(int(size)):
            made = made * wide if i else wide.clone()
    return (1 / made if exponent < 0 else made).to(x.dtype)
