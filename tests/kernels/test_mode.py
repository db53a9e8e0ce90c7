"""The portable policy in force: what it computes, what it refuses, what it reports."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_easyscale import determinism
from lightning_easyscale.kernels import PortableMode, UnvettedOperationError, build, how_covered, portable
from lightning_easyscale.kernels.registry import EXACT, REPLACED

from .training import convolutional, transformer

needs_compiler = pytest.mark.skipif(bool(build.why_unavailable()), reason=build.why_unavailable() or "available")


def test_an_operation_that_nobody_vouches_for_is_refused_by_name_unless_it_is_allowed():
    x = torch.rand(5, 5)
    with portable(), pytest.raises(UnvettedOperationError, match=r"`aten::cumsum` .* `allow=\['aten::cumsum'\]`"):
        x.cumsum(0)
    with portable(allow=["aten::cumsum"]):
        assert torch.equal(x.cumsum(0), x.cumsum(0))
    with portable():
        assert torch.arange(4).cumsum(0).tolist() == [0, 1, 3, 6]  # whole numbers are exact in any order


def test_double_precision_is_refused_where_the_format_has_no_kernel():
    x = torch.rand(3, 3, dtype=torch.float64)
    with portable(), pytest.raises(NotImplementedError, match=r"`aten::mm` was called on float64"):
        x @ x


@pytest.mark.parametrize("name", sorted(EXACT | set(REPLACED)))
def test_the_vetted_list_names_operations_that_exist(name):
    single = name.removeprefix("aten::")
    assert hasattr(torch.ops.aten, single) or hasattr(torch.ops.aten, single + "_"), name


def test_no_operation_is_both_exact_and_of_the_format():
    assert not EXACT & set(REPLACED)


@needs_compiler
def test_the_mode_leaves_switches_and_other_threads_as_they_were():
    cudnn, flash = torch.backends.cudnn.enabled, torch.backends.cuda.flash_sdp_enabled()
    a, b = torch.rand(40, 300), torch.rand(300, 40)
    seen = []
    with portable():
        mine = a @ b
        thread = threading.Thread(target=lambda: seen.append(a @ b))
        thread.start()
        thread.join()
    assert (torch.backends.cudnn.enabled, torch.backends.cuda.flash_sdp_enabled()) == (cudnn, flash)
    assert torch.equal(seen[0], a @ b)
    assert not torch.equal(mine, seen[0])


@needs_compiler
def test_dropout_of_the_cpu_and_of_cuda_are_one():
    # CUDA calls `native_dropout`, the CPU composes it of other operations.
    x = torch.randn(1000, requires_grad=True)
    with portable():
        torch.manual_seed(3)
        composed = nn.functional.dropout(x, 0.3)
        torch.manual_seed(3)
        native, _ = torch.native_dropout(x, 0.3, True)
        assert torch.equal(composed, native)
        assert torch.equal(*(torch.autograd.grad((y * 3).sum(), x)[0] for y in (composed, native)))


@needs_compiler
@pytest.mark.parametrize("model", [convolutional, transformer])
def test_an_audit_lists_what_a_model_calls_and_how_it_is_covered(model):
    net, batch = model()
    found = determinism.audit(net, batch)
    assert found["aten::addmm"][1] == "format"
    assert found["aten::view"][1] == "exact"
    assert all(covered for _, covered in found.values())
    assert all(p.grad is None for p in net.parameters())


def test_an_audit_shows_what_would_be_refused():
    assert determinism.audit(lambda x: x.cumsum(0), torch.rand(3)) == {"aten::cumsum": (1, "")}
    assert how_covered("aten::_foreach_addcmul_") == "format"
    assert how_covered("aten::_fused_adam_") == ""
    assert how_covered("symm_mem::fused_all_gather_matmul") == ""  # communicates, but multiplies too
    assert how_covered("c10d::allreduce_") == "exact"


def test_without_a_compiler_the_refusal_names_the_cure(tmp_path):
    code = "from lightning_easyscale.kernels import build; build.load(build.default_width())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={"CXX": "/nowhere", "PATH": "", "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert "cannot run here" in done.stderr
    assert "HINT" in done.stderr


LISTS = {
    "add": [
        (2,),
        ("list",),
        ("list", {"alpha": 0.3}),
        (torch.tensor(0.7),),
        (torch.tensor(0.7), {"alpha": 0.3}),
        (torch.tensor(0.7, dtype=torch.float64),),
    ],
    "sub": [("list",), ("list", {"alpha": 0.3})],
    "div": [(3,), ("list",), ([3.0, 7.0, 0.1],)],
    "addcmul": [("list", "list"), ("list", "list", {"value": 0.3}), ("list", "list", [0.1, 0.2, 0.3])],
    "addcdiv": [("list", "list", {"value": 0.3}), ("list", "list", [0.1, 0.2, 0.3])],
    "lerp": [("list", 0.1), ("list", 0.9)],
    "sqrt": [()],
}


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "given"), [(name, given) for name, cases in LISTS.items() for given in cases])
def test_operations_on_lists_in_place_have_the_bits_of_those_that_are_not(name, given, dtype):
    def tensors(seed):
        generator = torch.Generator().manual_seed(seed)
        return [(torch.rand(n, generator=generator) + 0.1).to(dtype) for n in (1, 7, 30)]

    options = given[-1] if given and isinstance(given[-1], dict) else {}
    operands = [tensors(i + 1) if v == "list" else v for i, v in enumerate(v for v in given if v is not options)]
    start, changed = tensors(0), tensors(0)
    with portable():
        expected = getattr(torch, f"_foreach_{name}")(start, *operands, **options)
        getattr(torch, f"_foreach_{name}_")(changed, *operands, **options)
        single = [getattr(x, name) for x in start]
        if len(operands) == 1 and isinstance(operands[0], torch.Tensor):
            operands = [operands * len(start)]
        if len(operands) == 1 and isinstance(operands[0], list) and isinstance(operands[0][0], torch.Tensor):
            one_by_one = [function(y, **options) for function, y in zip(single, operands[0], strict=True)]
            assert all(torch.equal(x, y) for x, y in zip(one_by_one, expected, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(changed, expected, strict=True))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("other", [0.1, 3, torch.arange(4.0), torch.arange(4, dtype=torch.bfloat16), torch.arange(4)])
def test_an_addition_in_place_has_the_bits_of_one_that_is_not(dtype, other):
    x = (torch.arange(12) / 7).view(3, 4).to(dtype)
    for options in ({}, {"alpha": 1 if isinstance(other, torch.Tensor) and other.dtype == torch.int64 else 0.3}):
        with portable():
            expected = torch.add(x, other, **options).to(dtype)
            assert torch.equal(x.clone().add_(other, **options), expected)


def test_the_steps_that_optimizers_count_are_added_at_once(monkeypatch):
    steps, one = [torch.zeros(()) for _ in range(3)], torch.tensor(1.0)
    monkeypatch.setattr("lightning_easyscale.kernels.arithmetic._once", None)  # for single tensors
    with portable():
        torch._foreach_add_(steps, one, alpha=1.0)
    assert steps == [1, 1, 1]


def test_operations_pay_for_no_switch_of_torchs_compiler():
    assert not hasattr(PortableMode.__torch_dispatch__, "__wrapped__")
