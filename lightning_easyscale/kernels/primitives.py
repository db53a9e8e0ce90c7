"""The primitives of the format on any device: each picks the CPU or the CUDA implementation, which have equal bits.

Everything here takes and returns fp32 tensors; the operations built on them (`linear.py`, `reductions.py`) convert.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

SEGMENT, BLOCK = 256, 4096
"""Values of k in a segment and in a block of a dot product, as in `kernels.cpp` and `cuda_kernels.py`."""

_FLOAT = torch.float32
_LARGEST = torch.finfo(_FLOAT).max


@cache
def module(name: str) -> ModuleType:
    """A module of kernels, imported where it is needed: some need a compiler, some Triton."""
    return import_module(f".{name}", __package__)


def _backend(x: Tensor) -> ModuleType:
    if x.is_cpu:
        return module("cpu")
    if x.is_cuda:
        return module("cuda")
    raise NotImplementedError(
        f"D2's `portable` policy has no kernels for the device `{x.device}`. HINT: use CPU or CUDA devices."
    )


def pooling(x: Tensor, y: Tensor) -> ModuleType | None:
    """`cuda_pooling` for CUDA tensors, where it pools an operand of the one shape to a result of the other."""
    found = module("cuda_pooling") if x.is_cuda else None
    return found if found is not None and found.takes(x, y) else None


def fused(x: Tensor) -> ModuleType | None:
    """`cuda_fused` for CUDA tensors: whole operations as one kernel, which have the bits of their composed forms."""
    return module("cuda_fused") if x.is_cuda else None


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)`` for less than a microsecond where there is nothing to do."""
    return x if x.dtype is dtype else x.to(dtype)


def wide(x: Tensor) -> Tensor:
    """``x.float()``, likewise."""
    return x if x.dtype is _FLOAT else x.float()


def like_layout(made: Tensor, x: Tensor) -> Tensor:
    """`made` in channels-last order where the input is."""
    if x.is_contiguous():
        return made
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return made.contiguous(memory_format=last) if last is not None and x.is_contiguous(memory_format=last) else made


def matmul(a: Tensor, b: Tensor, into: Tensor | None = None) -> Tensor:
    """Products ``a[i] @ b[i]`` of the format.

    Args:
        a: ``[m, k]`` or ``[batch, m, k]``, any strides.
        b: ``[k, n]`` or ``[batch, k, n]``, any strides.
        into: contiguous, as the result; holds the sum of the blocks of k before these ones; continued in place. Only if
            those were whole blocks has the result the bits of one product.

    Returns:
        ``[m, n]`` or ``[batch, m, n]``, contiguous.
    """
    if a.numel() == 0 or b.numel() == 0:
        return a.new_zeros(*a.shape[:-1], b.shape[-1]) if into is None else into
    return _backend(a).matmul(a, b, into)


def sum_with_matmul(base: Tensor, a: Tensor, b: Tensor) -> Tensor | None:
    """``base + a @ b`` of fp32 tensors as one kernel, where there is one; `base` may be broadcast."""
    if not a.is_cuda or not base.dtype == a.dtype == b.dtype == torch.float32:
        return None
    shape = torch.Size((*a.shape[:-1], b.shape[-1]))
    if a.numel() == 0 or b.numel() == 0 or base.dim() > len(shape):
        return None
    made: Tensor = _backend(a).matmul(a, b, base=base if base.shape == shape else base.expand(shape))
    return made


def sum_middle(x: Tensor) -> Tensor:
    """Sums of ``[outer, rows, inner]`` over its middle, ``[outer, inner]``."""
    if x.numel() == 0:
        return x.new_zeros(x.shape[0], x.shape[2])
    return _backend(x).sum_middle(x.contiguous())


def unary(name: str, x: Tensor) -> Tensor:
    """An elementary function, one of `cpu.UNARY`; keeps the memory format."""
    if x.numel() == 0:
        return torch.empty_like(x)
    made = torch.empty_like(x)  # dense, with the strides that torch gives the result
    dense = x if made.stride() == x.stride() else made.copy_(x)
    return _backend(x).unary(name, dense)


def quotient(a: Tensor | float, b: Tensor | float) -> Tensor | None:
    """``a / b`` of an fp32 tensor and a number as one kernel, where there is one."""
    x, number = (a, b) if isinstance(a, Tensor) else (b, a)
    if isinstance(number, Tensor) or not isinstance(x, Tensor) or not isinstance(number, (int, float)):
        return None
    if not x.is_cuda or x.dtype != torch.float32 or x.numel() == 0:
        return None
    if not -_LARGEST <= number <= _LARGEST or number != float(number):
        return None  # torch refuses a larger one, and rounds a longer one once
    made: Tensor = _backend(x).quotient(x, float(number), of_number=x is b)
    return made


def random(kind: str, key: int, like: Tensor) -> Tensor:
    """Random numbers, fp32: ``uniform`` in [0, 1) or standard ``normal``.

    Args:
        kind: the distribution.
        key: 64 bits that no other call has.
        like: gives shape and device.
    """
    out = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    return _backend(like).random(kind, key, out) if out.numel() else out


def index_add(out: Tensor, index: Tensor, source: Tensor) -> Tensor:
    """Add ``source[r]`` to ``out[index[r]]`` in place, r ascending.

    Args:
        out: ``[n, width]``, contiguous.
        index: ``[rows]``, int64, each in 0..n-1.
        source: ``[rows, width]``.
    """
    if source.numel() == 0:
        return out
    return _backend(out).index_add(out, index.contiguous(), source.contiguous())
