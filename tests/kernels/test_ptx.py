"""What the compiler makes of the Triton kernels: every rounding is the format's. Needs Triton, but no GPU."""

from __future__ import annotations

import re
from typing import Any

import pytest

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.compiler")
backends = pytest.importorskip("triton.backends.compiler")
convolutions = pytest.importorskip("lightning_easyscale.kernels.cuda_convolution_kernels")
fused = pytest.importorskip("lightning_easyscale.kernels.cuda_fused_kernels")
primitives = pytest.importorskip("lightning_easyscale.kernels.cuda_kernels")

TARGETS = [80, 90]  # compute capabilities
TILES = {"BM": 64, "BN": 64, "BK": 32}
GATHERED = {"KW": 3, "WHOLE": False, "FLAT": False, "ALIGNED": 1, "DEEP": 1, **TILES}
ROWS = {"WEIGHT": True, "U": 1}
POINTERS = {
    "a",
    "b",
    "base",
    "out",
    "partial",
    "x",
    "w",
    "dy",
    "y",
    "weight",
    "bias",
    "means",
    "inverses",
    "products",
    "found",
}
POINTERS |= {"base", "running_mean", "running_var", "source"}
NUMBERS = {"number", "keep", "eps", "momentum", "rest", "unbias"}

# (kernel, its constants, whether its format has fused multiply-adds)
KERNELS: list[tuple[Any, dict[str, Any], bool]] = [
    (primitives.matmul, {"BASE": True, "SPAN": 4096, "COLS": 1, "DEEP": 1, **TILES}, True),
    *((primitives.fold, {"CONTINUE": go_on, "W": 256}, False) for go_on in (True, False)),
    (primitives.sum_middle, {"U": 1, "W": 4}, False),
    *((primitives.unary, {"WHICH": which, "W": 256}, which != 6) for which in range(7)),
    *((primitives.quotient, {"REVERSED": reverse, "W": 256}, False) for reverse in (True, False)),
    *((primitives.random, {"NORMAL": normal, "W": 128}, normal) for normal in (True, False)),
    (primitives.index_add, {"W": 128}, False),
    (convolutions.forward, GATHERED, True),
    (convolutions.forward, {**GATHERED, "KW": 1, "WHOLE": True, "FLAT": True}, True),
    (convolutions.input_gradient, {"LONG": True, "FLAT": False, "ALIGNED": 1, "ROWS": 1, **TILES}, True),
    (convolutions.weight_gradient, {"WHOLE": True, "SPAN": 4096, "ROWS": 1, "COLS": 1, **TILES}, True),
    (convolutions.depthwise_forward, {"W": 128}, True),
    (convolutions.depthwise_input_gradient, {"W": 128}, False),  # a product per tap
    (convolutions.depthwise_weight_gradient, {"S": 1, "W": 128}, True),
    *((fused.softmax, {"LOG": log, "U": 1}, True) for log in (True, False)),
    *((fused.softmax_backward, {"LOG": log, "U": 1}, log) for log in (True, False)),
    (fused.layer_norm, {"BIAS": True, **ROWS}, False),
    (fused.layer_norm_backward, ROWS, False),
    *((fused.channel_sums, {"KIND": kind, **ROWS}, False) for kind in range(3)),
    *((fused.channel_moments, {"KIND": kind, "RUNNING": True, "U": 1}, False) for kind in range(2)),
    (fused.channel_gradients, {"U": 1}, False),
    (fused.normalize_channels, {"WEIGHT": True, "BIAS": True, "W": 256}, False),
    (fused.normalize_channels_backward, {"WEIGHT": True, "W": 256}, False),
    *((fused.activation, {"WHICH": which, "W": 256}, True) for which in range(4)),
    (fused.dropout, {"W": 256}, False),
    (fused.dropout_backward, {"W": 256}, False),
    *((fused.activation_backward, {"WHICH": which, "W": 256}, which != 3) for which in range(4)),
]


def ptx_of(kernel: Any, constants: dict[str, Any], capability: int) -> str:
    """The kernel as it is compiled for a launch."""

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("index", "order"):
            return "*i64"
        if name == "kept":
            return "*i1"
        if name in NUMBERS or (name == "count" and kernel is not primitives.fold):
            return "fp32"
        return "*fp32" if name in POINTERS else "i32"

    source = compiler.ASTSource(kernel, {name: kind(name) for name in kernel.arg_names}, constexprs=constants)
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}
    return str(triton.compile(source, target=backends.GPUTarget("cuda", capability, 32), options=options).asm["ptx"])


def forbidden(ptx: str) -> list[str]:
    """Instructions that round otherwise than the format, or add in an order that it does not say."""
    code = re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)", ptx, re.MULTILINE)
    return sorted(
        {
            name
            for name in code
            if re.search(r"\.approx|\.ftz|\.full", name)  # PTX's own approximations, denormals taken for zero
            or re.match(r"(add|sub|mul|fma|mad|div|sqrt|rcp)\.(rz|rm|rp)\b", name)
            or re.match(r"(div|sqrt|rcp|fma)\.f32", name)  # without a rounding
            or re.match(r"mad\.f32|(wg)?mma\.|tcgen05|(atom|red)\.\S*add", name)
        }
    )


def fused_additions(ptx: str) -> int:
    return len(re.findall(r"\bfma\.rn\.f32\b", ptx))


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize(
    ("kernel", "constants", "fuses"),
    [pytest.param(k, c, f, id=f"{k.__name__} {' '.join(map(str, c.values()))}") for k, c, f in KERNELS],
)
def test_every_rounding_is_the_formats(kernel: Any, constants: dict[str, Any], fuses: bool, capability: int) -> None:
    """Chains are fused multiply-adds; nothing else is fused, approximated, flushed, or added atomically."""
    ptx = ptx_of(kernel, constants, capability)
    assert forbidden(ptx) == []
    assert (fused_additions(ptx) > 0) == fuses


def test_every_kernel_is_looked_at() -> None:
    launched = {
        value
        for module in (primitives, convolutions, fused)
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and not name.startswith("_")
    }
    assert launched == {kernel for kernel, _, _ in KERNELS}


@pytest.mark.parametrize(
    "line",
    ["ex2.approx.f32 %f1, %f2;", "@%p1 div.full.f32 %f1, %f2, %f3;", "fma.rn.ftz.f32 %f1, %f2;", "add.rz.f32 %f1, %f2;"]
    + ["mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1};", "red.global.add.f32 [%r1], %f1;", "mad.f32 %f1;"],
)
def test_what_is_forbidden_is_found(line: str) -> None:
    assert len(forbidden(f"\tld.global.b32 %r1, [%r2];\n\t{line}\n\tadd.f32 %f1, %f1, %f2;\n")) == 1
