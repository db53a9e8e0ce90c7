"""The Triton kernels, compiled without a GPU as they are for a launch."""

from __future__ import annotations

import math
import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_easyscale.kernels import cuda_attention_kernels as attention
from lightning_easyscale.kernels import cuda_channel_kernels as channels
from lightning_easyscale.kernels import cuda_convolution_kernels as convolutions
from lightning_easyscale.kernels import cuda_fused_kernels as fused
from lightning_easyscale.kernels import cuda_kernels as primitives
from lightning_easyscale.kernels import cuda_pooling_kernels as pooling
from lightning_easyscale.kernels import cuda_winograd_kernels as winograd

MODULES = (primitives, convolutions, winograd, fused, channels, pooling, attention)
TILES = {"BM": 64, "BN": 64, "BK": 32}
GATHERED = {"KW": 3, "WHOLE": False, "FLAT": False, "ALIGNED": 1, "DEEP": 1, **TILES}
ROWS = {"WEIGHT": True, "U": 1}
STRIDES = {"STRIDE_H": 2, "STRIDE_W": 1}
LONG, SHORT = {"CHUNKS": 0, "ALIGNED": 1}, {"CHUNKS": 3, "ALIGNED": 16}  # rows of attention
POINTERS = {"a", "b", "out", "partial", "x", "w", "dy", "y", "weight", "bias", "means", "inverses", "products", "found"}
POINTERS |= {"base", "running_mean", "running_var", "source", "sums", "scores", "gradients"}
BLOCKS = [{"B": 1, "LOG_B": 0}, {"B": 32, "LOG_B": 5}]
THREADS = 128
NUMBERS = {"number", "keep", "eps", "momentum", "rest", "unbias"}

# (kernel, its constants, whether its format has fused multiply-adds)
KERNELS: list[tuple[Any, dict[str, Any], bool]] = [
    (primitives.matmul, {"BASE": True, "SPAN": 4096, "COLS": 1, "DEEP": 1, **TILES}, True),
    *((primitives.fold, {"CONTINUE": each == 1, "EACH": each, "W": 256}, False) for each in (1, 16)),
    (primitives.sum_middle, {"U": 1, "W": 4}, False),
    *((primitives.unary, {"WHICH": which, "W": 256}, which != 6) for which in range(7)),
    *((primitives.quotient, {"REVERSED": reverse, "W": 256}, False) for reverse in (True, False)),
    *((primitives.random, {"NORMAL": normal, "W": 128}, normal) for normal in (True, False)),
    (primitives.index_add, {"W": 128}, False),
    (convolutions.forward, GATHERED, True),
    (convolutions.forward, {**GATHERED, "KW": 1, "WHOLE": True, "FLAT": True}, True),
    (convolutions.input_gradient, {**STRIDES, "LONG": True, "FLAT": False, "ALIGNED": 1, "ROWS": 1, **TILES}, True),
    (convolutions.weight_gradient, {"WHOLE": True, "SPAN": 4096, "ROWS": 1, "COLS": 1, **TILES}, True),
    (convolutions.depthwise_forward, {"W": 128}, True),
    (convolutions.depthwise_input_gradient, {**STRIDES, "W": 128}, False),  # a product per tap
    (convolutions.depthwise_weight_gradient, {"T": 16, "S": 2, "W": 32}, True),
    *((kernel, {"BS": 64, "BC": 2}, False) for kernel in (winograd.input_squares, winograd.output_squares)),
    (winograd.gradient_squares, {"BS": 64, "BC": 2}, False),
    *((kernel, {"BS": 128}, False) for kernel in (winograd.weight_squares, winograd.gradient_of_squares)),
    *((fused.softmax, {"LOG": log, "U": 1}, True) for log in (True, False)),
    *((fused.softmax_backward, {"LOG": log, "U": 1}, log) for log in (True, False)),
    (fused.layer_norm, {"BIAS": True, **ROWS}, False),
    (fused.layer_norm_backward, ROWS, False),
    *((fused.channel_sums, {"KIND": kind, **ROWS}, False) for kind in range(3)),
    *((fused.channel_moments, {"KIND": kind, "RUNNING": True, "U": 1}, False) for kind in range(2)),
    (fused.channel_gradients, {"U": 1}, False),
    (fused.normalize_channels, {"WEIGHT": True, "BIAS": True, "W": 256}, False),
    (fused.normalize_channels_backward, {"WEIGHT": True, "W": 256}, False),
    *((channels.batch_norm, {"WEIGHT": True, "BIAS": True, "RUNNING": True, **blocks}, False) for blocks in BLOCKS),
    *((channels.batch_norm_backward, {"WEIGHT": True, **blocks}, False) for blocks in BLOCKS),
    (pooling.max_pool_backward, {**STRIDES, "W": 256}, False),
    (pooling.avg_pool, {"PADDED": True, "W": 256}, False),
    (pooling.avg_pool_backward, {**STRIDES, "PADDED": False, "W": 256}, False),
    *((fused.activation, {"WHICH": which, "W": 256}, True) for which in range(4)),
    (fused.dropout, {"W": 256}, False),
    (fused.dropout_backward, {"W": 256}, False),
    *((fused.activation_backward, {"WHICH": which, "W": 256}, which != 3) for which in range(4)),
    *(
        (kernel, {"BIAS": dropout < 2, "CAUSAL": dropout > 0, **rest, "DROPOUT": dropout, "U": 1}, True)
        for kernel in (attention.attention_weights, attention.attention_weights_backward)
        for dropout, rest in ((0, LONG), (1, LONG), (1, SHORT), (2, SHORT))
    ),
]


def title(kernel: Any, constants: dict[str, Any]) -> str:
    return f"{kernel.__name__} {' '.join(map(str, constants.values()))}"


def _kind(kernel: Any, constants: dict[str, Any], name: str) -> str:
    if name in constants:
        return "constexpr"
    if name in ("index", "order"):
        return "*i64"
    if name == "kept":
        return "*i1"
    if name in NUMBERS or (name == "count" and kernel is not primitives.fold):
        return "fp32"
    return "*fp32" if name in POINTERS else "i32"


def sizes(kernel: Any, constants: dict[str, Any]) -> set[str]:
    """The parameters that are whole numbers."""
    return {name for name in kernel.arg_names if _kind(kernel, constants, name) == "i32"}


def compiled(kernel: Any, constants: dict[str, Any], capability: int, *, fusion: bool = False) -> Any:
    """What Triton makes of a kernel for a compute capability: ``asm`` has its ``ptx`` and its ``cubin``."""
    signature = {name: _kind(kernel, constants, name) for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    options = {"num_warps": THREADS // 32, "num_stages": 2, "enable_fp_fusion": fusion}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def fused_in_source(made: Any) -> int:
    """How many fused multiply-adds a thread is asked for by the kernel's source, once through each loop.

    Triton's IR says it: each ``math.fma`` is one per element, and a product ``[m, k] @ [k, n]`` is ``m * k * n``.
    """
    ir = made.asm["ttir"]
    shapes = re.findall(r"= math\.fma .*: (?:tensor<([\dx]*)x)?f32", ir)
    alone = sum(max(1, math.prod(int(d) for d in shape.split("x") if d) // THREADS) for shape in shapes)
    products = re.findall(r"= tt\.dot .*: tensor<(\d+)x(\d+)xf32> \* tensor<\d+x(\d+)xf32>", ir)
    return alone + sum(int(m) * int(k) * int(n) // THREADS for m, k, n in products)


def as_wide_as_launched() -> list[tuple[Any, dict[str, Any]]]:
    """The kernels with several elements to a thread."""
    larger = {"W": 1024, "U": 4, "BS": 512, "BC": 4}
    alone = (primitives.sum_middle, primitives.index_add)  # whose W is no number of elements
    alone += (convolutions.depthwise_input_gradient, convolutions.depthwise_weight_gradient)
    return [
        (kernel, {name: larger.get(name, value) for name, value in constants.items()})
        for kernel, constants, _ in KERNELS
        if kernel not in alone and larger.keys() & constants.keys()
    ]
