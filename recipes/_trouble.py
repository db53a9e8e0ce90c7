"""What may happen to a live job: something is done, at a moment, to a random executor.

Actions: ``resize``; ``sigterm`` and ``sigkill`` to an executor; ``worker_kill``, SIGKILL to one of its loader workers.
Moments: ``any``; ``accumulation``, while gradients of an unfinished window wait; ``validation``; ``save``, while a
checkpoint's temporary file is being written, by a snapshot or by a stop; ``start``, while executors start. An event is
counted under its moment only if the moment still lasted when it had happened: ``sigkill_in_save``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_easyscale.elastic import snapshot_process

from ._elastic_run import ElasticRun
from ._phases import read_phases

ACTIONS = ("resize", "sigterm", "sigkill", "worker_kill")
MOMENTS = ("any", "accumulation", "validation", "save", "start")

_PATIENCE = 20.0  # seconds to wait for a moment before another event is drawn
_IMPOSSIBLE = {("resize", "start"), ("worker_kill", "start")}  # refused; there are none yet


class Trouble:
    """Random events for one job.

    Args:
        num_ests: N.
        quiet_steps: most steps between two events.
        burst: how often an event follows another within a second.
        weights: how often each action and each moment is drawn, relatively.
        choose: draws everything that is random.
        events: counts the events by kind.
        timeline: file that gets a line for each event.
        tell: takes lines for people.
    """

    def __init__(
        self,
        *,
        num_ests: int,
        quiet_steps: int,
        burst: float,
        weights: dict[str, dict[str, float]],
        choose: random.Random,
        events: Counter[str],
        timeline: Path,
        tell: Callable[[str], None],
    ) -> None:
        self._num_ests, self._quiet_steps, self._burst, self._weights = num_ests, quiet_steps, burst, weights
        self._choose, self._events, self._timeline, self._tell = choose, events, timeline, tell

    def __call__(self, run: ElasticRun) -> None:
        """Disturb the job until it ends."""
        while True:
            action, moment = (
                self._choose.choices(list(drawn), list(drawn.values()))[0]
                for drawn in (self._weights["actions"], self._weights["moments"])
            )
            if (action, moment) in _IMPOSSIBLE:
                continue
            quiet, delay, target = (
                self._choose.randint(1, self._quiet_steps),
                self._choose.random(),
                self._choose.random(),
            )
            if self._choose.random() < self._burst:  # close behind the event before, whatever the job does then
                run.pause(delay)
                self._do(run, action, "any", target, lasts=lambda _: True)
            elif moment == "start":
                self._disturb_start(run, action, delay, target)
            else:
                run.trained(quiet)
                run.pause(0.2 * delay)  # anywhere inside a step, or in what follows it
                self._disturb_training(run, action, moment, target)

    def _disturb_start(self, run: ElasticRun, action: str, delay: float, target: float) -> None:
        """Right after another event: the executors that it has made start are not training yet."""
        until = time.monotonic() + 3.0
        while run.status()["state"] != "starting":
            if time.monotonic() > until:
                return
            run.pause(0.05)
        run.pause(4.0 * delay)
        if run.status()["state"] == "starting":
            self._do(run, action, "start", target, lasts=lambda _: True)

    def _disturb_training(self, run: ElasticRun, action: str, moment: str, target: float) -> None:
        saves = _writing(run) if moment == "save" else []
        if moment == "save":
            if target < 0.5:
                self._do(run, "sigterm", "any", self._choose.random(), lasts=lambda _: True)
            if not (saves := self._await(run, lambda: _writing(run), 0.0005)):
                return
            self._do(run, action, moment, target, lasts=lambda _: any(file.exists() for file in saves))
        elif moment in ("accumulation", "validation"):
            phases = Path(run.spec.phases or "")

            def found() -> list[int]:
                now = read_phases(phases)
                return [pid for pid in _children(os.getpid()) if now.get(pid) == moment]

            if self._await(run, found, 0.002):
                self._do(run, action, moment, target, lasts=lambda pid: read_phases(phases).get(pid) == moment)
        else:
            self._do(run, action, moment, target, lasts=lambda _: True)

    def _await(self, run: ElasticRun, found: Callable[[], list[Any]], interval: float) -> list[Any]:
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            if seen := found():
                return seen
            run.pause(interval)
        return []

    def _do(self, run: ElasticRun, action: str, moment: str, target: float, *, lasts: Callable[[int], bool]) -> None:
        """Act, and count it."""
        executors = _children(os.getpid())
        if not executors:
            return
        # A save is the first executor's work; whoever else dies in it is another case.
        pid = executors[0] if moment == "save" and target < 0.7 else executors[int(target * len(executors))]
        status = run.status()
        if action == "resize":
            others = [count for count in range(1, self._num_ests + 1) if count != status["count"]]
            done = bool(others) and run.resize(str(self._choose.choice(others)))
        elif action == "worker_kill":
            workers = [child for child in _children(pid) if not _writes_snapshots(child)]
            done = bool(workers) and _kill(self._choose.choice(workers), signal.SIGKILL)
        else:
            done = _kill(pid, signal.SIGTERM if action == "sigterm" else signal.SIGKILL)
        if not done:
            return
        kind = action if moment == "any" or not lasts(pid) else f"{action}_in_{moment}"
        self._events[kind] += 1
        line = {"time": round(time.time(), 3), "job": run.folder.path.parent.name, "event": kind}
        line.update(step=status["step"], devices=status["devices"], state=status["state"], executors=len(executors))
        with self._timeline.open("a") as file:
            print(json.dumps(line), file=file)
        self._tell(f"event: {kind} at step {status['step']} on {status['devices']}")


def _writing(run: ElasticRun) -> list[Path]:
    """Temporary files of checkpoints."""
    with suppress(FileNotFoundError):
        names = os.listdir(run.folder.path / "checkpoints")
        return [run.folder.path / "checkpoints" / name for name in names if name.endswith(".tmp")]
    return []


def _children(parent: int) -> list[int]:
    """Processes that a process has started and that have not ended, oldest first."""
    found: list[tuple[int, int]] = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(FileNotFoundError, ProcessLookupError):
            state, ppid, *others = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            if int(ppid) == parent and state != "Z":
                found.append((int(others[17]), int(name)))
    return [pid for _, pid in sorted(found)]


def _writes_snapshots(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return snapshot_process.__name__.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _kill(pid: int, number: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False
