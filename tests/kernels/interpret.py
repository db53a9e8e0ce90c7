"""Launches run by Triton's interpreter on CPU tensors, beside the composed forms: prints the cases whose bits differ.

Run as a program with ``TRITON_INTERPRET=1``, as Triton decides at its import. Its argument is one of `KINDS`.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime import interpreter

# NumPy 2 makes a number of an array of one element no more.
_SOURCE = inspect.getsource(interpreter).replace("int(self.handle.data)", "int(self.handle.data.item())")
exec(compile(_SOURCE, interpreter.__file__, "exec"), vars(interpreter))

from lightning_easyscale.kernels import (  # noqa: E402
    cuda,
    cuda_convolution,
    cuda_fused,
    cuda_pooling,
    launch,
    normalization,
    pooling,
)
from lightning_easyscale.kernels.convolution import Geometry, _weight_gradient  # noqa: E402

from .cases import differences  # noqa: E402

launched: set[str] = set()


def _launch(self: launch.Launch, *tensors: Tensor, free: tuple[Any, ...] = ()) -> None:
    launched.add(self._kernel.fn.__name__)
    self._kernel[self._grid](*tensors, *free, *self._fixed)


def wide(*shape: int, seed: int) -> Tensor:
    """Magnitudes of a wide range, and zeros of both signs."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * 2.0 ** torch.randint(-30, 30, shape, generator=g)
    return torch.where(torch.rand(shape, generator=g) < 0.1, x * 0, x)


def batch_norms() -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
    """Channels of one block and of several, with lengths of rows below and above the lanes of a block."""
    shapes = [(3, 6, 13, 11), (2, 5, 1, 1), (40, 2, 13, 13), (20, 1, 30, 31), (5, 2, 128, 1), (130, 3)]
    for shape, (scaled, shifted, running) in itertools.product(shapes, ((1, 1, 1), (0, 0, 0), (1, 0, 1))):
        x, dy, c = wide(*shape, seed=1), wide(*shape, seed=2), shape[1]
        w, b = (wide(c, seed=3) if scaled else None), (wide(c, seed=4) if shifted else None)
        ours, theirs = ((wide(c, seed=5), wide(c, seed=6).abs()) if running else None for _ in range(2))
        found = [*cuda_fused.batch_norm(x, w, b, ours, 0.1, 1e-5), *(ours or ())]
        made = normalization.batch_norm(x, w, b, *(theirs or (None, None)), True, 0.1, 1e-5)
        yield f"batch_norm {shape}", found, [*made, *(theirs or ())]
        _, mean, inverse = made
        found = list(cuda_fused.batch_norm_backward(dy, x, w, mean, inverse))
        expected = normalization.batch_norm_backward(dy, x, w, None, None, mean, inverse, True, 1e-5, [True] * 3)
        yield f"batch_norm_backward {shape}", found, list(expected)


def folds() -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
    """Spans of whole blocks and of broken ones, in one launch and in two."""
    for (batch, spans, count), each, go_on in itertools.product(
        ((1, 1, 5), (2, 16, 130), (3, 17, 1), (1, 40, 3), (2, 16 * 32 + 5, 7)), (1, 16), (True, False)
    ):
        x, start = wide(batch, spans, count, seed=1), wide(batch, count, seed=2).abs()
        expected = start.clone() if go_on else torch.zeros(batch, count)
        for block in x.split(each, 1):
            total = torch.zeros(batch, count)
            for span in block.unbind(1):
                total += span
            expected += total
        if spans == 1 and not go_on:
            x += 0.0  # which is no -0 where nothing is added
        found = cuda.fold(x, each, start.clone() if go_on else None)
        yield f"fold {tuple(x.shape)} {each} {go_on}", [found], [expected]


def pools() -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
    """Windows that overlap, that leave elements out, that are dilated, and that stick out."""
    cases = [((3, 3), (2, 2), (1, 1), 1, False), ((2, 2), (2, 2), (0, 0), 1, True), ((3, 2), (1, 2), (1, 0), 2, False)]
    cases += [((2, 3), (3, 4), (1, 1), 1, True), ((5, 4), (3, 1), (2, 2), 1, True)]
    for shape, (kernel, stride, padding, dilation, ceil) in itertools.product(((2, 3, 13, 11), (3, 9, 16)), cases):
        x = wide(*shape, seed=1)
        y, index = F.max_pool2d(x, kernel, stride, padding, dilation, ceil, return_indices=True)
        dy, dilated = wide(*y.shape, seed=2), (dilation, dilation)
        found = cuda_pooling.max_pool_backward(dy, index, x.shape, kernel, stride, padding, dilated)
        expected = pooling.max_pool2d_backward(dy, x, kernel, stride, padding, dilated, ceil, index)
        yield f"max_pool_backward {shape} {kernel}", [found], [expected]
        for padded, divisor in ((True, None), (False, None), (True, 7), (False, 1)):
            options = (kernel, stride, padding, ceil, padded, divisor)
            expected = pooling.avg_pool2d(x, *options)
            windows = (kernel, stride, padding, divisor or 0)
            found = cuda_pooling.avg_pool(x, tuple(expected.shape[-2:]), *windows, padded=padded)
            yield f"avg_pool {shape} {options}", [found], [expected]
            dy = wide(*expected.shape, seed=3)
            found = cuda_pooling.avg_pool_backward(dy, x.shape, *windows, padded=padded)
            yield f"avg_pool_backward {shape} {options}", [found], [pooling.avg_pool2d_backward(dy, x, *options)]


def depthwise() -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
    """Weight gradients of whole numbers, which are exact: the interpreter rounds a fused multiply-add twice."""
    for n, c, size in ((1, 3, 5), (1, 34, 9), (2, 2, 25)):
        x, dy = (wide(n, c, size, size, seed=seed).sign() for seed in (1, 2))
        g = Geometry(x.shape, (c, 1, 3, 3), [1], [1], [1], c)
        found, expected = cuda_convolution.weight_gradient(x, dy, g), _weight_gradient(x, dy, g)
        yield f"depthwise {n} {c} {size}", [found], [expected]


KINDS: dict[str, Callable[[], Iterator[tuple[str, list[Tensor], list[Tensor]]]]] = {
    kind.__name__: kind for kind in (batch_norms, folds, pools, depthwise)
}


def main(kind: str) -> None:
    """Print what kernels computed otherwise, and the names of those that ran."""
    launch.Launch.__call__ = _launch  # type: ignore[method-assign]
    for name, found, expected in KINDS[kind]():
        if differences(found, expected):
            print("differs:", name, differences(found, expected))
    print("launched:", *sorted(launched))


if __name__ == "__main__":
    main(sys.argv[1])
