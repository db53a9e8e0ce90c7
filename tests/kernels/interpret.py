"""Launches run by Triton's interpreter on CPU tensors, beside the composed forms: prints the cases whose bits differ.

Run as a program with ``TRITON_INTERPRET=1``, as Triton decides at its import. Its argument is one of `KINDS`.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_easyscale.kernels import (
    attention,
    cuda,
    cuda_attention,
    cuda_convolution,
    cuda_fused,
    cuda_pooling,
    cuda_winograd,
    normalization,
    plans,
    pooling,
)
from lightning_easyscale.kernels.convolution import Geometry, _weight_gradient

from . import winograd_reference
from .attention import Attention
from .cases import differences
from .interpreted import interpreted, launched

Compared = Iterator[tuple[str, list[Tensor], list[Tensor]]]

ATTENTION = [
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


def wide(*shape: int, seed: int) -> Tensor:
    """Magnitudes of a wide range, and zeros of both signs."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * 2.0 ** torch.randint(-30, 30, shape, generator=g)
    return torch.where(torch.rand(shape, generator=g) < 0.1, x * 0, x)


def batch_norms() -> Compared:
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


def folds() -> Compared:
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


def pools() -> Compared:
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


def depthwise() -> Compared:
    """Weight gradients of one segment and of several."""
    for n, c, size in ((1, 3, 5), (1, 34, 9), (2, 2, 25)):
        x, dy = (wide(n, c, size, size, seed=seed) for seed in (1, 2))
        g = Geometry(x.shape, (c, 1, 3, 3), [1], [1], [1], c)
        found, expected = cuda_convolution.weight_gradient(x, dy, g), _weight_gradient(x, dy, g)
        yield f"depthwise {n} {c} {size}", [found], [expected]


def squares() -> Compared:
    """Winograd's transforms."""
    made: list[Tensor] = []
    for case in winograd_reference.CASES:
        for name, found, expected in winograd_reference.compared(cuda_winograd, *case):
            yield f"{name} {case}", [found], [expected]
    with tempfile.NamedTemporaryFile() as file:  # with a hole in it
        far = torch.from_file(file.name, shared=True, size=(1 << 31) + 128)
        images = far.as_strided((3, 2, 4, 5), ((1 << 30) + 40, 20, 5, 1)).copy_(wide(3, 2, 4, 5, seed=1))
        for module in (cuda_winograd.input_squares, winograd_reference.input_squares):
            made.append(module(images, (1, 1), (4, 5), 0, 18))
        yield "images beyond 32-bit offsets", [made[0]], [made[1]]
        for module in (cuda_winograd.gradient_squares, winograd_reference.gradient_squares):
            made.append(module(images, 0, 18))
        yield "gradients beyond 32-bit offsets", [made[2]], [made[3]]


def attentions() -> Compared:
    """Rows in registers and in loops, one and two in a program, scores in small pieces."""
    for call in ATTENTION:
        expected = call.run()
        for registers, many, piece in ((8, 4096, 1 << 24), (0, 4096, 1 << 24), (8, 1, 1 << 24), (0, 1, 1)):
            plans.forget_plans()
            with (
                mock.patch.object(attention, "_fused", return_value=cuda_attention),
                mock.patch.object(attention, "_PIECE", piece),
                mock.patch.object(cuda_attention, "_IN_REGISTERS", registers),
                mock.patch.object(cuda_attention, "_MANY", many),
            ):
                yield f"{call.title} {registers} {many} {piece}", call.run(whole=True), expected


KINDS: dict[str, Callable[[], Compared]] = {
    kind.__name__: kind for kind in (batch_norms, folds, pools, depthwise, squares, attentions)
}


def main(kind: str) -> None:
    """Print what kernels computed otherwise, and the names of those that ran."""
    with interpreted():
        for name, found, expected in KINDS[kind]():
            if differences(found, expected):
                print("differs:", name, differences(found, expected))
    print("launched:", *sorted(launched))


if __name__ == "__main__":
    main(sys.argv[1])
