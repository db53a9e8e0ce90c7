"""Processes that an agent has started beyond the number of ESTs: they wait until the job ends or needs them.

Under torchrun every agent starts its processes, however many ESTs there are. When an agent leaves, torchrun ends all
processes and starts them again with other ranks, and a former spare may then host ESTs. When training has finished,
executor 0 marks it in the job's folder, which all hosts share, and the spares end as well.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NoReturn

_MARK = "finished"


def mark_finished(folder: Path) -> None:
    """Let the spares of a job go."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).write_text(f"{time.time()}\n")


def wait_as_spare(folder: Path, *, interval: float = 1.0) -> NoReturn:
    """Wait until the job has finished after this call, then end this process well.

    Args:
        folder: the job's folder.
        interval: seconds between looks.

    Raises:
        SystemExit: with 0, when the job has finished.
    """
    before = _mark(folder)
    while _mark(folder) == before:
        time.sleep(interval)
    raise SystemExit(0)


def _mark(folder: Path) -> str | None:
    try:
        return (folder / _MARK).read_text()
    except OSError:
        return None
