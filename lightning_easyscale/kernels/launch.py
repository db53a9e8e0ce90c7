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
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

_FLOAT = torch.float32

# How Triton itself starts compiled code, the same in 3.6 to 3.9, and what its launcher does then.
_START = "self.run(grid[0], grid[1], grid[2], stream, self.function, self.packed_metadata, launch_metadata,"
_HEAD = """self.launch(gridX, gridY, gridZ, stream, function, self.launch_cooperative_grid, self.launch_pdl,
                    """
_SPREAD = f"{_HEAD}global_scratch, profile_scratch, *args)"  # 3.6
_PACKED = f"""{_HEAD}kernel_metadata, launch_metadata, launch_enter_hook, launch_exit_hook, global_scratch,
                    profile_scratch, self.arg_annotations, self.kernel_signature, """
_ENDS = ("args)", "kernel_args)")  # 3.7, 3.8


def _can_start_code() -> bool:
    """Whether this Triton starts compiled code in the way that is known here."""
    try:
        hooks = triton.knobs.runtime
        known = isinstance(hooks.launch_enter_hook.calls, list) and isinstance(hooks.launch_exit_hook.calls, list)
        return known and _START in inspect.getsource(CompiledKernel.__getitem__)
    except (AttributeError, OSError, TypeError):
        return False


_DIRECT = _can_start_code()
_hooks: Any = triton.knobs.runtime if _DIRECT else None


def _source_of(launcher: Any) -> str:
    try:
        return inspect.getsource(type(launcher).__call__)
    except (OSError, TypeError):
        return ""


def _start(made: CompiledKernel) -> tuple[Any, ...]:
    """What starts code, and its arguments between the function and those of the kernel.

    Where no scratch memory is needed, Triton's launcher only hands its arguments to a function in C.
    """
    launcher = made.run
    how, source = (made.packed_metadata, None, None, None), _source_of(launcher)
    spread, packs = _SPREAD in source, any(_PACKED + end in source for end in _ENDS)
    if not (spread or packs) or launcher.global_scratch_size or launcher.profile_scratch_size:
        return launcher, how
    launch, options = launcher.launch, (launcher.launch_cooperative_grid, launcher.launch_pdl)
    if spread:
        return launch, (*options, None, None, *how)
    if getattr(launcher, "gsan_enabled", False):  # 3.8: a sanitizer that has arguments of its own
        return launcher, how
    given = (*options, *how, None, None, launcher.arg_annotations, launcher.kernel_signature)

    def packed(x: int, y: int, z: int, stream: int, function: int, *arguments: Any) -> None:
        launch(x, y, z, stream, function, *given, arguments)

    return packed, ()


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

    __slots__ = ("_code", "_fixed", "_grid", "_kernel", "_options", "_plain")

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
        self._code: dict[Hashable, tuple[Any, ...]] = {}
        self._plain: dict[int, tuple[Any, ...]] = {}

    def __call__(self, *tensors: Tensor, free: tuple[int | float, ...] = ()) -> None:
        """Launch.

        Args:
            tensors: what the pointers point at.
            free: values of parameters that never choose the code: floats, and whole numbers of 32 bits that the kernel
                declares not to be specialized.
        """
        active = driver.active
        device = active.get_current_device()
        addresses, together, plain = [], 0, True
        for x in tensors:
            address = x.data_ptr()
            addresses.append(address)
            together |= address
            if x.dtype is not _FLOAT or x.get_device() != device:
                plain = False
        # Nearly all launches are of fp32 tensors that start at multiples of 16.
        code = self._plain.get(device) if plain and not together & 15 else self._code.get(_key(tensors, device))
        if code is None or _hooks.launch_enter_hook.calls or _hooks.launch_exit_hook.calls:
            self._through_triton(tensors, free, device)
            return
        run, function, given, _ = code
        stream = active.get_current_stream(device)
        run(*self._grid, stream, function, *given, *addresses, *free, *self._fixed)

    def _through_triton(self, tensors: tuple[Tensor, ...], free: tuple[int | float, ...], here: int) -> None:
        device = tensors[0].get_device()
        if device != here:
            with torch.cuda.device(device):
                self._kernel[self._grid](*tensors, *free, *self._fixed, **self._options)
            return
        made = self._kernel[self._grid](*tensors, *free, *self._fixed, **self._options)
        if _DIRECT and isinstance(made, CompiledKernel) and all(x.get_device() == here for x in tensors):
            run, given = _start(made)
            key = _key(tensors, here)
            self._code[key] = code = (run, made.function, given, made)
            if not any(x.data_ptr() & 15 or x.dtype is not _FLOAT for x in tensors):
                self._plain[here] = code


def _key(tensors: tuple[Tensor, ...], device: int) -> Hashable:
    """What tells apart launches that may need other code."""
    alignments = [x.data_ptr() & 15 for x in tensors]
    return (device, *alignments, *[x.dtype for x in tensors], *[x.get_device() for x in tensors])
