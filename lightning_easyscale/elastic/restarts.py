"""When a job that has failed starts again, and on how many devices.

Training is deterministic, so an exception of the user's comes back at the same step: it gets one second chance, in
case the machine was the cause. A killed executor says nothing about the job: it starts again as long as there is
progress now and then. Progress is a step that was never reached before, or a new checkpoint.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """How a group of executors failed.

    Args:
        executor: the one that failed first.
        code: its exit code; negative: the signal that killed it.
        step: optimizer steps done.
        error: type and message of its exception, if it could tell.
        rank: the EST that raised it.
    """

    executor: int
    code: int
    step: int
    error: str = ""
    rank: int | None = None

    @property
    def killed(self) -> bool:
        """Whether a signal ended the executor."""
        return self.code < 0

    def __str__(self) -> str:
        who = f"executor {self.executor}" + (f", EST {self.rank}," if self.rank is not None else "")
        if self.killed:
            return f"{who} was killed by {signal.Signals(-self.code).name} after step {self.step}"
        return f"{who} failed after step {self.step}: {self.error or f'exit code {self.code}'}"


@dataclass(frozen=True)
class Verdict:
    """What to do after a failure.

    Args:
        restart: whether to start again.
        drop: whether to leave out the device of the executor that failed.
        why: for people.
    """

    restart: bool
    drop: bool = False
    why: str = ""


class RestartPolicy:
    """Decides after each failure.

    Args:
        max_restarts: restarts in a row without progress.
    """

    def __init__(self, max_restarts: int) -> None:
        self._max = max_restarts
        self._furthest = 0
        self._checkpoint: str | None = None
        self._barren = 0  # restarts since the last progress
        self._last: Failure | None = None

    def decide(self, failure: Failure, *, checkpoint: str | None, started_well: bool) -> Verdict:
        """What to do now.

        Args:
            failure: the failure.
            checkpoint: name of the newest checkpoint.
            started_well: whether the job has taken a step since it was started.
        """
        progress = failure.step > self._furthest or checkpoint != self._checkpoint
        self._furthest, self._checkpoint = max(self._furthest, failure.step), checkpoint
        last, self._last = self._last, failure
        if not failure.killed:
            if not started_well:
                return Verdict(False, why="it failed before its first step")
            if last is not None and (last.step, last.code, last.error) == (failure.step, failure.code, failure.error):
                return Verdict(False, why=f"the same error came again after step {failure.step}")
        self._barren = 0 if progress else self._barren
        if self._barren >= self._max:
            return Verdict(False, why=f"{self._barren} restarts in a row have made no progress")
        self._barren += 1
        return Verdict(True, drop=self._barren > 1)
