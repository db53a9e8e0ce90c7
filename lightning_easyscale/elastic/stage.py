"""The executors between two changes of devices, as their supervisor sees them: who has ended, how, and why."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

from .group import ExecutorGroup
from .notice import STOPPED
from .restarts import Failure

_SETTLE = 5.0  # seconds in which the other executors may end after one has failed, and say why
_SECONDARY = ("RemoteESTError", "ESTHang", "ESTAborted", "TrainingStopped")  # ends that are not the cause


class Stage:
    """One group of executors.

    Args:
        group: the executors.
        grace: seconds they have to save before they are killed.
        tell: takes lines for people.

    Attributes:
        asked: whether the supervisor has told them to end.
        started_well: whether they have taken a step.
    """

    def __init__(self, group: ExecutorGroup, *, grace: float, tell: Callable[[str], None]) -> None:
        self.group = group
        self.asked = False
        self.started_well = False
        self._grace = grace
        self._tell = tell
        self._deadline: float | None = None  # when those that have not ended are killed
        self._first_to_fail: int | None = None
        self._errors: list[dict[str, Any]] = []

    def note_error(self, event: dict[str, Any]) -> None:
        """An executor has reported an exception."""
        self._errors.append(event)

    def terminate(self) -> None:
        """Tell them to save and to end."""
        self.asked, self._deadline = True, time.monotonic() + self._grace
        self.group.terminate()

    def settle(self) -> None:
        """One is lost to the others: they end by themselves soon, or are killed."""
        self._end_within(_SETTLE)

    def ended(self) -> dict[int, int] | None:
        """The exit codes of the executors that have ended by themselves, once it is over with all; else None."""
        codes = self.group.codes
        ended = {index: code for index, code in enumerate(codes) if code is not None}
        if len(ended) < len(codes):
            bad = [index for index, code in ended.items() if code != 0]
            if bad and self._first_to_fail is None:
                self._first_to_fail = bad[0]
                self._end_within(self._grace if codes[bad[0]] == STOPPED else _SETTLE)
            if self._deadline is None or time.monotonic() < self._deadline:
                return None
            left = [index for index, code in enumerate(codes) if code is None]
            self._tell(f"executors {left} have not ended in time and are killed")
        if any(ended.get(index) != 0 for index in range(len(codes))):
            self.group.kill()
        return ended

    def failure(self, codes: dict[int, int], step: int) -> Failure:
        """The failure that ended the others, as well as it can be told.

        Args:
            codes: exit codes, from `ended`.
            step: optimizer steps done.
        """
        for error in self._errors:
            code = codes.get(error["executor"], 0)
            if error["type"] not in _SECONDARY and code not in (0, STOPPED):
                text = f"{error['type']}: {error['message']}"
                return Failure(error["executor"], code, error["step"], text, error["rank"])
        bad = {index: code for index, code in codes.items() if code not in (0, STOPPED)}
        killed = [index for index, code in bad.items() if code < 0]
        first = killed[0] if killed else self._first_to_fail if self._first_to_fail in bad else next(iter(bad), None)
        if first is None:  # some have saved and others hang
            first = next(index for index in range(len(self.group.processes)) if index not in codes)
            return Failure(first, -signal.SIGKILL, step)
        return Failure(first, bad[first], step)

    def _end_within(self, seconds: float) -> None:
        self._deadline = min(self._deadline or float("inf"), time.monotonic() + seconds)
