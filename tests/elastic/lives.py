"""Joins what the lives of an elastic run have noted, and compares it with an undisturbed reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..integration.harness import Outcome, RunFailedError, compare

STOPPED = 75


def joined(lives: list[Outcome]) -> Outcome:
    """One outcome of all lives; what a later life did again must be what the earlier one did."""
    notes: dict[int, list[tuple[str, Any]]] = {}
    for life in lives:
        for rank, values in life.notes.items():
            ended = [v for v in values if v[0] != "exception" and not (life is not lives[-1] and v[0] == "teardown")]
            before = notes.setdefault(rank, [])
            names = [name for name, _ in before]
            again = names.index(ended[0][0]) if ended and ended[0][0] in names else len(before)
            done_twice = before[again:]
            assert done_twice == ended[: len(done_twice)], f"rank {rank}: a later life did something else"
            notes[rank] = before[:again] + ended
    return Outcome(notes, lives[-1].files, lives[-1].errors, [log for life in lives for log in life.logs])


def check_stopped(life: Outcome, *, ranks: int, saved: dict[str, str]) -> None:
    """Every process ended with the exit code of a stop, every EST's hooks were told, and this is what is left."""
    for error, log in zip(life.errors, life.logs, strict=True):
        assert error is not None, log
        assert (error["type"], error["code"]) == ("TrainingStopped", STOPPED), error["traceback"] + log
    assert sorted(life.notes) == list(range(ranks))
    for values in life.notes.values():
        assert [value for name, value in values if name == "exception"] == ["TrainingStopped"]
    assert life.left == saved, life.left


def check_tail(reference: Outcome, last: Outcome, *, again_from: int) -> None:
    """The last life went on from batch `again_from` at the earliest and did the rest as the reference did."""
    for outcome in reference, last:
        if outcome.error is not None:
            raise RunFailedError(outcome.error["traceback"] + outcome.error.get("log", ""))
    for rank, values in reference.notes.items():
        mine = last.notes[rank]
        names = [name for name, _ in values]
        assert f"train {again_from} outputs" not in [name for name, _ in mine], "it began too early"
        assert mine == values[names.index(mine[0][0]) :], f"rank {rank} differs"
    compare(replace(reference, notes={0: [("-", 0)]}), replace(last, notes={0: [("-", 0)]}))
    assert last.left == {}


def check_finished(reference: Outcome, lives: list[Outcome], *, files: bool = True) -> None:
    """The last life ended by itself, nothing is left to go on from, and all lives together equal the reference."""
    for outcome in reference, lives[-1]:
        if outcome.error is not None:
            raise RunFailedError(outcome.error["traceback"] + outcome.error.get("log", ""))
    compare(reference, joined(lives), files=files)
    assert lives[-1].left == {}
