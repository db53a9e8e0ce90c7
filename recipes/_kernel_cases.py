"""Operations whose kernels `kernels` measures: layers of the eight workloads at their published shapes, and in small.

A case is called as training calls it: through autograd. The gradients of a layer are cases of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FLOAT = 4  # bytes

GROUPS = ("product", "convolution", "grouped convolution", "attention", "softmax", "normalization")
GROUPS += ("elementwise", "embedding", "optimizer")


class Whole(NamedTuple):
    """Whole numbers below a limit, as operand."""

    limit: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One operation.

    Args:
        group: what it is compared with others as.
        name: the layer.
        part: of the layer's training step.
        operands: the shapes of normally distributed fp32 operands, or `Whole`.
        begin: makes the operation of the operands; called under the kernels that are measured.
        flops: floating-point operations, where these are the limit.
        bytes: what must be read and written at least, where that is the limit.
    """

    group: str
    name: str
    part: str
    operands: tuple[Any, ...]
    begin: Callable[..., Callable[[], Any]]
    flops: int = 0
    bytes: int = 0

    @property
    def title(self) -> str:
        """What tells it from the others."""
        return f"{self.name}, {self.part}"

    def make(self, device: torch.device) -> list[Tensor]:
        """Its operands."""
        generator = torch.Generator().manual_seed(0)
        made = []
        for spec in self.operands:
            if isinstance(spec, Whole):
                made.append(torch.randint(spec.limit, spec.shape, generator=generator).to(device))
            else:
                made.append(torch.randn(spec, generator=torch.Generator(device).manual_seed(len(made)), device=device))
        return made


def _forward(function: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    def begin(*operands: Tensor) -> Callable[[], Any]:
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in operands]
        return lambda: function(*leaves)

    return begin


def _gradient(function: Callable[..., Any], *wrt: int) -> Callable[..., Callable[[], Any]]:
    def begin(*operands: Tensor) -> Callable[[], Any]:
        leaves = [x.detach().requires_grad_(i in wrt) for i, x in enumerate(operands)]
        made = function(*leaves)
        wanted, given = [leaves[i] for i in wrt], made.detach().clone()
        return lambda: torch.autograd.grad(made, wanted, given, retain_graph=True)

    return begin


def _layer(group: str, name: str, function: Callable[..., Any], shapes: Sequence[Any], flops: int) -> Iterator[Case]:
    """Forward and both gradients, whose operations are as many."""
    yield Case(group, name, "forward", tuple(shapes), _forward(function), flops=flops)
    yield Case(group, name, "input gradient", tuple(shapes), _gradient(function, 0), flops=flops)
    yield Case(group, name, "weight gradient", tuple(shapes), _gradient(function, 1), flops=flops)


# Rows, inputs and outputs: BERT and Swin-T at batches of 8 and 32, NeuMF at 1024, VGG19 at 32.
_PRODUCTS = {
    "BERT projection": (3072, 768, 768),
    "BERT feed-forward": (3072, 768, 3072),
    "Swin queries, stage 1": (100352, 96, 288),
    "Swin feed-forward, stage 3": (6272, 384, 1536),
    "NeuMF layer": (1024, 256, 128),
    "VGG19 first classifier": (32, 25088, 4096),
    "VGG19 second classifier": (32, 4096, 4096),
}

# Images, channels in and out, size, kernel, stride, groups (0: each channel).
_CONVOLUTIONS = {
    "ResNet50 7x7/2 3-64": (64, 3, 64, 224, 7, 2, 1),
    "ResNet50 1x1 64-256": (64, 64, 256, 56, 1, 1, 1),
    "ResNet50 3x3 128-128": (64, 128, 128, 28, 3, 1, 1),
    "ResNet50 3x3/2 256-256": (64, 256, 256, 28, 3, 2, 1),
    "ResNet50 1x1 2048-512": (64, 2048, 512, 7, 1, 1, 1),
    "VGG19 3x3 64-64": (32, 64, 64, 224, 3, 1, 1),
    "VGG19 3x3 256-256": (32, 256, 256, 56, 3, 1, 1),
    "VGG19 3x3 512-512": (32, 512, 512, 14, 3, 1, 1),
    "ShuffleNetv2 depthwise 3x3 116": (128, 116, 116, 28, 3, 1, 0),
    "ShuffleNetv2 depthwise 3x3/2 58": (128, 58, 58, 56, 3, 2, 0),
    "ShuffleNetv2 1x1 116-116": (128, 116, 116, 28, 1, 1, 1),
    "ShuffleNet 1x1 240-240, 3 groups": (128, 240, 240, 28, 1, 1, 3),
    "YOLOv3 3x3/2 32-64": (8, 32, 64, 416, 3, 2, 1),
    "YOLOv3 1x1 512-256": (8, 512, 256, 26, 1, 1, 1),
    "YOLOv3 3x3 512-1024": (8, 512, 1024, 13, 3, 1, 1),
}


def _products(small: bool) -> Iterator[Case]:
    for name, (m, k, n) in _PRODUCTS.items():
        if small:
            m, k, n = (min(v, limit) for v, limit in ((m, 24), (k, 40), (n, 33)))
        yield from _layer("product", name, F.linear, ((m, k), (n, k), (n,)), 2 * m * k * n)


def _convolutions(small: bool) -> Iterator[Case]:
    for name, (batch, inputs, outputs, size, kernel, stride, groups) in _CONVOLUTIONS.items():
        if small:
            batch, inputs, outputs, size = 1, min(inputs, 12), min(outputs, 12), max(kernel, size // 14)
        each = groups or inputs

        def convolution(x: Tensor, w: Tensor, stride: int = stride, kernel: int = kernel, each: int = each) -> Tensor:
            return F.conv2d(x, w, stride=stride, padding=kernel // 2, groups=each)

        pixels = ((size + 2 * (kernel // 2) - kernel) // stride + 1) ** 2
        weight = (outputs, inputs // each, kernel, kernel)
        flops = 2 * batch * pixels * math.prod(weight)
        group = "convolution" if groups == 1 else "grouped convolution"
        yield from _layer(group, name, convolution, ((batch, inputs, size, size), weight), flops)


def _both(
    group: str, name: str, function: Callable[..., Any], shapes: Sequence[Any], wrt: Sequence[int], *passes: int
) -> Iterator[Case]:
    """Forward and backward of what memory limits; `passes`: how often each goes over the largest operand."""
    size = FLOAT * max(math.prod(s) for s in shapes if not isinstance(s, Whole))
    for part, often, begin in zip(
        ("forward", "backward"), passes, (_forward(function), _gradient(function, *wrt)), strict=True
    ):
        yield Case(group, name, part, tuple(shapes), begin, bytes=often * size)


def _batch_norm(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return F.batch_norm(x, mean.detach(), var.detach(), weight, bias, training=True)


def _memory_bound(small: bool) -> Iterator[Case]:
    by = 64 if small else 1
    rows, heads, length, width = 3072 // by, 96 // min(by, 24), 384 // min(by, 24), 768 // min(by, 24)
    scores, images = (heads, length, length), (2, 4, 7, 7) if small else (64, 256, 56, 56)
    c, big = images[1], (3072 * 3072 // by,)
    yield from _both("softmax", "softmax, BERT", lambda x: F.softmax(x, -1), (scores,), (0,), 2, 3)
    norm = lambda x, w, b: F.layer_norm(x, (width,), w, b)  # noqa: E731
    yield from _both("normalization", "LayerNorm, BERT", norm, ((rows, width), (width,), (width,)), (0, 1, 2), 2, 3)
    operands = (images, (c,), (c,), (c,), (c,))
    yield from _both("normalization", "BatchNorm, ResNet50", _batch_norm, operands, (0, 1, 2), 2, 3)
    yield from _both("elementwise", "GELU, BERT", F.gelu, (big,), (0,), 2, 3)
    yield from _both("elementwise", "ReLU", F.relu, (big,), (0,), 2, 3)
    add = _forward(torch.add)
    yield Case("elementwise", "sum of two", "forward", (big, big), add, bytes=3 * FLOAT * big[0])
    yield from _both("elementwise", "dropout", lambda x: F.dropout(x, 0.1), (big,), (0,), 2, 2)
    vocabulary, tokens = 30522 // by, 3072 // by
    yield Case(
        "embedding",
        "embedding, BERT",
        "backward",
        ((vocabulary, width), Whole(vocabulary, (tokens,))),
        _gradient(lambda w, i: F.embedding(i, w), 0),
        bytes=FLOAT * (vocabulary + tokens) * width,
    )


def _attention(small: bool) -> Iterator[Case]:
    batch, heads, length, width = (2, 2, 8, 8) if small else (8, 12, 384, 64)
    shape, flops = (batch, heads, length, width), 4 * batch * heads * length * length * width
    attend = F.scaled_dot_product_attention
    yield Case("attention", "attention, BERT", "forward", (shape,) * 3, _forward(attend), flops=flops)
    yield Case("attention", "attention, BERT", "backward", (shape,) * 3, _gradient(attend, 0, 1, 2), flops=2 * flops)
    masked = lambda q, k, v, mask: attend(q, k, v, mask, dropout_p=0.1)  # noqa: E731
    name, operands = "attention with mask and dropout, BERT", (*(shape,) * 3, (batch, 1, 1, length))
    yield Case("attention", name, "forward", operands, _forward(masked), flops=flops)
    yield Case("attention", name, "backward", operands, _gradient(masked, 0, 1, 2), flops=2 * flops)


def _optimizers(small: bool) -> Iterator[Case]:
    by = 16 if small else 1
    wide, inner = 768 // by, 3072 // by
    layer = ((wide, wide),) * 4 + ((wide,),) * 8 + ((inner, wide), (wide, inner), (inner,))
    filters = ((256 // by, 256 // by, 3, 3), (256 // by,), (256 // by,)) * 16

    def step(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Callable[..., Callable[[], Any]]:
        def begin(*operands: Tensor) -> Callable[[], Any]:
            parameters = [x.detach().clone().requires_grad_() for x in operands]
            for p, x in zip(parameters, operands, strict=True):
                p.grad = x.detach()
            return make(parameters).step

        return begin

    for name, shapes, make, passes in (
        ("AdamW, a layer of BERT", layer, lambda p: torch.optim.AdamW(p, lr=1e-9), 7),
        ("SGD with momentum, 48 tensors", filters, lambda p: torch.optim.SGD(p, lr=1e-9, momentum=0.9), 5),
    ):
        size = FLOAT * sum(math.prod(s) for s in shapes)
        yield Case("optimizer", name, "step", shapes, step(make), bytes=passes * size)


def cases(size: str) -> list[Case]:
    """All of them.

    Args:
        size: ``full``, or ``smoke`` for shapes that take no time.
    """
    small = size == "smoke"
    kinds = (_products, _convolutions, _attention, _memory_bound, _optimizers)
    return sorted((case for kind in kinds for case in kind(small)), key=lambda case: GROUPS.index(case.group))
