"""What Triton makes of the kernels, as PTX: every rounding is the format's. Needs Triton, but no GPU."""

from __future__ import annotations

import re
from typing import Any

import pytest

triton = pytest.importorskip("triton")
compiled = pytest.importorskip("tests.kernels.compiled")

TARGETS = [80, 90]  # compute capabilities


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
    ("kernel", "constants", "fuses"), [pytest.param(k, c, f, id=compiled.title(k, c)) for k, c, f in compiled.KERNELS]
)
def test_every_rounding_is_the_formats(kernel: Any, constants: dict[str, Any], fuses: bool, capability: int) -> None:
    """Chains are fused multiply-adds; nothing else is fused, approximated, flushed, or added atomically."""
    made = compiled.compiled(kernel, constants, capability)
    ptx = made.asm["ptx"]
    assert forbidden(ptx) == []
    assert (fused_additions(ptx) > 0) == fuses
    assert fused_additions(ptx) == compiled.fused_in_source(made)


@pytest.mark.parametrize(
    ("kernel", "constants"), [pytest.param(k, c, id=compiled.title(k, c)) for k, c, _ in compiled.KERNELS]
)
def test_sizes_of_one_are_compiled_as_constants(kernel: Any, constants: dict[str, Any]) -> None:
    """As Triton does with every number that may choose the code."""
    ones = {p.name: 1 for p in kernel.params if p.name in compiled.sizes(kernel, constants) and not p.do_not_specialize}
    assert forbidden(compiled.compiled(kernel, constants | ones, 90).asm["ptx"]) == []


def test_every_kernel_is_looked_at() -> None:
    launched = {
        value
        for module in compiled.MODULES
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and not name.startswith("_")
    }
    assert launched == {kernel for kernel, _, _ in compiled.KERNELS}


@pytest.mark.parametrize("which", range(1, 3))
def test_a_fusion_beside_others_is_found(which: int) -> None:
    kernel = next(k for k, _, _ in compiled.KERNELS if k.__name__ == "activation_backward")
    made = compiled.compiled(kernel, {"WHICH": which, "W": 256}, 90, fusion=True)
    assert fused_additions(made.asm["ptx"]) > compiled.fused_in_source(made) > 0


@pytest.mark.parametrize(
    "line",
    ["ex2.approx.f32 %f1, %f2;", "@%p1 div.full.f32 %f1, %f2, %f3;", "fma.rn.ftz.f32 %f1, %f2;", "add.rz.f32 %f1, %f2;"]
    + ["mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1};", "red.global.add.f32 [%r1], %f1;", "mad.f32 %f1;"],
)
def test_what_is_forbidden_is_found(line: str) -> None:
    assert len(forbidden(f"\tld.global.b32 %r1, [%r2];\n\t{line}\n\tadd.f32 %f1, %f1, %f2;\n")) == 1
