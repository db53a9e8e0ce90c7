"""Triton's kernels run by its interpreter, on CPU tensors: in a process that starts with ``TRITON_INTERPRET=1``.

The interpreter computes a fused multiply-add as a product and a sum, so it is taught to round once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

assert os.environ.get("TRITON_INTERPRET") == "1"

from triton.runtime import interpreter  # noqa: E402

from lightning_easyscale.kernels import launch  # noqa: E402

launched: set[str] = set()
"""Names of the kernels that have run."""


def fma(x: Any, y: Any, z: Any) -> Any:
    """``x * y + z`` of fp32 arrays, rounded once.

    The product is exact in double precision. The sum is rounded to odd there, so the last rounding sees every tie.
    """
    product, z = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    with np.errstate(all="ignore"):
        total = product + z
        back = total - product
        lost = (product - (total - back)) + (z - back)
        even = (np.ascontiguousarray(total).view(np.int64) & 1) == 0
        nudge = np.isfinite(total) & (lost != 0) & even
        odd = np.where(nudge, np.nextafter(total, np.where(lost > 0, np.inf, -np.inf)), total)
        return odd.astype(np.float32)


class _Interpreter(interpreter.InterpreterBuilder):
    """Rounds fused multiply-adds once."""

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        """As the device computes it."""
        return interpreter.TensorHandle(fma(x.data, y.data, z.data), x.dtype.scalar)


def _patched(patch: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """A number that bounds a loop lies in an array, which the latest NumPy no longer converts."""

    def with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return with_index


def _launch(self: launch.Launch, *tensors: Tensor, free: tuple[Any, ...] = ()) -> None:
    launched.add(self._kernel.fn.__name__)
    self._kernel[self._grid](*tensors, *free, *self._fixed)


@contextmanager
def interpreted() -> Iterator[None]:
    """Kernels that are launched on CPU tensors are interpreted."""
    with (
        mock.patch.object(interpreter.InterpreterBuilder, "create_fma", _Interpreter.create_fma),
        mock.patch.object(interpreter, "_patch_lang_tensor", _patched(interpreter._patch_lang_tensor)),
        mock.patch.object(launch.Launch, "__call__", _launch),
        np.errstate(all="ignore"),
    ):
        yield
