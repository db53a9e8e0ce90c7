"""Random numbers: Philox, keyed by one 64-bit draw from torch's CPU generator per call.

The CPU generator is state that every device type has, that each EST owns and that checkpoints hold, so the sequence of
calls in one EST fixes all keys, whatever the device and the grid. Whole numbers and permutations are drawn on the CPU
with torch's own kernels, which are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import primitives
from .arithmetic import divide

_WORD = torch.iinfo(torch.int64)


def draw_key(generator: torch.Generator | None = None) -> int:
    """The key of a call, drawn from torch's CPU generator or from another one of the CPU."""
    if generator is not None and generator.device.type != "cpu":
        generator = None
    drawn = torch.empty((), dtype=torch.int64).random_(_WORD.min, None, generator=generator)
    return int(drawn.item()) & 0xFFFFFFFFFFFFFFFF


def uniform_(x: Tensor, low: float = 0, high: float = 1, generator: torch.Generator | None = None) -> Tensor:
    """Fill with ``u * (high - low) + low``."""
    drawn = primitives.random("uniform", draw_key(generator), x)
    return x.copy_(drawn if (low, high) == (0, 1) else drawn * (high - low) + low)


def normal_(x: Tensor, mean: float = 0, std: float = 1, generator: torch.Generator | None = None) -> Tensor:
    """Fill with ``z * std + mean``."""
    drawn = primitives.random("normal", draw_key(generator), x)
    return x.copy_(drawn if (mean, std) == (0, 1) else drawn * std + mean)


def _chosen(x: Tensor, p: Tensor | float, generator: torch.Generator | None) -> Tensor:
    drawn = primitives.random("uniform", draw_key(generator), x)
    return drawn < (p.float() if isinstance(p, Tensor) else p)


def bernoulli_(x: Tensor, p: Tensor | float = 0.5, generator: torch.Generator | None = None) -> Tensor:
    """Fill with 1 where ``u < p``, else 0."""
    return x.copy_(_chosen(x, p, generator))


def bernoulli(x: Tensor, p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    """A new tensor of zeros and ones, with probability `p` or, without it, `x`."""
    return _chosen(x, x if p is None else p, generator).to(x.dtype)


def _noise(kept: Tensor, keep: float, dtype: torch.dtype) -> Tensor:
    """1 / keep where kept, else 0, as torch's composite dropout makes it."""
    return divide(kept.to(dtype), keep)


def dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """``aten::native_dropout``: result and mask, with the bits of the dropout that torch composes on the CPU."""
    if not (train is None or train) or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    if p != 1 and (fused := _fused(x)) is not None:
        made: tuple[Tensor, Tensor] = fused.dropout(x, draw_key(), 1 - p)
        return made
    kept = _chosen(x, 1 - p, None)
    return (torch.zeros_like(x) if p == 1 else x * _noise(kept, 1 - p, x.dtype)), kept


def dropout_backward(dy: Tensor, mask: Tensor, scale: float) -> Tensor:
    """``aten::native_dropout_backward``."""
    if scale != 0 and mask.dtype == torch.bool and (fused := _fused(dy, mask)) is not None:
        made: Tensor = fused.dropout_backward(dy, mask, 1 / scale)
        return made
    return torch.zeros_like(dy) if scale == 0 else dy * _noise(mask, 1 / scale, dy.dtype)


def _fused(x: Tensor, *others: Tensor) -> ModuleType | None:
    """The module that computes dropout as one kernel, where it takes these operands."""
    if x.dtype != torch.float32 or x.numel() == 0 or not all(v.is_contiguous() for v in (x, *others)):
        return None
    return primitives.fused(x)


def made(kind: str) -> Callable[..., Tensor]:
    """``aten::rand``, ``randn`` and their ``_like`` forms."""
    fill = uniform_ if kind == "uniform" else normal_

    def apply(shape: Any, *, generator: torch.Generator | None = None, **options: Any) -> Tensor:
        empty = torch.empty_like if isinstance(shape, Tensor) else torch.empty
        return fill(empty(shape, **options), generator=generator)

    return apply


def normal(mean: Tensor | float, std: Tensor | float = 1, size: Any = None, **options: Any) -> Tensor:
    """``aten::normal``: ``z * std + mean``."""
    generator = options.pop("generator", None)
    if size is not None:
        return normal_(torch.empty(size, **options), mean, std, generator)  # type: ignore[arg-type]
    given = mean if isinstance(mean, Tensor) else std
    assert isinstance(given, Tensor)
    shape = torch.broadcast_tensors(torch.as_tensor(mean), torch.as_tensor(std))[0].shape
    return normal_(torch.empty(shape, dtype=given.dtype, device=given.device), generator=generator) * std + mean


def on_cpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` with its numbers drawn on the CPU and moved to the device that was asked for."""

    def apply(*args: Any, device: Any = None, pin_memory: bool | None = None, **options: Any) -> Tensor:
        generator = options.get("generator")
        if generator is not None and generator.device.type != "cpu":
            options["generator"] = None
        tensors = [a for a in args if isinstance(a, Tensor)]
        drawn = function(*(a.cpu() if isinstance(a, Tensor) else a for a in args), **options)
        return drawn.to(device or (tensors[0].device if tensors else "cpu"))

    return apply


def random_(x: Tensor, *limits: int | None, generator: torch.Generator | None = None) -> Tensor:
    """Fill with whole numbers."""
    if generator is not None and generator.device.type != "cpu":
        generator = None
    return x.copy_(torch.empty(x.shape, dtype=x.dtype).random_(*limits, generator=generator))
