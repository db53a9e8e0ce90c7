"""Operations under test: each maps floating-point tensors, which get gradients, to a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_easyscale.kernels import portable


class Case(NamedTuple):
    """A function and the shapes of its operands; `positive` makes them positive."""

    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    positive: bool = False


def whole(limit: int, *shape: int) -> Tensor:
    """The same whole numbers in 0..limit-1 every time."""
    return torch.randint(0, limit, shape, generator=torch.Generator().manual_seed(7))


def at(index: Tensor, x: Tensor) -> Tensor:
    return index.to(x.device)


def batch_norm(x, w, b):
    c = x.shape[1]
    return F.batch_norm(x, x.new_zeros(c), x.new_ones(c), w, b, training=True)


def batch_norm_eval(x, w, b, m, v):
    return F.batch_norm(x, m.detach(), v.detach(), w, b, training=False)


def ignoring(x):
    target = whole(10, x.shape[0])
    target[3] = -100
    return F.cross_entropy(x, at(target, x), label_smoothing=0.1)


IMAGE = (3, 6, 13, 11)
CASES: dict[str, Case] = {
    "linear": Case(F.linear, ((9, 37), (21, 37), (21,))),
    "linear of three dimensions": Case(F.linear, ((3, 5, 37), (21, 37), (21,))),
    "matmul": Case(torch.matmul, ((4, 33, 17), (4, 17, 65))),
    "matmul over 20000": Case(torch.matmul, ((3, 20000), (20000, 5))),
    "baddbmm": Case(lambda a, b, c: torch.baddbmm(a, b, c, beta=0.5, alpha=2.0), ((2, 5, 6), (2, 5, 300), (2, 300, 6))),
    "conv": Case(lambda x, w, b: F.conv2d(x, w, b, padding=1), (IMAGE, (8, 6, 3, 3), (8,))),
    "conv strided": Case(lambda x, w: F.conv2d(x, w, stride=2, padding=(2, 1)), (IMAGE, (8, 6, 5, 3))),
    "conv dilated": Case(lambda x, w: F.conv2d(x, w, dilation=2), (IMAGE, (4, 6, 3, 3))),
    "conv grouped": Case(lambda x, w, b: F.conv2d(x, w, b, groups=2, stride=2), (IMAGE, (4, 3, 3, 3), (4,))),
    "conv depthwise": Case(lambda x, w: F.conv2d(x, w, groups=6, padding=1), (IMAGE, (6, 1, 3, 3))),
    "conv 1x1": Case(F.conv2d, (IMAGE, (9, 6, 1, 1))),
    "conv of one dimension": Case(lambda x, w: F.conv1d(x, w, padding=1), ((2, 4, 30), (5, 4, 3))),
    "conv over many pixels": Case(lambda x, w: F.conv2d(x, w, padding=1), ((5, 2, 41, 40), (3, 2, 3, 3))),
    "conv of many channels": Case(lambda x, w, b: F.conv2d(x, w, b, padding=1), ((2, 88, 9, 7), (80, 88, 3, 3), (80,))),
    "conv of many channels, unevenly padded": Case(
        lambda x, w: F.conv2d(x, w, padding=(2, 0)), ((2, 80, 5, 8), (81, 80, 3, 3))
    ),
    "conv transposed of many channels": Case(
        lambda x, w: F.conv_transpose2d(x, w, padding=1), ((2, 80, 6, 5), (80, 96, 3, 3))
    ),
    "conv transposed": Case(
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, padding=1, output_padding=1),
        (IMAGE, (6, 4, 3, 3), (4,)),
    ),
    "softmax": Case(lambda x: F.softmax(x, 1), ((5, 77, 3),)),
    "log_softmax": Case(lambda x: F.log_softmax(x, -1), ((5, 300),)),
    "logsumexp": Case(lambda x: torch.logsumexp(x, 1), ((5, 300),)),
    "layer_norm": Case(lambda x, w, b: F.layer_norm(x, (33,), w, b), ((7, 4, 33), (33,), (33,))),
    "batch_norm": Case(batch_norm, (IMAGE, (6,), (6,))),
    "batch_norm in evaluation": Case(batch_norm_eval, (IMAGE, (6,), (6,), (6,), (6,)), positive=True),
    "group_norm": Case(lambda x, w, b: F.group_norm(x, 3, w, b), (IMAGE, (6,), (6,))),
    "max_pool": Case(lambda x: F.max_pool2d(x, 3, 2, 1), (IMAGE,)),
    "cummax": Case(lambda x: x.cummax(-1).values, (IMAGE,)),
    "max_pool in ceil mode": Case(lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True), (IMAGE,)),
    "avg_pool": Case(lambda x: F.avg_pool2d(x, 3, 2, 1), (IMAGE,)),
    "avg_pool without padding": Case(
        lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False), (IMAGE,)
    ),
    "adaptive_avg_pool": Case(lambda x: F.adaptive_avg_pool2d(x, (4, 3)), (IMAGE,)),
    "global average": Case(lambda x: F.adaptive_avg_pool2d(x, 1), (IMAGE,)),
    "bilinear": Case(lambda x: F.interpolate(x, (20, 9), mode="bilinear"), (IMAGE,)),
    "nearest": Case(lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), (IMAGE,)),
    "embedding": Case(lambda w: F.embedding(at(whole(12, 300), w), w), ((12, 5),)),
    "index_add": Case(lambda x, s: x.index_add(1, at(whole(4, 90), x), s), ((3, 4), (3, 90))),
    "scatter_add": Case(lambda x, s: x.scatter_add(0, at(whole(4, 90, 3), x), s), ((4, 3), (90, 3))),
    "index": Case(lambda x: x[at(whole(6, 200), x)], ((6, 5),)),
    "sum": Case(lambda x: x.sum((0, 2)), (IMAGE,)),
    "sum of 20000": Case(lambda x: x.sum(1), ((16, 20000),)),
    "sum of all": Case(lambda x: x.sum(), ((5000,),)),
    "mean": Case(lambda x: x.mean(1), ((30, 200),)),
    "prod without gradient": Case(lambda x: x.detach().prod(-1) * x.sum(-1), ((30, 7),), positive=True),
    "var": Case(lambda x: x.var((0, 2, 3)), (IMAGE,)),
    "std": Case(lambda x: x.std(-1), ((30, 200),)),
    "norm": Case(lambda x: torch.linalg.vector_norm(x, dim=1), ((30, 200),)),
    "cross_entropy": Case(ignoring, ((40, 10),)),
    "cross_entropy of pixels": Case(lambda x: F.cross_entropy(x, at(whole(5, 2, 4, 6), x)), ((2, 5, 4, 6),)),
    "mse_loss": Case(F.mse_loss, ((40, 10), (40, 10))),
    "smooth_l1_loss": Case(F.smooth_l1_loss, ((40, 10), (40, 10))),
    "bce with logits": Case(lambda x: F.binary_cross_entropy_with_logits(x, (x > 0.3).to(x.dtype)), ((40, 10),)),
    "gelu": Case(F.gelu, ((3000,),)),
    "gelu by tanh": Case(lambda x: F.gelu(x, approximate="tanh"), ((3000,),)),
    "silu": Case(F.silu, ((3000,),)),
    "sigmoid": Case(torch.sigmoid, ((3000,),)),
    "tanh": Case(torch.tanh, ((3000,),)),
    "exp": Case(torch.exp, ((3000,),)),
    "expm1": Case(torch.expm1, ((3000,),)),
    "erf": Case(torch.erf, ((3000,),)),
    "softplus": Case(F.softplus, ((3000,),)),
    "logsigmoid": Case(F.logsigmoid, ((3000,),)),
    "log": Case(torch.log, ((3000,),), positive=True),
    "log1p": Case(torch.log1p, ((3000,),), positive=True),
    "rsqrt": Case(torch.rsqrt, ((3000,),), positive=True),
    "sqrt": Case(torch.sqrt, ((3000,),), positive=True),
    "reciprocal": Case(torch.reciprocal, ((3000,),), positive=True),
    "division by a number": Case(lambda x: x / 7, ((3000,),)),
    "division of a number": Case(lambda x: 3 / x, ((3000,),), positive=True),
    "division": Case(torch.div, ((3000,), (3000,)), positive=True),
    "division by a tensor of the CPU": Case(lambda x: x / torch.tensor(0.3), ((3000,),)),
    "remainder": Case(lambda x: x.remainder(0.3) * x, ((3000,),)),
    "floor division": Case(lambda x: x.div(0.3, rounding_mode="floor") * x, ((3000,),)),
    "sums with numbers": Case(lambda x: (x + 0.1) * (x - 0.3) * (1 - x), ((3000,),)),
    "scaled sums": Case(lambda x, y: x.add(y, alpha=0.3) * x.sub(y, alpha=0.7), ((3000,), (3000,))),
    "products with numbers": Case(lambda x: x * 0.1 * x, ((3000,),)),
    "addcmul": Case(lambda x, y, z: torch.addcmul(x, y, z, value=0.3), ((3000,),) * 3),
    "addcdiv": Case(lambda x, y, z: torch.addcdiv(x, y, z, value=0.3), ((3000,),) * 3, positive=True),
    "lerp": Case(lambda x, y: torch.lerp(x, y, 0.1) * torch.lerp(x, y, 0.8), ((3000,),) * 2),
    "powers": Case(lambda x: x**3 * x**-2 + x**0.5, ((3000,),), positive=True),
    "leaky_relu": Case(lambda x: F.leaky_relu(x, 0.1), ((3000,),)),
    "limits": Case(lambda x: F.hardtanh(x, -0.3, 0.7) * F.threshold(x, 0.1, -0.3) * F.relu6(x), ((3000,),)),
    "relu": Case(F.relu, ((3000,),)),
    "attention": Case(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), ((2, 3, 17, 8),) * 3),
}


def operands(case: Case, seed: int = 0, *, scale: float = 1.0) -> list[Tensor]:
    """Normally distributed fp32 operands on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator) * scale for shape in case.shapes]
    return [x.abs() + 0.01 for x in made] if case.positive else made


def run(
    case: Case, given: list[Tensor], *, device: str = "cpu", dtype: torch.dtype = torch.float32, stock: bool = False
) -> list[Tensor]:
    """Result and gradients, on the CPU, under the portable policy or by torch's own kernels."""
    leaves = [x.to(device, dtype).requires_grad_() for x in given]

    def compute() -> list[Tensor]:
        made = case.function(*leaves)
        weights = torch.arange(made.numel(), dtype=dtype, device=device).remainder(7).view(made.shape) - 2.5
        gradients = torch.autograd.grad(made, leaves, weights, allow_unused=True)
        return [made.detach(), *(g for g in gradients if g is not None)]

    if stock:
        results = compute()
    else:
        with portable():
            results = compute()
    return [r.cpu() for r in results]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two fp32, bf16 or fp16 tensors are equal bit for bit; the format leaves the payload of a NaN open."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    words = {4: torch.int32, 2: torch.int16}[a.element_size()]
    nan = torch.full((), float("nan"), dtype=a.dtype)
    x, y = (torch.where(t.isnan(), nan, t).contiguous().view(words) for t in (a, b))
    return torch.equal(x, y)


def differences(a: list[Tensor], b: list[Tensor]) -> list[str]:
    """What differs between two lists of results, for messages."""
    if len(a) != len(b):
        return [f"{len(a)} and {len(b)} results"]
    return [
        f"result {i} {list(x.shape)}: " + difference(x, y)
        for i, (x, y) in enumerate(zip(a, b, strict=True))
        if not same_bits(x, y)
    ]


def difference(x: Tensor, y: Tensor) -> str:
    """Where two tensors differ: how often, and for the first places the index, both bit patterns and the distance."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return f"{list(x.shape)} {x.dtype} and {list(y.shape)} {y.dtype}"
    if x.element_size() not in (2, 4) or not x.is_floating_point():
        return f"{int((x != y).sum())} of {x.numel()} elements"
    size = 8 * x.element_size()
    first, second = (t.contiguous().view(-1).view({32: torch.int32, 16: torch.int16}[size]).long() for t in (x, y))
    places = ((first != second) & ~(x.isnan() & y.isnan()).reshape(-1)).nonzero().flatten()
    # Units in the last place between two numbers: the distance of their positions in ascending order.
    order = [torch.where(t < 0, -(t & (2 ** (size - 1) - 1)), t) for t in (first, second)]
    ulps = (order[0] - order[1]).abs()[places]
    digits, flat = size // 4, (x.reshape(-1), y.reshape(-1))
    shown = (
        f"[{i}] {int(first[i]) % 2**size:0{digits}x} {int(second[i]) % 2**size:0{digits}x}"
        f" ({float(flat[0][i])!r} {float(flat[1][i])!r})"
        for i in places[:4].tolist()
    )
    return f"{len(places)} of {x.numel()} differ, {int(ulps.min())} to {int(ulps.max())} ulp: " + "; ".join(shown)
