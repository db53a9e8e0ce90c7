"""Attention as CUDA's dispatch calls it has the bits of attention as the CPU composes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from lightning_easyscale.kernels import attention as attention_kernels
from lightning_easyscale.kernels import audit, build, common_paths, dispatch, portable

from .attention import ATTENTION, Attention, attend, equal
from .cases import differences

pytestmark = pytest.mark.skipif(bool(build.why_unavailable()), reason=build.why_unavailable() or "available")

ROOT = Path(__file__).parents[2]
MANY_QUERIES = Attention((1, 2, 4500, 7, 4, 4), "float", (1, 1, 4500, 7), dropout=0.1)
DROPPED = Attention((2, 3, 17, 20, 8, 8), "bool", (2, 1, 17, 20), dropout=0.1)


@pytest.mark.parametrize("call", ATTENTION, ids=lambda call: call.title)
def test_one_operation_has_the_bits_of_composed_attention(call):
    """Result, gradients, and the state of the generator behind it."""
    assert differences(call.run(), call.run(whole=True)) == []


@pytest.mark.parametrize("piece", [200, 20_000, 50_000])
@pytest.mark.parametrize("call", [MANY_QUERIES, DROPPED, replace(DROPPED, shape=(2, 6, 17, 20, 8, 8), groups=3)])
def test_bits_do_not_depend_on_the_size_of_pieces(call, piece, monkeypatch):
    expected = call.run()
    seen = []
    monkeypatch.setattr(attention_kernels, "_PIECE", piece)
    weights = attention_kernels._weights
    monkeypatch.setattr(attention_kernels, "_weights", lambda s, rows: seen.append(s.numel()) or weights(s, rows))
    assert differences(expected, call.run(whole=True)) == []
    keys = call.shape[3]
    assert max(seen) <= max(piece, 256 * keys)
    assert sum(seen) == call.shape[0] * call.shape[1] * call.shape[2] * keys


def test_a_dispatch_mode_computes_it_too(monkeypatch):
    expected = DROPPED.run(whole=True)
    monkeypatch.setattr(dispatch, "available", lambda: False)
    assert differences(expected, DROPPED.run(whole=True)) == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_call_drops_the_same_weights_again(reentrant):
    q, k, v, dy, mask = DROPPED.operands()
    expected = DROPPED.run()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.manual_seed(5)
    with portable():
        made = checkpoint(attend, *leaves, mask, DROPPED, use_reentrant=reentrant)
        made.backward(dy)
    assert differences(expected[:4], [made.detach(), *(x.grad for x in leaves)]) == []


@pytest.mark.parametrize("nothing", [torch.no_grad, torch.inference_mode])
def test_nothing_has_to_be_recorded(nothing):
    q, k, v, _, mask = DROPPED.operands()
    expected = DROPPED.run()
    torch.manual_seed(5)
    with portable(), nothing():
        found = attend(q, k, v, mask, DROPPED)
    assert differences([expected[0], expected[-1]], [found, torch.rand(3)]) == []


def test_gradients_of_some_operands_are_those_of_all():
    expected = DROPPED.run()[1:4]
    for i, gradient in enumerate(expected):
        *operands, dy, mask = DROPPED.operands()
        operands[i].requires_grad_()
        torch.manual_seed(5)
        with portable():
            attend(*operands, mask, DROPPED).backward(dy)
        assert differences([gradient], [operands[i].grad]) == []


def test_a_second_backward_pass_has_the_bits_of_the_first():
    """Also of a trained mask in a shorter type, whose gradient is summed before it is rounded."""
    call = Attention((3, 2, 9, 16, 8, 8), "trained", (1, 2, 9, 16), dropout=0.2, dtype=torch.bfloat16)
    q, k, v, dy, mask = call.operands()
    mask.requires_grad_()
    torch.manual_seed(5)
    with portable():
        made = attend(q, k, v, mask, call)
        found = [torch.autograd.grad(made, mask, g, retain_graph=True)[0] for g in (dy, dy * 2, dy)]
    assert equal([call.run()[4]], found[:1])
    assert equal(found[:1], found[2:])
    assert not equal(found[:1], found[1:2])


def test_the_audit_says_that_it_is_of_the_format():
    q, k, v, _, mask = DROPPED.operands()
    found = audit(lambda: attend(q.requires_grad_(), k, v, mask, DROPPED).sum().backward())
    name = "aten::_scaled_dot_product_efficient_attention"
    assert found[name][1] == found[f"{name}_backward"][1] == "format"


def test_switches_are_put_back_and_a_choice_inside_holds():
    cuda = torch.backends.cuda

    def switches():
        return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()

    before = switches()
    with common_paths():
        assert switches() == (False, True, True)
        with sdpa_kernel(SDPBackend.MATH):
            assert switches() == (False, False, True)
    assert switches() == before


def test_composed_attention_is_of_fp32_whatever_was_allowed():
    call = Attention((2, 2, 24, 40, 16, 16), dropout=0.1, dtype=torch.bfloat16)
    expected = call.run()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        assert differences(expected, call.run()) == []
        assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
