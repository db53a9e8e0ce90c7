"""Inputs leave the device while their EST waits, and are what they were when it goes on."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_easyscale.reduction.host import HostRoom
from lightning_easyscale.reduction.inputs import WORTH, InputTurns, WaitingInputs

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]
LARGE = WORTH // 4  # elements


def to(device: str, tensor: Tensor) -> Tensor:
    """A copy on a device, also where it is the same."""
    return tensor.to(device, copy=True)


def alone() -> WaitingInputs:
    """The inputs of an executor's only EST."""
    return InputTurns().of(0)


def size(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_and_views_of_them_come_back(device: str) -> None:
    given = {"x": torch.randn(3, LARGE).t(), "y": [torch.arange(LARGE)]}
    moved: Any = {"x": to(device, given["x"]), "y": [to(device, given["y"][0])]}
    moved["x"][0] += 1  # as a step may
    expected, view, version = moved["x"].clone(), moved["x"][:, 1], moved["x"]._version
    inputs = alone()
    inputs.hold(given, moved)
    for _ in range(3):
        with inputs.away():
            assert size(moved["x"]) == size(view) == size(moved["y"][0]) == 0
            # What others put where they were.
            others = [torch.full((3, LARGE), torch.nan, device=device) for _ in range(3)]
            del others
        assert torch.equal(moved["x"], expected)
        assert torch.equal(view, expected[:, 1])
        assert torch.equal(moved["y"][0].cpu(), given["y"][0])
        assert moved["x"].stride() == expected.stride()
        assert moved["x"]._version == version


@pytest.mark.parametrize("device", DEVICES)
def test_a_graph_that_was_retained_can_be_gone_through_again(device: str) -> None:
    given = torch.randn(4, LARGE)
    moved = to(device, given)
    weight = torch.randn(LARGE, device=device, requires_grad=True)
    inputs = alone()
    inputs.hold(given, moved)
    loss = (moved @ weight).sum()
    loss.backward(retain_graph=True)
    first, weight.grad = weight.grad, None
    with inputs.away():
        pass
    loss.backward()
    assert torch.equal(weight.grad, first)


def test_host_memory_serves_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    take_in = HostRoom.take_in

    def noted(self: HostRoom, tensor: Tensor) -> Tensor:
        room = take_in(self, tensor)
        used.append(room.data_ptr())
        return room

    monkeypatch.setattr(HostRoom, "take_in", noted)
    inputs = alone()
    for shapes in ([(LARGE,), (2, LARGE)],) * 3 + ([(3, LARGE)],) * 2:
        given = [torch.randn(shape) for shape in shapes]
        moved = [tensor.clone() for tensor in given]
        inputs.hold(given, moved)
        with inputs.away():
            pass
        assert all(map(torch.equal, moved, given))
    assert used[:2] == used[2:4] == used[4:6]
    assert used[6] == used[7]


def test_what_others_may_read_or_is_not_worth_it_stays() -> None:
    large, small = torch.randn(LARGE), torch.randn(LARGE - 1)
    learnt = torch.randn(LARGE, requires_grad=True)
    moved = [large, small.clone(), learnt.clone(), "a name", torch.nn.Parameter(large.clone())]
    inputs = alone()
    inputs.hold([large, small, learnt, "a name", large], moved)
    with inputs.away():
        assert all(size(tensor) for tensor in moved if isinstance(tensor, Tensor))
    # Of another structure: nobody knows what came of what.
    inputs.hold([large], {"x": large.clone(), "y": (one := large.clone())})
    with inputs.away():
        assert size(one)


def test_two_of_one_storage_come_back() -> None:
    given, inputs = torch.randn(2, LARGE), alone()
    moved = given.clone()
    both = [moved, moved[0]]
    inputs.hold([given, given[0]], both)
    with inputs.away():
        assert not size(moved)
    assert torch.equal(moved, given)


def test_batches_are_not_kept_alive_and_the_last_one_counts() -> None:
    inputs, given = alone(), torch.randn(LARGE)
    earlier, later = given.clone(), given.clone()
    inputs.hold(given, earlier)
    inputs.hold(given, later)
    with inputs.away():
        assert size(earlier)
        assert not size(later)
    del later
    with inputs.away():
        pass


def test_they_come_back_when_waiting_ends_by_an_error() -> None:
    given = torch.randn(LARGE)
    moved, inputs = given.clone(), alone()
    inputs.hold(given, moved)
    with pytest.raises(ZeroDivisionError), inputs.away():
        raise ZeroDivisionError
    assert torch.equal(moved, given)


@pytest.mark.parametrize("device", DEVICES)
def test_they_set_out_when_the_turn_before_ends(device: str) -> None:
    turns, log = InputTurns(), []
    ests = [turns.of(rank) for rank in (4, 5, 6)]
    given = [torch.randn(2, LARGE) for _ in ests]
    moved = [to(device, tensor) for tensor in given]
    for inputs, before, after in zip(ests, given, moved, strict=True):
        inputs.hold(before, after)
    with contextlib.ExitStack() as waiting:
        for rank, inputs in enumerate(ests):
            waiting.enter_context(inputs.away())
            log.append([len(other._coming) for other in ests])
            assert not any(map(size, moved[: rank + 1]))
        # The last one's turn ends with the first one's inputs on their way; it alone goes on and comes again.
        assert log == [[0, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert all(map(torch.equal, (tensor.cpu() for tensor in moved), given))
    for inputs in ests * 2:
        with inputs.away():
            pass
    assert all(map(torch.equal, (tensor.cpu() for tensor in moved), given))


@pytest.mark.gpu
@needs_cuda
def test_they_come_back_whole_where_the_link_is_slow() -> None:
    given = torch.randn(8, LARGE)
    moved, inputs = given.cuda(), alone()
    inputs.hold(given, moved)
    with inputs._turns.aside.after(torch.empty(1, device="cuda")):
        torch.cuda._sleep(200_000_000)
    with inputs.away():
        torch.full((8, LARGE), torch.nan, device="cuda")
    assert torch.equal(moved.cpu(), given)


@pytest.mark.gpu
@needs_cuda
def test_memory_beside_is_not_used_again_before_it_was_read() -> None:
    turns = InputTurns()
    ests = [turns.of(rank) for rank in range(3)]
    given = [torch.full((8, LARGE), float(rank)) for rank in range(3)]
    moved = [tensor.cuda() for tensor in given]
    for inputs, before, after in zip(ests, given, moved, strict=True):
        inputs.hold(before, after)
    for _ in range(3):
        with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
            first.enter_context(ests[0].away())
            second.enter_context(ests[1].away())
            torch.cuda.synchronize()
            torch.cuda._sleep(200_000_000)  # the device is busy, so the first one's are read late
            first.close()
            found = moved[0].clone()
            with ests[0].away():  # the second one's set out
                pass
        assert torch.equal(found.cpu(), given[0])
        assert torch.equal(moved[1].cpu(), given[1])


@pytest.mark.gpu
@needs_cuda
def test_the_memory_is_free_for_others() -> None:
    given = torch.randn(8, LARGE)
    moved, inputs = given.cuda(), alone()
    inputs.hold(given, moved)
    before = torch.cuda.memory_allocated()
    with inputs.away():
        torch.cuda.synchronize()
        assert before - torch.cuda.memory_allocated() == given.nbytes
    assert torch.cuda.memory_allocated() == before
