"""What is agreed on ahead needs no header; executors that then do something else find out, and wait for nobody."""

from __future__ import annotations

import pytest
import torch

from lightning_easyscale.runtime.ahead import Habit, Transfer
from tests.reduction.pool import Pool

from . import steps

BUFFERS = Transfer.of("buffers", [torch.ones(3), torch.tensor(2)], 0)
OTHERS = Transfer.of("buffers", [torch.ones(4), torch.tensor(2)], 0)


def test_what_has_followed_twice_is_proposed() -> None:
    habit = Habit()
    proposed = []
    for _ in range(4):
        proposed.append(habit.header(True))
        habit.transfer(BUFFERS)
    assert proposed == [None, None, BUFFERS, BUFFERS]


@pytest.mark.parametrize("instead", ["a header", "another transfer", "a header that may propose"])
def test_something_else_ends_a_habit(instead: str) -> None:
    habit = Habit()
    for _ in range(3):
        habit.header(True)
        habit.transfer(BUFFERS)
    assert habit.header(True) is BUFFERS
    if instead == "another transfer":
        habit.transfer(OTHERS)
    else:
        assert habit.header(instead != "a header") is None
    assert habit.header(True) is None


def test_only_what_comes_first_after_such_a_header_counts() -> None:
    habit = Habit()
    for _ in range(5):
        assert habit.header(True) is None
        habit.header(False)
        habit.transfer(BUFFERS)


def test_blanks_are_the_same_messages() -> None:
    blanks = BUFFERS.blanks()
    assert Transfer.of("buffers", blanks, 0).digest == BUFFERS.digest != OTHERS.digest
    assert not any(blank.any() for blank in blanks)


@pytest.mark.parametrize("placement", [(1, 1), (1, 1, 1), (2, 1), (1, 2)])
def test_a_step_takes_two_messages_beside_its_gradients(pool: Pool, placement: tuple[int, ...]) -> None:
    found = {}
    for part in pool.run(len(placement), steps.alike, placement=placement):
        found.update(part)
    assert sorted(found) == list(range(sum(placement)))
    for first, total, again in found.values():
        assert all(right for right, _ in first + again), "the buffers are not those of EST 0"
        assert total == sum(placement)
    # Header, buffers, gradients; later the buffers and the gradients alone. Something else, done by all, is no error.
    first, _, again = found[0]
    assert [count for _, count in first] == [3, 3, 3, 2, 2, 2]
    assert [count for _, count in again] == [3, 3, 3, 2, 2, 2]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("does", ["reduces", "leaves out a forward"])
def test_an_executor_that_does_something_else_is_a_mismatch(pool: Pool, which: int, does: str) -> None:
    there = "all_reduce(float32[1]) RedOpType.SUM" if does == "reduces" else "gradients"
    for kind, message in pool.run(2, steps.break_off, what=f"executor {which} {does}"):
        assert kind == "CollectiveMismatch", message
        assert f"executor {which} is at `{there}` without `broadcast_coalesced(" in message
        assert f"executor {1 - which} is at `gradients`" in message
        assert "HINT: every rank has to call the same collectives" in message


def test_other_buffers_are_a_mismatch(pool: Pool) -> None:
    for kind, message in pool.run(2, steps.break_off, what="executor 1 sends other buffers"):
        assert kind == "CollectiveMismatch", message
        assert "executor 0 is at `gradients`" in message
        assert "executor 1 is at `broadcast_coalesced(1 of torch.float32)` without `broadcast_coalesced(1" in message


@pytest.mark.parametrize("which", [0, 1])
def test_a_failure_after_the_agreement_is_told_with_its_cause(pool: Pool, which: int) -> None:
    found = pool.run(2, steps.break_off, what=f"executor {which} fails")
    assert found[which] == ("ZeroDivisionError", "division by zero")
    cause = f"EST {which} failed on executor {which}: ZeroDivisionError('division by zero')"
    assert found[1 - which] == ("RemoteESTError", cause)


def test_a_run_that_ends_early_keeps_nobody_waiting_and_is_found_out(pool: Pool) -> None:
    for kind, message in pool.run(2, steps.end_early):
        assert kind == "CollectiveMismatch", message
        assert "executor 0 is at `barrier`" in message
        assert "executor 1 is at `barrier` without `broadcast_coalesced(" in message
