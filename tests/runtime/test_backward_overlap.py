"""When an EST steps aside in its backward: what it calls, what the device does, and where there is room."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_easyscale.runtime import overlap as overlaps
from lightning_easyscale.runtime.executor import Executor
from lightning_easyscale.runtime.overlap import BackwardOverlap
from lightning_easyscale.runtime.peers import Peers

from .asides import Context, executor


def test_a_backward_that_is_not_overlapped_waits_for_one_that_is() -> None:
    host, order = executor(2), []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            order.append("backward 1")
            return 2 * grad

    def first() -> None:
        for step in range(3):
            if host.step_aside(0):
                time.sleep(0.1)
                order.append("backward 0")
                host.come_back(0)
            host.meet(0, step, "end", None, dict.fromkeys)

    def second() -> None:
        overlap = BackwardOverlap(host, 1, tell=lambda reason: None)
        for step in range(3):
            loss = Noted.apply(torch.ones(2, requires_grad=True)).sum()
            overlap.begin(loss)
            loss.backward()
            overlap.end()
            host.meet(1, step, "end", None, dict.fromkeys)

    host.run({0: first, 1: second})
    assert order == ["backward 0", "backward 1"] * 3


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def drawing(grad: Tensor) -> None:
    torch.default_generator.manual_seed(1)


LOSSES: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str | None]] = {
    "plain": (lambda net, x: net(x).square().mean(), None),
    "dropout": (lambda net, x: nn.functional.dropout(net(x), 0.5).mean(), None),
    "function": (lambda net, x: Doubled.apply(net(x)).mean(), "torch.autograd.function.apply"),
    "hook": (lambda net, x: hooked(net(x), drawing), f"{__name__}.drawing"),
    "checkpoint": (lambda net, x: checkpoint(net, x, use_reentrant=False).mean(), "torch.utils.checkpoint"),
    "reentrant": (lambda net, x: checkpoint(net, x, use_reentrant=True).mean(), "torch.autograd.function.apply"),
}


def ran_elsewhere(grad: Tensor) -> None:
    pass


@pytest.fixture
def said() -> list[str]:
    """Why backwards are not overlapped."""
    return []


def hooked(x: Tensor, hook: Callable[[Tensor], Any]) -> Tensor:
    x.register_hook(hook)
    return x.mean()


@pytest.mark.parametrize("kind", [kind for kind, (_, name) in LOSSES.items() if name is not None])
def test_a_backward_that_begins_to_call_into_python_gets_the_process_first(kind: str) -> None:
    contexts = {rank: Context() for rank in range(2)}
    host = Executor(contexts, Peers(0, 1), timeout=20)
    said, beside, hooks = [], [], []
    make, name = LOSSES[kind]
    plain, _ = LOSSES["plain"]

    def looking(rank: int, grad: Tensor) -> None:
        hooks.append((contexts[rank].inside, contexts[1 - rank].inside))

    def est(rank: int) -> None:
        net = nn.Linear(3, 3)
        overlap = BackwardOverlap(host, rank, tell=said.append)
        for step in range(6):
            x = torch.randn(4, 3, requires_grad=True)
            loss = (plain if step < 3 else make)(net, x)
            if step >= 3:
                # Behind what is noticed.
                x.register_hook(partial(looking, rank))
            switches = host.switches
            overlap.begin(loss)
            loss.sin().backward()
            overlap.end()
            if rank == 0:
                beside.append(host.switches > switches)
            host.meet(rank, step, "end", None, dict.fromkeys)

    with torch.random.fork_rng():
        host.run({rank: lambda rank=rank: est(rank) for rank in range(2)})
    # In step 3 EST 1 has had its turn when EST 0's backward is found to need the process.
    assert beside == [False, True, True, True, False, False]
    assert hooks == [(True, False)] * 6
    assert len(said) == 2
    assert name in said[0]


def test_what_ran_elsewhere_before_is_noticed_until_python_3_11(said: list[str]) -> None:
    host = executor(2)

    def est(rank: int) -> None:
        overlap = BackwardOverlap(host, rank, tell=said.append)
        for step in range(3):
            x = torch.randn(4, 3, requires_grad=True)
            if step > 0:
                x.register_hook(ran_elsewhere)
            loss = x.mean()
            overlap.begin(loss)
            loss.backward()
            overlap.end()
            ran_elsewhere(x)
            host.meet(rank, step, "end", None, dict.fromkeys)

    host.run({rank: lambda rank=rank: est(rank) for rank in range(2)})
    noticed = f"`overlap_backward` is left out: backward calls `{__name__}.ran_elsewhere`"
    assert said == ([] if sys.version_info >= (3, 12) else [noticed] * 2)


def test_an_error_of_what_a_backward_calls_is_the_users(said: list[str]) -> None:
    host = executor(2)

    def failing(grad: Tensor) -> None:
        raise ArithmeticError("in a hook")

    def est(rank: int) -> None:
        overlap = BackwardOverlap(host, rank, tell=said.append)
        for step in range(3):
            x = torch.randn(4, 3, requires_grad=True)
            if step == 2:
                x.register_hook(failing)
            loss = x.mean()
            overlap.begin(loss)
            try:
                loss.backward()
            finally:
                overlap.end()
            host.meet(rank, step, "end", None, dict.fromkeys)

    with pytest.raises(ArithmeticError, match="in a hook"):
        host.run({rank: lambda rank=rank: est(rank) for rank in range(2)})
    assert said[0].endswith("failing`")


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="there profilers are no obstacle")
def test_a_backward_that_somebody_else_profiles_is_left_alone() -> None:
    host, beside = executor(2), []

    def est(rank: int) -> None:
        overlap = BackwardOverlap(host, rank, tell=pytest.fail)
        for step in range(3):
            loss = torch.ones(2, requires_grad=True).sum()
            switches = host.switches
            sys.setprofile(lambda *_: None)
            overlap.begin(loss)
            loss.backward()
            overlap.end()
            assert sys.getprofile() is not None
            sys.setprofile(None)
            beside.append(host.switches > switches)
            host.meet(rank, step, "end", None, dict.fromkeys)

    host.run({rank: lambda rank=rank: est(rank) for rank in range(2)})
    assert not any(beside)


@pytest.mark.parametrize(
    ("votes", "overlapped"), [([True, True, False], True), ([True, False, False], False), ([False, True, True], True)]
)
def test_a_device_that_waits_for_python_is_overlapped(votes: list[bool], overlapped: bool) -> None:
    host, beside, asked, told, coming = executor(2), [], [], [], iter(votes)

    def reached() -> Callable[[], bool]:
        asked.append("at the start")
        return lambda: next(coming)

    def est(rank: int) -> None:
        overlap = BackwardOverlap(host, rank, tell=told.append, reached=reached if rank == 0 else lambda: bool)
        for step in range(8):
            loss = torch.ones(2, requires_grad=True).sum()
            switches = host.switches
            overlap.begin(loss)
            loss.backward()
            overlap.end()
            if rank == 0:
                beside.append(host.switches > switches)
            host.meet(rank, step, "end", None, dict.fromkeys)

    host.run({rank: lambda rank=rank: est(rank) for rank in range(2)})
    # The first backward is watched, three are asked.
    assert beside == [False] * 4 + [overlapped] * 4
    assert len(asked) == 3
    assert any("the device waits for Python" in what for what in told) is overlapped


@pytest.mark.parametrize("kind", LOSSES)
def test_the_first_backward_decides(kind: str) -> None:
    make, reason = LOSSES[kind]
    host, said, beside = executor(2), [], []

    def est(rank: int) -> None:
        net = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.BatchNorm1d(3))
        overlap = BackwardOverlap(host, rank, tell=said.append)
        for step in range(2):
            loss = make(net, torch.randn(4, 3, requires_grad=True))
            switches = host.switches
            overlap.begin(loss)
            loss.sin().backward()
            overlap.end()
            if rank == 0:
                beside.append(host.switches - switches)
            host.meet(rank, ("end", step), "end", None, dict.fromkeys)

    with torch.random.fork_rng():
        host.run({rank: lambda rank=rank: est(rank) for rank in range(2)})
    assert beside[0] == 0
    if reason is None:
        assert not said
        assert beside[1] > 0
    else:
        assert len(said) == 2
        assert reason in said[0]
        assert beside[1] == 0


class Told:
    """Which gradients are listened to."""

    now: tuple[int, ...] = ()

    def listen(self, indices: Collection[int]) -> None:
        self.now = tuple(indices)


@pytest.mark.parametrize(
    ("levels", "listened"),
    [
        # At the start, with 4, 5, 6 and 7 eighths of the gradients, and at the end.
        ((100, 40, 30, 20, 10, 0), (3,)),
        ((100, 95, 80, 50, 10, 0), (1,)),
        ((100, 95, 90, 80, 70, 0), ()),
        # What is in use all the time does not count.
        ((1100, 1060, 1040, 1020, 1010, 1000), (2,)),
    ],
)
def test_a_forward_begins_where_half_of_the_memory_is_given_back(
    levels: tuple[int, ...], listened: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlaps, "MEASURED_EVERY", 3)
    host, told, beside, alone = executor(2), Told(), [], []
    order, now = [7, 6, 5, 4, 3, 2, 1, 0], iter(levels * 2)

    def first() -> None:
        overlap = BackwardOverlap(
            host, 0, tell=beside.append, alone=lambda: alone.append(host.holder), allocated=lambda: next(now)
        )
        for step in range(8):
            if step == 1:
                overlap.know_order(order, lambda came: told)
            switches = host.switches
            loss = torch.ones(2, requires_grad=True).square().sum()
            overlap.begin(loss)
            loss.backward()
            for index in order:
                if index in told.now:
                    overlap.came(index)
            overlap.end()
            beside.append(host.switches > switches)
            host.meet(0, step, "end", None, dict.fromkeys)

    def second() -> None:
        for step in range(8):
            host.await_room()
            host.await_aside(1)
            host.meet(1, step, "end", None, dict.fromkeys)

    host.run({0: first, 1: second})
    assert told.now == listened
    assert alone == [0] * 8
    # Alone are the first backward, the first with a known order, and every fourth from there on, which measure.
    assert beside == [False, False, True, True, True, False, True, True]
