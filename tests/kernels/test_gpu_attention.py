"""On a GPU: attention is one operation with the bits that it has composed, on the CPU and on the GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_easyscale.kernels import attention as attention_kernels
from lightning_easyscale.kernels import audit, build, plans, portable
from lightning_easyscale.kernels.tiles import Tiles, tiles

from .attention import ATTENTION, Attention, attend
from .cases import differences
from .test_gpu_launches import OFFSETS, moved

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(build.why_unavailable()), reason=build.why_unavailable() or "available"),
]

BERT = Attention((8, 12, 384, 384, 64, 64), "bool", (8, 1, 1, 384), dropout=0.1)
LARGE = [
    BERT,
    replace(BERT, mask="float", mask_shape=(8, 1, 384, 384)),
    replace(BERT, mask="", mask_shape=(), dropout=0.0),
    replace(BERT, dtype=torch.bfloat16),
    Attention((64, 3, 49, 49, 32, 32), "trained", (1, 3, 49, 49), dropout=0.1),
    Attention((2, 4, 1000, 1100, 64, 64), causal=True, dropout=0.1),
    Attention((1, 3, 4100, 257, 16, 16), dropout=0.1),
    Attention((1, 2, 300, 5000, 16, 16), "bool", (1, 1, 300, 5000), dropout=0.1),
]


@pytest.fixture(autouse=True)
def cuda_attention():
    return pytest.importorskip("lightning_easyscale.kernels.cuda_attention", reason="Triton is missing")


@contextmanager
def launches(module: Any) -> Iterator[list[str]]:
    """The kernels of attention that are launched meanwhile."""
    names: list[str] = []
    plan = module._plan
    module._plan = lambda kernel, *rest: names.append(kernel) or plan(kernel, *rest)
    try:
        yield names
    finally:
        module._plan = plan


@pytest.mark.parametrize("call", ATTENTION + LARGE, ids=lambda call: call.title)
def test_gpu_bits_equal_cpu_bits_and_composed_ones(call, cuda_attention):
    expected = call.run()
    with launches(cuda_attention) as names:
        found = call.run("cuda")
    if call.groups == 1 and call.shape[0]:  # not every torch shares heads in one operation
        assert set(names) == {"attention_weights", "attention_weights_backward"}
    assert differences(expected, found) == []
    assert differences(expected, call.run("cuda", whole=True)) == []
    with launches(cuda_attention) as names:
        assert differences(expected, call.run("cuda", composed=True)) == []
    assert names == []


@pytest.mark.parametrize(
    ("sizes", "registers"),
    [(Tiles(), 0), (Tiles(16, 16, 16, 1, 1), 8), (Tiles(64, 32, 32, 4, 3), 0), (Tiles(32, 64, 64, 2, 2), 8)],
)
def test_tiles_and_registers_do_not_change_bits(sizes, registers, monkeypatch, cuda_attention):
    monkeypatch.setattr(cuda_attention, "_IN_REGISTERS", registers)
    masked = Attention((2, 2, 33, 140, 8, 8), "float", (2, 1, 33, 140), special=True, dropout=0.1)
    with tiles(sizes):
        for call in (masked, Attention((1, 2, 13, 130, 8, 8), causal=True, dropout=0.1), ATTENTION[0]):
            assert differences(call.run(), call.run("cuda")) == [], call.title
    plans.forget_plans()


@pytest.mark.parametrize("piece", [200, 20_000, 300_000])
def test_pieces_do_not_change_bits(piece, monkeypatch):
    monkeypatch.setattr(attention_kernels, "_PIECE", piece)
    for call in (*ATTENTION, Attention((1, 2, 9000, 16, 16, 16), "float", (1, 1, 9000, 16), dropout=0.1)):
        assert differences(call.run(), call.run("cuda", whole=True)) == [], call.title


def test_lengths_types_and_alignments_in_quick_succession():
    lengths, types = (1, 15, 16, 17, 384, 1040), (torch.float32, torch.bfloat16)
    calls = [
        (Attention((1, 2, 16, n, 8, 8), "float", (1, 2, 16, n), dropout=0.1, dtype=dtype), offset)
        for n, dtype, offset in itertools.product(lengths, types, OFFSETS)
    ]

    def results(call: Attention, offset: int | None) -> list[torch.Tensor]:
        q, k, v, dy, mask = (x if offset is None else moved(x, offset) for x in call.operands())
        leaves = [x.requires_grad_() for x in (q, k, v)]
        torch.manual_seed(5)
        made = attend(*leaves, mask, call)
        return [made.detach(), *torch.autograd.grad(made, leaves, dy)]

    with portable():
        found = [results(call, offset) for call, offset in calls]
        for (call, _), made in zip(calls, found, strict=True):
            assert differences(results(call, None), [x.cpu() for x in made]) == [], call.title


def test_no_tensor_of_queries_times_keys_is_there(cuda_attention):
    """Neither in the forward nor in the backward pass, nor kept between them."""
    heads, length, size = 16, 4096, 64
    q, k, v, dy = (torch.randn(1, heads, length, size, device="cuda") for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    whole, linear = 4 * heads * length * length, 4 * heads * length * size

    def used() -> int:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        return peak

    with portable(), launches(cuda_attention) as names:
        before = torch.cuda.memory_allocated()
        used()
        made = F.scaled_dot_product_attention(*leaves, dropout_p=0.1)
        peaks = [used()]
        kept = torch.cuda.memory_allocated() - before
        torch.autograd.grad(made, leaves, dy)
        peaks.append(used())
    assert kept <= 2 * linear
    assert max(peaks) < whole // 2
    assert names.count("attention_weights") == names.count("attention_weights_backward") == heads


def test_deterministic_algorithms_take_it_without_a_warning(cuda_attention):
    expected = ATTENTION[0].run()
    torch.use_deterministic_algorithms(True)
    try:
        with launches(cuda_attention) as names:
            assert differences(expected, ATTENTION[0].run("cuda")) == []
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(names) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_it_a_shorter_type(dtype, cuda_attention):
    call = Attention((2, 2, 24, 40, 16, 16), "trained", (1, 2, 24, 40), dropout=0.1)
    q, k, v, dy, mask = (x.cuda() for x in call.operands())
    leaves = [x.requires_grad_() for x in (q, k, v, mask)]
    torch.manual_seed(5)
    with portable(), launches(cuda_attention) as names:
        with torch.autocast("cuda", dtype):
            made = F.scaled_dot_product_attention(*leaves, dropout_p=0.1)
        found = [made.detach(), *torch.autograd.grad(made, leaves, dy.to(dtype))]
    assert len(names) == 2
    expected = replace(call, dtype=dtype).run()[:5]
    # An operand in fp32 gets the gradient that its shorter copy has.
    assert differences(expected, [x.cpu().to(dtype) for x in found]) == []


def test_the_audit_of_a_gpu_names_it():
    q = torch.randn(1, 2, 8, 8, device="cuda", requires_grad=True)
    found = audit(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    name = "aten::_scaled_dot_product_efficient_attention"
    assert found[name][1] == found[f"{name}_backward"][1] == "format"


def test_an_operand_without_a_kernel_of_torchs_is_composed(cuda_attention):
    call = Attention((2, 2, 13, 13, 7, 5), dropout=0.1)  # no multiples of 4
    with launches(cuda_attention) as names:
        assert differences(call.run(), call.run("cuda")) == []
    assert names == []
