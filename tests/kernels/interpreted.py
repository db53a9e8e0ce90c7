"""Triton's kernels run by its interpreter, on CPU tensors: in a process that starts with ``TRITON_INTERPRET=1``.

The interpreter computes a fused multiply-add as a product and a sum, so it is taught to round once. As a program
(``python -m tests.kernels.interpreted``) it compares attention with its composed form.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

assert os.environ.get("TRITON_INTERPRET") == "1"

from triton.runtime import interpreter  # noqa: E402

from lightning_easyscale.kernels import attention, cuda_attention, launch, plans  # noqa: E402

from .attention import Attention  # noqa: E402
from .cases import differences  # noqa: E402


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


CALLS = [
    Attention((1, 1, 1, 1, 4, 4)),
    Attention((2, 2, 3, 5, 4, 4), causal=True, dropout=0.3),
    Attention((2, 2, 3, 8, 4, 4), "bool", (2, 1, 3, 8), dropout=0.3),
    Attention((2, 2, 3, 8, 4, 4), "trained", (1, 2, 3, 8), dropout=0.3, dtype=torch.bfloat16),
    Attention((1, 2, 3, 16, 4, 4), "float", (2, 3, 1), dropout=1.0),
    Attention((1, 2, 3, 129, 4, 4), "float", (1, 1, 3, 129), dropout=0.1, special=True),
    Attention((1, 2, 3, 256, 4, 4), "float", (1, 2, 3, 256), dropout=0.1, special=True),
    Attention((1, 1, 3, 130, 4, 4), causal=True, special=True),
    Attention((1, 1, 1, 1030, 4, 4), "bool", (1, 1, 1, 1030), dropout=0.1),
    Attention((1, 1, 1, 4100, 4, 4), "float", (1, 4100), dropout=0.1),
]


def compare() -> bool:
    """Whether all calls have the bits of their composed forms, in all ways."""
    good = True
    for call in CALLS:
        expected = call.run()
        for registers, many, piece in ((8, 4096, 1 << 24), (0, 4096, 1 << 24), (8, 1, 1 << 24), (0, 1, 1)):
            plans.forget_plans()
            with (
                interpreted(),
                mock.patch.object(attention, "_fused", return_value=cuda_attention),
                mock.patch.object(attention, "_PIECE", piece),
                mock.patch.object(cuda_attention, "_IN_REGISTERS", registers),
                mock.patch.object(cuda_attention, "_MANY", many),
            ):
                found = differences(expected, call.run(whole=True))
            print(call.title, registers, many, piece, *(found or ["equal"]), flush=True)
            good = good and not found
    return good


if __name__ == "__main__":
    sys.exit(not compare())
