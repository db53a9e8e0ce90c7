"""Start the runs of a recipe, each in fresh processes, and skip those that are there already.

A run is described by a :class:`RunSpec`. When it has ended well its spec is kept beside its checkpoint as
``*.done.json``; a run whose kept spec reads the same is complete and not run again. The marker is written last and
removed first, so a killed run is never taken for a complete one.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lightning_easyscale.record import Record, RecordError, est_file

from ._stage import RunSpec


class RunFailedError(RuntimeError):
    """A run that ended badly; the message holds the end of its log."""


def marker(spec: RunSpec) -> Path:
    """Where the spec of a complete run is kept."""
    return Path(spec.save).with_suffix(".done.json")


def is_complete(spec: RunSpec) -> bool:
    """Whether exactly this run has ended well and its record and checkpoint are still there."""
    file = marker(spec)
    if not file.exists() or not Path(spec.save).exists() or file.read_text() != spec.dumps():
        return False
    try:
        record = Record.load(spec.record)
    except RecordError:
        return False
    return len(record.ests) == spec.num_ests and all(
        spec.end_step in est.digests and est.steps and max(s.step for s in est.steps.values()) >= spec.end_step - 1
        for est in record.ests.values()
    )


def execute(
    spec: RunSpec,
    *,
    log: Path,
    environments: list[dict[str, str]],
    timeout_s: float,
    progress: Callable[[int], None],
    stop: threading.Event,
) -> float:
    """Run a spec in fresh processes and wait for it.

    Args:
        spec: what to run.
        log: file that takes the output of all its processes.
        environments: for each host, the full environment of its first process; launchers make the others'.
        timeout_s: seconds after which the run is ended.
        progress: told the number of steps done of this run, a few times a second.
        stop: ends the run early when set.

    Returns:
        Seconds it took.

    Raises:
        RunFailedError: if it fails, takes too long, or leaves no checkpoint.
    """
    for directory in (log.parent, Path(spec.save).parent):
        directory.mkdir(parents=True, exist_ok=True)
    marker(spec).unlink(missing_ok=True)
    file = log.with_suffix(".json")
    file.write_text(spec.dumps())
    began = time.monotonic()
    with log.open("wb") as out:
        # sessions of their own, so that all processes of a run can be ended together
        processes = [
            subprocess.Popen(
                command, env={**environment, **place}, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
            for (command, place), environment in zip(_commands(spec, file), environments, strict=True)
        ]
        try:
            steps = _StepCounter(est_file(spec.record, 0))
            while any(process.poll() is None for process in processes):
                if time.monotonic() - began > timeout_s:
                    raise RunFailedError(f"{spec.name} has not ended after {timeout_s:.0f} s.\n{_tail(log)}")
                if stop.is_set():
                    raise RunFailedError(f"{spec.name} was stopped.")
                if any(process.poll() for process in processes):
                    break  # one host has failed: the others would wait for it
                progress(max(min(steps.count(), spec.end_step) - spec.first_step, 0))
                time.sleep(0.25)
        finally:
            for process in processes:
                _end_session(process)
    status = next((process.returncode for process in processes if process.returncode), 0)
    if status != 0:
        raise RunFailedError(f"{spec.name} ended with status {status}; its log is {log}:\n{_tail(log)}")
    if not Path(spec.save).exists():
        raise RunFailedError(f"{spec.name} ended without reaching step {spec.end_step}; its log is {log}.")
    progress(spec.end_step - spec.first_step)
    marker(spec).write_text(spec.dumps())
    return time.monotonic() - began


def _commands(spec: RunSpec, file: Path) -> list[tuple[list[str], dict[str, str]]]:
    """One command per host, and what else its environment has to say.

    On one host the script itself; of several, torchrun agents stand for each, or a worker of a reference does.
    """
    worker = ["-m", f"{__package__}._stage", str(file)]
    if not spec.hosts:
        return [([sys.executable, *worker], {})]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if spec.kind == "reference":
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
        return [([sys.executable, *worker], {**place, "NODE_RANK": str(i)}) for i in range(len(spec.hosts))]
    agent = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(spec.hosts)}", f"--master-port={port}"]
    return [
        ([*agent, f"--node-rank={i}", f"--nproc-per-node={_count(host)}", "--master-addr=127.0.0.1", *worker], {})
        for i, host in enumerate(spec.hosts)
    ]


def _count(devices: str) -> int:
    return sum(int(part.partition(":")[2]) for part in devices.split(","))


def child_environment(environment: dict[str, str]) -> dict[str, str]:
    """``environment`` with the directory on the path from which these modules were imported."""
    root = str(Path(__file__).resolve().parents[__package__.count(".") + 1])
    path = [root, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    return {**environment, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}


class _StepCounter:
    """Counts the steps in a record file while it grows, reading only what is new."""

    def __init__(self, file: Path) -> None:
        self._file, self._offset, self._steps, self._inode = file, 0, 0, -1

    def count(self) -> int:
        """Micro-batches recorded so far."""
        try:
            with self._file.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:  # the run has started its file anew
                    self._inode, self._offset, self._steps = inode, 0, 0
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return 0
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._steps += whole.count(b'{"kind":"step"')
        return self._steps


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a run's processes; nothing is left of one that ended well."""
    if process.poll() == 0:
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # ranks that wait for one that has ended
    process.wait()


def _tail(log: Path, lines: int = 25) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
