"""A change of devices in place: newcomers start and warm up while training goes on, then all executors change worlds.

Whatever goes wrong, nothing is lost: before the next world is announced the newcomers are ended and training goes on
where it is; afterwards everybody is ended and the job starts again from the checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .group import ExecutorGroup


class Move:
    """One change of devices that is under way.

    Args:
        after: the executors to be: survivors, and newcomers that were started just now.
        file: where worlds are announced.

    Attributes:
        announced: whether the executors were told of the next world.
    """

    def __init__(self, after: ExecutorGroup, file: Path) -> None:
        self.after = after
        self.announced = False
        self._file = file
        self._expected = {process.pid for process in after.newcomers}

    @property
    def warm(self) -> bool:
        """Whether every newcomer waits for the others."""
        return not self._expected

    def note(self, event: dict[str, Any]) -> None:
        """An executor has reported something."""
        if event["event"] == "ready":
            self._expected.discard(event["pid"])

    def announce(self) -> None:
        """Name the next world; the executors are told to stop next."""
        self.after.world.announce(self._file)
        self.announced = True

    def lost(self) -> int | None:
        """The exit code of a newcomer that has ended, if any."""
        return next((code for p in self.after.newcomers if (code := p.poll()) is not None), None)

    def deserted(self) -> bool:
        """Whether an executor has ended that was to enter the next world."""
        return self.announced and any(p.poll() is not None for p in self.after.survivors.values())

    def formed(self, event: dict[str, Any]) -> bool:
        """Whether `event` says that the next world has formed."""
        return event["event"] == "formed" and event.get("generation") == self.after.world.generation

    def cancel(self) -> None:
        """End the newcomers."""
        self.after.end_newcomers()
