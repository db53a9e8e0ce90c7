"""Stepping aside: one EST's backward beside the next one's forward."""

from __future__ import annotations

import threading
import time

import pytest

from lightning_easyscale.runtime.errors import ESTHang
from lightning_easyscale.runtime.executor import Executor
from lightning_easyscale.runtime.peers import Peers

from .asides import Context, executor


def test_another_est_runs_while_one_is_aside_and_is_waited_for() -> None:
    host, order, others = executor(3), [], threading.Event()

    def est(rank: int) -> None:
        order.append(f"forward {rank}")
        aside = host.step_aside(rank)
        if rank == 0:
            assert aside
            assert others.wait(10), "nobody ran beside EST 0"
        elif rank == 1:
            others.set()
        if aside:
            host.come_back(rank)
        order.append(f"backward {rank}")
        host.meet(rank, "end", "end", None, dict.fromkeys)

    def second() -> None:
        others.set()
        est(1)

    host.run({0: lambda: est(0), 1: second, 2: lambda: est(2)})
    assert order.index("forward 1") < order.index("backward 0") < order.index("backward 1")
    # One EST at most is ahead of a backward, so that no more than two hold activations.
    assert order.index("backward 0") < order.index("forward 2")


def test_the_last_est_keeps_the_baton() -> None:
    host, kept = executor(2), []

    def est(rank: int) -> None:
        aside = host.step_aside(rank)
        kept.append((rank, aside))
        if aside:
            host.come_back(rank)
        host.meet(rank, "end", "end", None, dict.fromkeys)

    host.run({rank: lambda rank=rank: est(rank) for rank in range(2)})
    assert kept == [(0, True), (1, False)]


def test_state_is_swapped_when_an_est_steps_aside_and_comes_back() -> None:
    contexts = {rank: Context() for rank in range(2)}
    host = Executor(contexts, Peers(0, 1), timeout=20)

    def est(rank: int) -> None:
        if host.step_aside(rank):
            assert not contexts[rank].inside
            host.come_back(rank)
        assert contexts[rank].inside
        host.meet(rank, "end", "end", None, dict.fromkeys)

    host.run({rank: lambda rank=rank: est(rank) for rank in range(2)})


def test_a_collective_while_aside_is_an_error() -> None:
    host = executor(2)

    def est(rank: int) -> None:
        if host.step_aside(rank):
            try:
                # The rank of whoever has the process: what code that asks for it is told.
                host.meet(1, "inside", "all_reduce", None, dict.fromkeys)
            finally:
                host.come_back(rank)
        host.meet(rank, "end", "end", None, dict.fromkeys)

    with pytest.raises(RuntimeError, match=r"The backward of EST 0 calls a collective .*`overlap_backward=False`"):
        host.run({rank: lambda rank=rank: est(rank) for rank in range(2)})


def test_a_forward_waits_until_a_backward_leaves_room() -> None:
    host, order, prepared = executor(2), [], threading.Event()

    def first() -> None:
        for step in range(2):
            assert host.step_aside(0, leaves_room=False)
            assert prepared.wait(10), "nothing ran beside EST 0"
            time.sleep(0.1)
            order.append("half")
            if step == 0:
                host.leave_room(0)
            # In the second step it never does, and its end does it.
            host.come_back(0)
            host.meet(0, step, "end", None, dict.fromkeys)

    def second() -> None:
        for step in range(2):
            order.append("data")
            prepared.set()
            host.await_room()
            order.append("forward")
            host.await_aside(1)
            host.meet(1, step, "end", None, dict.fromkeys)

    host.run({0: first, 1: second})
    assert order == ["data", "half", "forward"] * 2


def test_a_backward_that_leaves_no_room_is_a_hang() -> None:
    host, release = executor(2, timeout=0.3), threading.Event()

    def first() -> None:
        assert host.step_aside(0, leaves_room=False)
        release.wait(1.5)
        host.come_back(0)

    with pytest.raises(ESTHang, match=r"EST 0 was in its backward for 0 s"):
        host.run({0: first, 1: host.await_room})


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_beside_a_backward_ends_both(failing: int) -> None:
    host, started = executor(2), threading.Event()

    def est(rank: int) -> None:
        aside = host.step_aside(rank)
        try:
            if aside:
                assert started.wait(10)
            if rank == failing:
                raise ArithmeticError(f"EST {rank}")
        finally:
            if aside:
                host.come_back(rank)
        host.meet(rank, "end", "end", None, dict.fromkeys)

    def second() -> None:
        started.set()
        if failing == 1:
            raise ArithmeticError("EST 1")
        est(1)

    with pytest.raises(ArithmeticError, match=f"EST {failing}"):
        host.run({0: lambda: est(0), 1: second})


def test_a_backward_that_does_not_end_is_a_hang() -> None:
    host, release = executor(2, timeout=0.3), threading.Event()

    def est(rank: int) -> None:
        if host.step_aside(rank):
            release.wait(1.5)
            host.come_back(rank)
        host.meet(rank, "end", "end", None, dict.fromkeys)

    with pytest.raises(ESTHang, match=r"EST 0 was in its backward for 0 s"):
        host.run({rank: lambda rank=rank: est(rank) for rank in range(2)})
