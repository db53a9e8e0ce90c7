"""Fault injection: at (rank, step, phase) something happens to the process that hosts the rank."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback

from lightning_easyscale.elastic import snapshot_process
from lightning_easyscale.elastic.notice import SAME_NOTICE_SECONDS, StopNotice


class InjectedError(Exception):
    """An exception of the user's code."""


@dataclass(frozen=True)
class Fault:
    """Something that happens once.

    Args:
        rank: the EST in whose turn it happens.
        step: optimizer steps done then.
        phase: name of the callback hook in which it happens, or a place of the job's that calls `reach`.
        action: name of a signal; ``"SIGTERM twice"``: as two notices; ``"group"``: SIGTERM to the whole process group;
            ``"exception"``; ``"SIGKILL in a save"``: the next time a file is synced, after its content was written,
            or while another process writes a snapshot; ``"SIGKILL to a loader worker"``.
        nth: which of the hook's calls at that step, from 1.
        life: which start of the job, from 0.
    """

    rank: int
    step: int
    phase: str
    action: str = "SIGTERM"
    nth: int = 1
    life: int = 0

    def happen(self) -> None:
        """Do it."""
        if self.action == "exception":
            raise InjectedError(f"injected on rank {self.rank} in {self.phase}")
        if self.action == "SIGKILL in a save":
            os.fsync = _killed  # type: ignore[assignment]
            snapshot_process._receive = _killed  # a snapshot was ordered of another process
        elif self.action == "SIGKILL to a loader worker":
            multiprocessing.active_children()[0].kill()
        elif self.action == "SIGTERM twice":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(SAME_NOTICE_SECONDS + 1)  # a loaded machine may hear the first one late
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)  # unless this ends the process, it goes on too late
        elif self.action == "group":
            # by somebody else: workers obey their own parent
            command = ["kill", "-TERM", "--", f"-{os.getpgid(0)}"]
            subprocess.run(command, start_new_session=True, check=True)
            _wait_until_heard()
        else:
            os.kill(os.getpid(), signal.Signals[self.action])
            _wait_until_heard()

    def __str__(self) -> str:
        where = self.phase + (f" (call {self.nth})" if self.nth > 1 else "")
        return f"{self.action} in EST {self.rank}, step {self.step}, {where}"


def _killed(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _wait_until_heard() -> None:
    """Return when this process has noticed the stop signal that it was sent; handlers run on the main thread."""
    notices = {getattr(signal.getsignal(number), "__self__", None) for number in (signal.SIGTERM, signal.SIGUSR1)}
    listening = [notice for notice in notices if isinstance(notice, StopNotice)]
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(notice.requested is None for notice in listening):
        time.sleep(0.005)


_elsewhere: list[Fault] = []


def reach(place: str) -> None:
    """Called by a job at a place that no callback hook sees; its faults happen once."""
    for fault in list(_elsewhere):
        if fault.phase == place:
            _elsewhere.remove(fault)
            fault.happen()


class _Injector(Callback):
    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.calls = 0

    def hook(self, trainer: Any, *_: Any, **__: Any) -> None:
        if trainer.global_rank == self.fault.rank and trainer.global_step == self.fault.step:
            self.calls += 1
            if self.calls == self.fault.nth:
                self.fault.happen()


def inject(faults: Iterable[Fault]) -> list[Callback]:
    """Callbacks that let the faults happen; each has the one hook that it needs."""
    faults = list(faults)
    _elsewhere[:] = [fault for fault in faults if not hasattr(Callback, fault.phase)]
    faults = [fault for fault in faults if hasattr(Callback, fault.phase)]
    return [type("Injector", (_Injector,), {fault.phase: _Injector.hook})(fault) for fault in faults]
