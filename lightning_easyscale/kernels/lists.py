"""Operations on lists of tensors (``_foreach``), of which optimizers are made.

Torch's kernels for lists round a sum, a product or a quotient once, but fuse a product and a sum. So lists of fp32
tensors on one device are computed by sequences of such kernels, and other lists tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = list[Tensor] | tuple[Tensor, ...]
_Last = tuple[Any, ...]  # the last operation of a sequence, and its operands


def _times(xs: Any, value: Any) -> Any:
    """The product with a number or a list of numbers, of tensors; numbers stay."""
    if not isinstance(xs, (list, tuple)) or not isinstance(xs[0], Tensor):
        return xs
    return xs if isinstance(value, (int, float)) and value == 1 else torch._foreach_mul(xs, value)


def _add(xs: Tensors, other: Any, alpha: float = 1) -> _Last:
    return "add", xs, _times(other, alpha)


def _sub(xs: Tensors, other: Any, alpha: float = 1) -> _Last:
    return "sub", xs, _times(other, alpha)


def _div(xs: Tensors, other: Any) -> _Last:
    return "div", xs, other


def _addcmul(xs: Tensors, a: Tensors, b: Tensors, value: Any = 1) -> _Last:
    return "add", xs, torch._foreach_mul(_times(a, value), b)


def _addcdiv(xs: Tensors, a: Tensors, b: Tensors, value: Any = 1) -> _Last:
    return "add", xs, torch._foreach_div(_times(a, value), b)


def _lerp(xs: Tensors, ends: Tensors, weight: float) -> _Last:
    away = torch._foreach_sub(ends, xs)
    if abs(weight) < 0.5:
        return "add", xs, torch._foreach_mul(away, weight)
    return "sub", ends, torch._foreach_mul(away, 1 - weight)


def _sqrt(xs: Tensors) -> _Last:
    return "sqrt", xs


_TOGETHER: dict[str, Callable[..., _Last]] = {
    "add": _add,
    "sub": _sub,
    "div": _div,
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "lerp": _lerp,
    "sqrt": _sqrt,
}


def _can_be_together(name: str, operands: Sequence[Any]) -> bool:
    devices: set[torch.device] = set()
    for operand in operands:
        if isinstance(operand, (list, tuple)) and operand and isinstance(operand[0], Tensor):
            if {x.dtype for x in operand} != {torch.float32}:
                return False
            devices.update([x.device for x in operand])
        elif isinstance(operand, Tensor) or (name == "lerp" and isinstance(operand, (list, tuple))):
            return False
    # The CPU's square root is not exact.
    return len(devices) == 1 and (name != "sqrt" or devices.pop().type == "cuda")


def on_lists(name: str, function: Callable[..., Tensor], *, in_place: bool) -> Callable[..., Any]:
    """The operation on lists that repeats `function`, the operation `name` on single tensors.

    Other lists among its arguments hold one for each tensor; other arguments are shared.
    """

    def apply(tensors: Tensors, *args: Any, **kwargs: Any) -> Any:
        if "scalars" in kwargs:
            kwargs["value"] = kwargs.pop("scalars")
        elif name in ("addcmul", "addcdiv") and len(args) == 3:
            *args, kwargs["value"] = args  # type: ignore[assignment]
        together = _TOGETHER.get(name)
        if together is not None and _can_be_together(name, [tensors, *args, *kwargs.values()]):
            last, *operands = together(tensors, *args, **kwargs)
            if in_place and operands[0] is tensors:
                getattr(torch, f"_foreach_{last}_")(*operands)
                return None
            results = getattr(torch, f"_foreach_{last}")(*operands)
        else:
            results = [
                function(x, *(_of(v, i) for v in args), **{k: _of(v, i) for k, v in kwargs.items()})
                for i, x in enumerate(tensors)
            ]
        if not in_place:
            return results
        torch._foreach_copy_(list(tensors), results)
        return None

    return apply


def _of(value: Any, i: int) -> Any:
    return value[i] if isinstance(value, (list, tuple)) else value
