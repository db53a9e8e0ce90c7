"""Launches of Triton kernels that cost a few microseconds of Python.

Triton binds and inspects all arguments of every launch, to find the code that it compiled for such ones: it tells
apart types, pointers that are multiples of 16, and whole numbers that are 1 or multiples of 16. Here all that a launch
is made of but its pointers is fixed in a `Launch`, which a function of shapes makes once (`plans.py`). Its first launch
goes through Triton and says which code that is; the next ones with pointers of the same types and alignments, on the
same device, start that code. So Triton alone chooses code, and what is remembered is told apart more finely than it
does.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

# How Triton itself starts compiled code, the same in 3.6 to 3.9.
_START = "self.run(grid[0], grid[1], grid[2], stream, self.function, self.packed_metadata, launch_metadata,"


def _can_start_code() -> bool:
    """Whether this Triton starts compiled code in the way that is known here."""
    try:
        hooks = triton.knobs.runtime
        known = isinstance(hooks.launch_enter_hook.calls, list) and isinstance(hooks.launch_exit_hook.calls, list)
        return known and _START in inspect.getsource(CompiledKernel.__getitem__)
    except (AttributeError, OSError, TypeError):
        return False


_DIRECT = _can_start_code()


class Launch:
    """A launch of a kernel, without its pointers.

    Args:
        kernel: its parameters are pointers, numbers of any value, numbers, and constants, in this order.
        grid: how many programs, in up to three dimensions.
        numbers: the values of parameters that may choose the code.
        constants: the values of ``constexpr`` parameters.
        warps: warps of a program.
        stages: depth of the software pipeline.
    """

    __slots__ = ("_code", "_fixed", "_grid", "_kernel", "_options")

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        numbers: Sequence[int | float],
        constants: Sequence[int | bool],
        warps: int,
        stages: int,
    ) -> None:
        self._kernel = kernel
        self._grid = (*grid, *(1,) * (3 - len(grid)))
        self._fixed = (*numbers, *constants)
        # Products and sums are never fused.
        self._options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
        self._code: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __call__(self, *tensors: Tensor, free: tuple[int | float, ...] = ()) -> None:
        """Launch.

        Args:
            tensors: what the pointers point at.
            free: values of parameters that never choose the code: floats, and whole numbers of 32 bits that the kernel
                declares not to be specialized.
        """
        active = driver.active
        device = active.get_current_device()
        addresses = [x.data_ptr() for x in tensors]
        key = (device, *[a & 15 for a in addresses], *[x.dtype for x in tensors], *[x.get_device() for x in tensors])
        code = self._code.get(key)
        if code is None or _hooked():
            self._through_triton(key, tensors, free)
            return
        stream, grid = active.get_current_stream(device), self._grid
        run, function, metadata, _ = code
        run(*grid, stream, function, metadata, None, None, None, *addresses, *free, *self._fixed)

    def _through_triton(self, key: tuple[Any, ...], tensors: tuple[Tensor, ...], free: tuple[int | float, ...]) -> None:
        device, here = tensors[0].get_device(), key[0]
        if device != here:
            with torch.cuda.device(device):
                self._kernel[self._grid](*tensors, *free, *self._fixed, **self._options)
            return
        made = self._kernel[self._grid](*tensors, *free, *self._fixed, **self._options)
        if _DIRECT and isinstance(made, CompiledKernel) and all(x.get_device() == here for x in tensors):
            self._code[key] = (made.run, made.function, made.packed_metadata, made)


def _hooked() -> bool:
    """Whether a profiler listens to launches."""
    hooks = triton.knobs.runtime
    enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
    return bool(getattr(enter, "calls", True) or getattr(leave, "calls", True))
