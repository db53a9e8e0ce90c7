"""The portable policy in torch's dispatcher: what falls through, what is refused, and that a mode has the same bits."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_easyscale.kernels import (
    PortableMode,
    UnvettedOperationError,
    audit,
    build,
    common_paths,
    dispatch,
    portable,
    put_in_force,
)

from .cases import CASES, differences, operands, run
from .training import convolutional, losses_and_parameters, transformer

needs_compiler = pytest.mark.skipif(bool(build.why_unavailable()), reason=build.why_unavailable() or "available")


def test_this_torch_leaves_the_key_to_others():
    assert dispatch.available()


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_a_dispatch_mode_gives_the_same_bits(name, monkeypatch):
    given = operands(CASES[name])
    found = run(CASES[name], given)
    monkeypatch.setattr(dispatch, "available", lambda: False)
    assert differences(run(CASES[name], given), found) == []


@needs_compiler
@pytest.mark.parametrize(
    ("model", "optimizer"), [(convolutional, "sgd"), (transformer, "adam"), (transformer, "adamw")]
)
def test_a_dispatch_mode_trains_to_the_same_bits(model, optimizer):
    found = losses_and_parameters(model, optimizer, device="cpu", steps=5)
    expected = losses_and_parameters(model, optimizer, device="cpu", steps=5, mode=PortableMode())
    assert differences(expected, found) == []


def test_where_the_key_is_taken_the_policy_is_a_mode(monkeypatch):
    monkeypatch.setattr(dispatch, "available", lambda: False)
    assert isinstance(put_in_force(), PortableMode)


def test_operations_that_are_exact_anyway_call_no_python(monkeypatch):
    with portable():
        pass
    monkeypatch.setattr(dispatch, "compute", lambda *_: pytest.fail("was called"))
    x = torch.randn(6, 4, requires_grad=True)
    with portable():
        y = (x.view(4, 6).t() * 2).contiguous()
        y.backward(torch.ones(6, 4))
    assert x.grad is not None


@pytest.mark.parametrize("inside", [portable, PortableMode])
def test_operations_on_lists_are_torchs_where_those_on_tensors_are(inside):
    xs = [torch.tensor([1.4, -2.6]), torch.tensor([0.5])]
    with inside():
        for name in ("round", "ceil", "trunc", "neg"):
            made = getattr(torch, f"_foreach_{name}")(xs)
            assert all(torch.equal(y, getattr(torch, name)(x)) for x, y in zip(xs, made, strict=True))


@needs_compiler
def test_composed_operations_have_the_same_bits_where_nothing_is_recorded():
    """Without autograd they come as a whole, with it as what they are composed of."""
    x, w, b = torch.randn(5, 300), torch.randn(7, 300), torch.randn(7, requires_grad=True)
    with portable():
        expected = [F.linear(x, w, b), F.softmax(x, 1), x.std(1), F.silu(x), F.cross_entropy(x, torch.arange(5))]
        for nothing in (torch.no_grad, torch.inference_mode):
            with nothing():
                found = [F.linear(x, w, b), F.softmax(x, 1), x.std(1), F.silu(x), F.cross_entropy(x, torch.arange(5))]
            assert all(torch.equal(e, f) for e, f in zip(expected, found, strict=True))


@needs_compiler
def test_the_policy_may_be_in_force_twice_and_ends_with_an_exception():
    a, b = torch.randn(40, 300), torch.randn(300, 40)
    stock = a @ b
    with portable():
        with portable(allow=["aten::cumsum"]):
            inner = a @ b
            a.cumsum(0)
        assert torch.equal(a @ b, inner)
        with pytest.raises(UnvettedOperationError):
            a.cumsum(0)
    with pytest.raises(UnvettedOperationError), portable():
        a.cumsum(0)
    assert torch.equal(a @ b, stock)
    assert not torch.equal(inner, stock)


def test_what_one_thread_allows_ends_when_it_leaves():
    entered, leave = threading.Event(), threading.Event()

    def allow() -> None:
        with put_in_force(allow=["aten::cumsum"]):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=allow)
    thread.start()
    assert entered.wait(10)
    leave.set()
    thread.join()
    with portable(), pytest.raises(UnvettedOperationError):
        torch.rand(3).cumsum(0)


class _Nested(torch.autograd.Function):
    """A backward within a backward, and so on; torch runs those too deep in threads of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, depth: int, inmost: Any) -> torch.Tensor:
        ctx.depth, ctx.inmost = depth, inmost
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        if ctx.depth:
            with torch.enable_grad():
                _Nested.apply(torch.ones(1, requires_grad=True), ctx.depth - 1, ctx.inmost).backward()
        else:
            ctx.inmost()
        return gradients[0], None, None


@needs_compiler
def test_autograd_carries_the_policy_into_its_threads():
    a, b = torch.randn(40, 300), torch.randn(300, 40)
    stock = a @ b
    seen = []
    with portable():
        expected = a @ b
        inmost = lambda: seen.append((threading.get_ident(), a @ b))  # noqa: E731
        _Nested.apply(torch.ones(1, requires_grad=True), 130, inmost).backward()
    (thread, found), *_ = seen
    assert thread != threading.get_ident()
    assert torch.equal(found, expected)
    assert not torch.equal(found, stock)


def test_a_thread_that_has_gone_is_left_by_another():
    left = put_in_force()
    thread = threading.Thread(target=left.__enter__)
    thread.start()
    thread.join()
    with portable():
        left.__exit__(None, None, None)
        with pytest.raises(UnvettedOperationError):
            torch.rand(3).cumsum(0)
    torch.rand(3).cumsum(0)


class _Products(Dataset[Any]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = torch.randn(40, 3000, generator=generator), torch.randn(3000, 40, generator=generator)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.a @ self.b


@needs_compiler
def test_data_workers_that_are_forked_under_the_policy_keep_torchs_kernels():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a data worker
    try:
        data = _Products()
        expected = data[0]
        with portable():
            assert not torch.equal(data[0], expected)
            found = list(DataLoader(data, num_workers=1, batch_size=None, multiprocessing_context="fork"))
        assert all(torch.equal(x, expected) for x in found)
    finally:
        torch.set_num_threads(threads)


def test_operations_of_other_libraries_are_refused_unless_they_are_allowed():
    @torch.library.custom_op("easyscale_tests::halved", mutates_args=())
    def halved(x: torch.Tensor) -> torch.Tensor:
        return x / 2

    x = torch.ones(3)
    for inside in (portable, PortableMode):
        with inside(), pytest.raises(UnvettedOperationError, match=r"`easyscale_tests::halved` .* HINT: .*allow="):
            halved(x)
    with portable(allow=["easyscale_tests::halved"]):
        assert halved(x).tolist() == [0.5] * 3


def test_operations_of_other_libraries_that_make_no_tensor_are_not_refused():
    library = torch.library.Library("easyscale_tests", "FRAGMENT")
    library.define("version() -> int")
    library.impl("version", lambda: 7, "CompositeExplicitAutograd")
    library.define("doubled_(Tensor(a!) x) -> ()")
    library.impl("doubled_", lambda x: x.mul_(2), "CompositeExplicitAutograd")
    for inside in (portable, PortableMode):
        with inside():
            assert torch.ops.easyscale_tests.version() == 7
            with pytest.raises(UnvettedOperationError):
                torch.ops.easyscale_tests.doubled_(torch.ones(2))


def test_an_audit_lists_what_is_called_only_where_there_is_no_mode():
    x = torch.randn(5, requires_grad=True)
    found = audit(lambda: x[torch.tensor([0, 0, 1])].sum().backward())
    assert found["aten::_index_put_impl_"][1] == "format"
    with common_paths(), PortableMode(audit=True) as mode:
        x[torch.tensor([0, 0, 1])].sum().backward()
    assert "aten::_index_put_impl_" not in mode.seen


def test_an_audit_leaves_refusal_as_it_was():
    assert audit(lambda: torch.rand(3).cumsum(0))["aten::cumsum"] == (1, "")
    with portable(), pytest.raises(UnvettedOperationError):
        torch.rand(3).cumsum(0)
