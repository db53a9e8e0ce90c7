"""Run the sides of a comparison in turns, A B A B, each in processes that stay between its blocks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_easyscale.determinism import CUBLAS_VARIABLE

from ._bench_worker import Side
from ._runs import RunFailedError, _end_session, child_environment

_POLL_S = 0.002


def interleave(sides: Mapping[str, Side], *, timeout_s: float) -> dict[str, list[dict[str, Any]]]:
    """What every side reported of its blocks, in order.

    All sides warm up at the same time; then only one computes at a time, while the others wait without using a core.

    Args:
        sides: by name, in the order of their turns.
        timeout_s: seconds after which all is given up.

    Raises:
        RunFailedError: if a side fails or takes too long.
    """
    deadline = time.monotonic() + timeout_s
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, side in sides.items():
            file = side.write()
            environment = child_environment(dict(os.environ))
            environment.update(OMP_NUM_THREADS=str(side.threads), **{CUBLAS_VARIABLE: ":4096:8"})
            with (file.parent / "log").open("wb") as log:
                processes[name] = subprocess.Popen(
                    [sys.executable, "-m", f"{__package__}._bench_worker", str(file)],
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        for name, side in sides.items():
            _wait(Path(side.directory) / "ready", 1, name, side, processes[name], deadline)
        for block in range(next(iter(sides.values())).blocks):
            for name, side in sides.items():
                directory = Path(side.directory)
                temporary = directory / "go.tmp"
                temporary.write_text(str(block))
                temporary.replace(directory / "go")
                _wait(directory / "done", block + 1, name, side, processes[name], deadline)
        for side in sides.values():
            # What follows the last block is not measured, so all may end at once.
            (Path(side.directory) / "go").write_text(str(side.blocks))
        for name, process in processes.items():
            if process.wait(max(deadline - time.monotonic(), 1)) != 0:
                raise RunFailedError(f"{name} failed at its end:\n{_log(sides[name])}")
    finally:
        for process in processes.values():
            _end_session(process)
    return {
        name: [json.loads(line) for line in (Path(side.directory) / "done").read_text().splitlines()]
        for name, side in sides.items()
    }


def _wait(file: Path, lines: int, name: str, side: Side, process: subprocess.Popen[bytes], deadline: float) -> None:
    while not file.exists() or file.read_text().count("\n") < lines:
        if process.poll() is not None and not (file.exists() and file.read_text().count("\n") >= lines):
            raise RunFailedError(f"{name} ended with status {process.returncode}:\n{_log(side)}")
        if time.monotonic() > deadline:
            raise RunFailedError(f"{name} took too long:\n{_log(side)}")
        time.sleep(_POLL_S)


def _log(side: Side) -> str:
    return "\n".join((Path(side.directory) / "log").read_text(errors="replace").splitlines()[-25:])
