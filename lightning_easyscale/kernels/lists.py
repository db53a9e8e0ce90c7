"""Operations on lists of tensors (``_foreach``), of which optimizers are made.

Torch's kernels for lists round a sum, a product or a quotient once, but fuse a product and a sum. So lists of fp32
tensors on one device are computed by sequences of such kernels, and other lists tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

Tensors = list[Tensor] | tuple[Tensor, ...]
_Last = tuple[Any, ...]  # the last operation of a sequence, and its operands
_dtype = attrgetter("dtype")


def _times(xs: Any, value: Any) -> tuple[Any, bool]:
    """The product with a number or a list of numbers, of tensors, and whether it was made; numbers stay."""
    if isinstance(value, (int, float)) and value == 1:
        return xs, False
    if isinstance(xs, Tensor):
        return xs * value, True
    if not isinstance(xs, (list, tuple)) or not isinstance(xs[0], Tensor):
        return xs, False
    return torch._foreach_mul(xs, value), True


def _add(xs: Tensors, other: Any, alpha: float = 1) -> _Last:
    return "add", xs, _times(other, alpha)[0]


def _sub(xs: Tensors, other: Any, alpha: float = 1) -> _Last:
    return "sub", xs, _times(other, alpha)[0]


def _div(xs: Tensors, other: Any) -> _Last:
    return "div", xs, other


def _addcmul(xs: Tensors, a: Tensors, b: Tensors, value: Any = 1) -> _Last:
    a, made = _times(a, value)
    if not made:
        return "add", xs, torch._foreach_mul(a, b)
    torch._foreach_mul_(a, b)
    return "add", xs, a


def _addcdiv(xs: Tensors, a: Tensors, b: Tensors, value: Any = 1) -> _Last:
    a, made = _times(a, value)
    if not made:
        return "add", xs, torch._foreach_div(a, b)
    torch._foreach_div_(a, b)
    return "add", xs, a


def _lerp(xs: Tensors, ends: Tensors, weight: float) -> _Last:
    away = torch._foreach_sub(ends, xs)
    near = abs(weight) < 0.5
    torch._foreach_mul_(away, weight if near else 1 - weight)
    return ("add", xs, away) if near else ("sub", ends, away)


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


def _can_be_together(name: str, operands: Iterable[Any]) -> bool:
    """Whether all tensors are of fp32 and on one device; hundreds are looked at in every step, so not one by one."""
    devices: set[int] = set()
    first: Tensor | None = None
    for operand in operands:
        if isinstance(operand, (list, tuple)) and operand and isinstance(operand[0], Tensor):
            first = operand[0]
            if {*map(_dtype, operand)} != {torch.float32}:
                return False
            devices.update(map(Tensor.get_device, operand))
        elif isinstance(operand, Tensor):  # optimizers count steps so
            if name != "add" or operand.dim() or operand.dtype is not torch.float32:
                return False
            devices.add(operand.get_device())
        elif name == "lerp" and isinstance(operand, (list, tuple)):
            return False
    # What is on no CUDA device is on the CPU, whose square root is not exact, or on none.
    return (
        first is not None and len(devices) == 1 and (first.is_cuda or (first.device.type == "cpu" and name != "sqrt"))
    )


def _named(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Sequence[Any], dict[str, Any]]:
    """Arguments with `value` where it belongs."""
    if "scalars" in kwargs:
        kwargs = {**kwargs, "value": kwargs["scalars"]}
        del kwargs["scalars"]
    elif name in ("addcmul", "addcdiv") and len(args) == 4:
        *args, value = args
        kwargs = {**kwargs, "value": value}
    return args, kwargs


def together(name: str, *, in_place: bool) -> Callable[[Sequence[Any], dict[str, Any]], Any] | None:
    """The operation `name` on lists as a sequence of torch's kernels for lists, where there is one.

    It takes arguments and keyword arguments, and returns NotImplemented for lists that it does not take.
    """
    sequence = _TOGETHER.get(name)
    if sequence is None:
        return None

    def apply(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if not _can_be_together(name, (*args, *kwargs.values())):
            return NotImplemented
        args, kwargs = _named(name, args, kwargs)
        last, *operands = sequence(*args, **kwargs)
        if not in_place:
            return getattr(torch, f"_foreach_{last}")(*operands)
        if operands[0] is args[0]:
            getattr(torch, f"_foreach_{last}_")(*operands)
        else:
            torch._foreach_copy_(list(args[0]), getattr(torch, f"_foreach_{last}")(*operands))
        return None

    return apply


def one_by_one(name: str, function: Callable[..., Tensor], *, in_place: bool) -> Callable[..., Any]:
    """The operation on lists that repeats `function`, the operation `name` on single tensors.

    Other lists among its arguments hold one for each tensor; other arguments are shared.
    """

    def apply(*args: Any, **kwargs: Any) -> Any:
        (tensors, *rest), kwargs = _named(name, args, kwargs)
        results = [
            function(x, *(_of(v, i) for v in rest), **{k: _of(v, i) for k, v in kwargs.items()})
            for i, x in enumerate(tensors)
        ]
        if not in_place:
            return results
        torch._foreach_copy_(list(tensors), results)
        return None

    return apply


def _of(value: Any, i: int) -> Any:
    return value[i] if isinstance(value, (list, tuple)) else value
