"""What happens in an elastic job, told by its executors to whoever supervises them.

The supervisor names a file in `EVENTS_VARIABLE`. Executors append lines of JSON to it, one per event, and executor 0
keeps the number of optimizer steps done in a few bytes beside it, through a memory map: that costs less than a
microsecond per step and survives SIGKILL. Without the variable nothing is written.

Invariant: a line is complete or it is the last one; a reader takes complete lines only.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

EVENTS_VARIABLE = "EASYSCALE_EVENTS"
"""Names the file of events; set by the supervisor."""

_STEP = struct.Struct("<q")


def report(event: str, **data: Any) -> None:
    """Append an event, if anybody wants to know.

    Args:
        event: ``formed``, ``first_step``, ``notice``, ``agreed``, ``saved``, ``exception``, ...
        data: plain values.
    """
    path = os.environ.get(EVENTS_VARIABLE)
    if path:
        report_to(Path(path), event, **data)


def report_to(path: Path, event: str, **data: Any) -> None:
    """Append an event to the file `path`; see `report`."""
    line = json.dumps({"event": event, "time": time.time(), "pid": os.getpid(), **data}) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def report_step(step: int) -> None:
    """Note that `step` optimizer steps are done; called by the lead EST of executor 0."""
    path = os.environ.get(EVENTS_VARIABLE)
    if path:
        _STEP.pack_into(_step_map(path), 0, step)


def step_file(events: Path) -> Path:
    """Where the number of steps done is kept."""
    return events.with_suffix(".step")


def read_step(events: Path) -> int:
    """The number of optimizer steps that were done when it was last noted; 0 before the first."""
    try:
        raw = step_file(events).read_bytes()
    except FileNotFoundError:
        return 0
    return int(_STEP.unpack(raw)[0]) if len(raw) == _STEP.size else 0


class EventReader:
    """Reads a file of events while it grows.

    Args:
        path: the file; it need not exist yet. What it holds already is skipped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def new(self) -> list[dict[str, Any]]:
        """The events since the last call."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                raw = file.read()
        except FileNotFoundError:
            return []
        whole = raw[: raw.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


@lru_cache(maxsize=1)
def _step_map(path: str) -> mmap.mmap:
    with step_file(Path(path)).open("a+b") as file:
        file.truncate(_STEP.size)
        return mmap.mmap(file.fileno(), _STEP.size)
