"""What NVIDIA's assembler makes of the kernels: every rounding is still the format's. Needs Triton, but no GPU.

PTX leaves room: the assembler may fuse, and it is the assembler that divides. So the machine code is read as well.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
compiled = pytest.importorskip("tests.kernels.compiled")

from lightning_easyscale.kernels import build, portable  # noqa: E402

from . import sass  # noqa: E402
from .cases import CASES, Case, operands, run  # noqa: E402

pytestmark = pytest.mark.skipif(sass.disassembler() is None, reason="neither Triton nor PATH has nvdisasm")

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
TARGETS = [80, 90, 100]  # compute capabilities; from 100 on two numbers are added at once


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize(
    ("kernel", "constants", "fuses"), [pytest.param(k, c, f, id=compiled.title(k, c)) for k, c, f in compiled.KERNELS]
)
def test_every_rounding_is_the_formats(kernel, constants, fuses, capability, tmp_path):
    """Chains are FFMA, all else FMUL and FADD; division and roots are exact; nothing flushes or adds atomically."""
    made = compiled.compiled(kernel, constants, capability)
    text = sass.disassemble(made.asm["cubin"], tmp_path)
    assert sass.violations(text) == []
    there, asked = sass.arithmetic(text), sass.asked_for(made.asm["ptx"])
    assert (there["fma"] > 0) == fuses
    assert asked["fma"] == compiled.fused_in_source(made)
    assert {word: n > 0 for word, n in there.items()} == {word: n > 0 for word, n in asked.items()}
    if not sass.loops(made.asm["ptx"]):
        if TRITON >= (3, 8):
            # Its assembler may do a product twice to spare a register; one that it fused would be missing.
            there["mul"] = min(there["mul"], asked["mul"])
        assert there == asked


@pytest.mark.parametrize(
    ("kernel", "constants"), [pytest.param(k, c, id=compiled.title(k, c)) for k, c in compiled.as_wide_as_launched()]
)
def test_pairs_of_products_and_sums_are_not_fused(kernel, constants, tmp_path):
    """Which the assembler does for capability 10.0, whatever it is told, where a thread has several elements."""
    made = compiled.compiled(kernel, constants, 100)
    there = sass.arithmetic(sass.disassemble(made.asm["cubin"], tmp_path))
    assert there["fma"] == sass.asked_for(made.asm["ptx"])["fma"]


@pytest.mark.parametrize("capability", TARGETS)
def test_products_are_chains_of_fused_operations_alone(capability, tmp_path):
    """No product of a dot product is rounded by itself; only sums of segments and blocks are."""
    names = ("matmul", "forward", "input_gradient", "weight_gradient", "depthwise_forward", "depthwise_weight_gradient")
    found = [(k, c) for k, c, _ in compiled.KERNELS if k.__name__ in names]
    assert {k.__name__ for k, _ in found} == set(names)
    for kernel, constants in found:
        made = compiled.compiled(kernel, constants, capability)
        there = sass.arithmetic(sass.disassemble(made.asm["cubin"], tmp_path))
        assert there["mul"] == 0
        assert there["fma"] >= compiled.fused_in_source(made) > 0


@triton.jit
def inexact(x, out, WHICH: tl.constexpr, W: tl.constexpr):
    """W elements of a function that is not rounded to nearest in fp32: a name, or PTX."""
    at = tl.arange(0, W)
    v = tl.load(x + at)
    if WHICH == "exp":
        v = tl.exp(v)
    elif WHICH == "log":
        v = tl.log(v)
    elif WHICH == "reciprocal root":
        v = tl.rsqrt(v)
    elif WHICH == "quotient":
        v = 3.0 / v
    elif WHICH == "half precision":
        half = v.to(tl.float16)
        v = (half * half).to(tl.float32)
    elif WHICH == "double precision":
        wide = v.to(tl.float64)
        v = (wide * wide + wide).to(tl.float32)
    else:
        v = tl.inline_asm_elementwise(WHICH, "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(out + at, v)


@triton.jit
def added_atomically(x, out, W: tl.constexpr):
    at = tl.arange(0, W)
    tl.atomic_add(out + at % 2, tl.load(x + at))


@triton.jit
def on_tensor_cores(x, out, W: tl.constexpr):
    at = tl.arange(0, W)[:, None] * W + tl.arange(0, W)[None, :]
    v = tl.load(x + at)
    tl.store(out + at, tl.dot(v, v, input_precision="tf32"))


@triton.jit
def product_and_sum(x, out, W: tl.constexpr):
    at = tl.arange(0, W)
    v = tl.load(x + at)
    tl.store(out + at, v * v + 3.0)


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("exp", "MUFU.EX2"),
        ("log", "FFMA.FTZ"),
        ("reciprocal root", "MUFU.RSQ 1 times, 0 of them"),
        ("quotient", "MUFU.RCP 1 times, 0 of them"),
        ("half precision", "HMUL2"),
        ("double precision", "D(MUL|ADD|FMA)"),
        ("add.ftz.f32 $0, $1, 1.0;", "FADD.FTZ"),
        ("add.rz.f32 $0, $1, 1.0;", "FADD.RZ"),
        ("mul.ftz.f32 $0, $1, 3.0;", "FMUL.FTZ 1 times, 0 of them"),
        ("fma.rm.f32 $0, $1, 3.0, 1.0;", "FFMA.RM"),
        ("fma.rn.sat.f32 $0, $1, 3.0, 1.0;", "FFMA.SAT"),
        ("max.ftz.f32 $0, $1, 3.0;", "FMNMX.FTZ"),
        ("sqrt.approx.f32 $0, $1;", "MUFU.SQRT"),
        ("rcp.approx.f32 $0, $1;", "MUFU.RCP 1 times, 0 of them"),
        ("tanh.approx.f32 $0, $1;", "MUFU.TANH"),
        ("sqrt.rn.ftz.f32 $0, $1;", "MUFU.RSQ 1 times, 0 of them"),
        ("div.rn.ftz.f32 $0, 3.0, $1;", "routine __cuda_sm3x_div_rn_ftz"),
    ],
)
def test_what_rounds_otherwise_is_found(which, expected, tmp_path):
    made = compiled.compiled(inexact, {"WHICH": which, "W": 128}, 90)
    found = sass.violations(sass.disassemble(made.asm["cubin"], tmp_path))
    assert any(re.match(expected, name) for name in found), found


@pytest.mark.parametrize(
    ("kernel", "width", "expected"), [(added_atomically, 128, "(RED|ATOM)"), (on_tensor_cores, 32, "HMMA")]
)
def test_atomic_additions_and_tensor_cores_are_found(kernel, width, expected, tmp_path):
    made = compiled.compiled(kernel, {"W": width}, 80)
    found = sass.violations(sass.disassemble(made.asm["cubin"], tmp_path))
    assert any(re.match(expected, name) for name in found), found


def test_a_product_fused_with_a_sum_is_found(tmp_path):
    counts = []
    for fusion in (False, True):
        made = compiled.compiled(product_and_sum, {"W": 128}, 90, fusion=fusion)
        counts.append(sass.arithmetic(sass.disassemble(made.asm["cubin"], tmp_path)))
    assert counts == [{"fma": 0, "mul": 1, "add": 1}, {"fma": 1, "mul": 0, "add": 0}]


SMALL = ["linear", "matmul over 20000", "conv strided", "conv depthwise", "softmax", "log_softmax", "layer_norm"]
SMALL += ["attention", "batch_norm", "gelu", "gelu by tanh", "silu", "sigmoid", "embedding", "sum of 20000"]
SMALL += ["tanh", "sqrt", "max_pool", "avg_pool"]
LARGE = [
    Case(F.linear, ((2048, 512), (1024, 512), (1024,))),
    Case(lambda x, w: F.conv2d(x, w, padding=1), ((16, 128, 56, 56), (128, 128, 3, 3))),
    Case(F.conv2d, ((16, 128, 56, 56), (256, 128, 1, 1))),
    Case(CASES["batch_norm"].function, ((4, 3, 200, 200), (3,), (3,))),
]


@pytest.mark.gpu
@pytest.mark.skipif(bool(build.why_unavailable()), reason=build.why_unavailable() or "available")
def test_what_was_launched_rounds_as_the_format(tmp_path):
    """The machine code of what operations, forward and backward, launched with the tiles that were picked for them."""
    for case in (*(CASES[name] for name in SMALL), *LARGE):
        run(case, operands(case), device="cuda")
    with portable():
        x = torch.randn(100, device="cuda", requires_grad=True)
        (F.dropout(x, 0.5) / 3.1).sum().backward()
    launched = {
        function.__name__: list(function.device_caches[torch.cuda.current_device()][0].values())
        for module in compiled.MODULES
        for name, function in vars(module).items()
        if isinstance(function, triton.JITFunction) and not name.startswith("_")
    }
    assert [name for name, kernels in launched.items() if not kernels] == []
    for name, kernels in launched.items():
        for kernel in kernels:
            assert sass.violations(sass.disassemble(kernel.asm["cubin"], tmp_path)) == [], name
