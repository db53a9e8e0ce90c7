"""The CPU kernels: bits that depend on nothing but the operands, and errors like those of torch's own kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_easyscale.emulation import host_cpu
from lightning_easyscale.kernels import build, cpu, portable, primitives

from .cases import CASES, differences, operands, run, same_bits
from .training import convolutional, losses_and_parameters, transformer

pytestmark = pytest.mark.skipif(bool(build.why_unavailable()), reason=build.why_unavailable() or "available")


def error(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((r.double() - e).abs().mean()) for r, e in zip(results, exact, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_errors_are_at_most_four_times_those_of_torchs_kernels(name):
    case = CASES[name]
    given = operands(case)
    exact = run(case, [x.double() for x in given], dtype=torch.float64, stock=True)
    ours, torchs = error(run(case, given), exact), error(run(case, given, stock=True), exact)
    for i, (mine, theirs, reference) in enumerate(zip(ours, torchs, exact, strict=True)):
        floor = 2.0**-25 * float(reference.abs().mean())  # torch may be exact by luck
        assert mine <= 4 * max(theirs, floor), f"result {i}: {mine} against {theirs}"


@pytest.mark.skipif(host_cpu().isa != "avx512", reason="this CPU has one vector width")
@pytest.mark.parametrize("name", CASES)
def test_avx2_and_avx512_give_the_same_bits(name):
    given = operands(CASES[name])
    with cpu.vector_width("avx2"):
        narrow = run(CASES[name], given)
    with cpu.vector_width("avx512"):
        assert differences(narrow, run(CASES[name], given)) == []


@pytest.mark.parametrize("model", [convolutional, transformer])
def test_training_does_not_depend_on_the_number_of_threads(model):
    one = losses_and_parameters(model, "sgd", device="cpu", steps=3, threads=1)
    assert differences(one, losses_and_parameters(model, "sgd", device="cpu", steps=3, threads=2)) == []


def test_products_do_not_depend_on_batch_position_alignment_or_memory_format():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(70, 600, generator=generator), torch.randn(600, 90, generator=generator)
    whole = primitives.matmul(a[None], b[None])[0]
    assert torch.equal(primitives.matmul(a[None, 33:34], b[None])[0, 0], whole[33])
    assert torch.equal(primitives.matmul(a[None, 7:], b[None, :, 5:])[0], whole[7:, 5:])
    shifted = torch.empty(70 * 600 + 1)[1:].view(70, 600).copy_(a)
    assert torch.equal(primitives.matmul(shifted[None], b[None])[0], whole)
    assert torch.equal(primitives.matmul(a.t().contiguous().t()[None], b.t().contiguous().t()[None])[0], whole)
    assert all(torch.equal(one, whole) for one in primitives.matmul(a.expand(5, -1, -1), b.expand(5, -1, -1)))


def fused(a: float, b: float, c: float) -> float:
    """fma of three fp32 numbers: the product is exact in double precision, the sum is made odd before it is rounded."""
    from fractions import Fraction

    exact = Fraction(a) * Fraction(b) + Fraction(c)
    near = torch.tensor(float(exact), dtype=torch.float64)
    if Fraction(float(near)) != exact:  # round to odd, so that the second rounding is the only one
        bits = near.view(torch.int64)
        grow = (Fraction(float(near)) < exact) == (float(near) > 0)
        if int(bits) % 2 == 0:
            near = (bits + (1 if grow else -1)).view(torch.float64)
    return float(near.float())


@pytest.mark.parametrize("k", [1, 5, 256, 300, 4100])
def test_a_product_is_the_chain_that_the_format_describes(k):
    generator = torch.Generator().manual_seed(k)
    a, b = torch.randn(k, generator=generator), torch.randn(k, generator=generator)

    def add(x: float, y: float) -> float:
        return float(torch.tensor(x) + torch.tensor(y))

    total = 0.0
    for block in range(0, k, 4096):
        part = 0.0
        for segment in range(block, min(block + 4096, k), 256):
            chain = 0.0
            for i in range(segment, min(segment + 256, block + 4096, k)):
                chain = fused(float(a[i]), float(b[i]), chain)
            part = add(part, chain)
        total = add(total, part)
    assert float(primitives.matmul(a[None, None], b[None, :, None])) == total


@pytest.mark.parametrize("rows", [1, 127, 129, 4096, 9001])
def test_a_sum_is_the_tree_that_the_format_describes(rows):
    x = torch.randn(rows, generator=torch.Generator().manual_seed(rows))
    level = x
    while len(level) > 1:
        sums = []
        for block in level.split(4096):
            lanes = torch.zeros(128)
            for row in block.split(128):
                lanes[: len(row)] += row
            while len(lanes) > 1:
                lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
            sums.append(lanes)
        level = torch.cat(sums)
    assert torch.equal(primitives.sum_middle(x[None, :, None]).view(1), level)
    columns = torch.stack([x, x.flip(0)], 1)
    assert torch.equal(primitives.sum_middle(columns[None])[0, :1], level)


def test_underflow_leaves_no_minus_zero_in_a_product():
    made = primitives.matmul(torch.full((1, 2, 3), 1e-30), torch.full((1, 3, 2), -1e-30))
    assert not made.signbit().any()


def test_denormals_survive_although_the_caller_flushes_them():
    x = torch.tensor([1e-40, 3e-39])
    expected = primitives.sum_middle(x[None, :, None])
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        made = primitives.sum_middle(x[None, :, None])
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(made, expected)
    assert float(expected) > 0


def test_running_moments_of_sixteen_bits_are_rounded_once():
    generator = torch.Generator().manual_seed(0)
    x, kept = torch.randn(2, 16, 4, 4, generator=generator), torch.rand(16, generator=generator).bfloat16()
    narrow, wide = ([kept.to(dtype, copy=True) for _ in range(2)] for dtype in (torch.bfloat16, torch.float32))
    with portable():
        for moments in (narrow, wide):
            torch.nn.functional.batch_norm(x, *moments, training=True)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(narrow, wide, strict=True))
