"""Runs an elastic job on one host: starts its executors, changes their devices, restarts them after crashes.

To change devices, every executor gets SIGTERM, the ESTs agree on a step and save. By relaunch, all processes then end
and new ones continue from the checkpoint; in place (`move.py`), those whose devices stay go on. The supervisor itself
knows nothing of training. It sees processes, exit codes, events that executors report (`events.py`) and requests
(`control.py`), all in one thread.

Exit codes of `Supervisor.run`: 0 finished; `STOPPED` (75, ``EX_TEMPFAIL``) stopped, the same command continues; 130 or
143 ended at once by a second Ctrl-C or SIGTERM; else the job failed, with the failed executor's code (128 + n where
signal n killed it).
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .console import say
from .control import FOLDER_VARIABLE, JobFolder, answer, receive
from .events import EVENTS_VARIABLE, EventReader, read_step, report_to, step_file
from .group import Devices, ExecutorGroup
from .membership import WORLD_VARIABLE
from .move import Move
from .notice import STOPPED
from .resizing import why_no_resize
from .restarts import RestartPolicy
from .signals import SignalQueue
from .stage import Stage

_TICK = 0.1  # seconds between looks at executors, when nothing wakes the supervisor


class Supervisor:
    """Runs one job.

    Args:
        folder: the job's folder.
        command: the user's command.
        devices: what to start on.
        num_ests: N, where the script leaves it open.
        max_restarts: restarts in a row without progress before the job fails.
        grace: seconds an executor has to save after SIGTERM before it is killed.
        in_place: whether executors whose devices stay go on in their processes when devices change.
        tell: takes lines for people.
        output: file that takes what the executors print; None: they share this process's.
    """

    def __init__(
        self,
        folder: JobFolder,
        command: list[str],
        devices: Devices,
        *,
        num_ests: int | None = None,
        max_restarts: int = 3,
        grace: float = 120.0,
        in_place: bool = False,
        tell: Callable[[str], None] = say,
        output: Path | None = None,
    ) -> None:
        self.folder = folder
        self.command = command
        self.devices = devices
        self.num_ests = num_ests
        self._given_num_ests = num_ests
        self._tell = tell
        self._output = output
        self._grace = grace
        self._in_place = in_place
        self._moving: Move | None = None
        self._worlds = folder.path / "world.json"
        self._policy = RestartPolicy(max_restarts)
        self._stage: Stage | None = None
        self._run_id = uuid.uuid4().hex[:12]
        self._phase = "starting"  # then "training", then "stopping"
        self._next: Devices | None = None  # what to start on once the executors have ended
        self._stop = False
        self._signals = SignalQueue((signal.SIGINT, signal.SIGTERM))
        self._since: float | None = None  # when the pause began that now lasts
        self._good_devices: Devices | None = None  # the newest that a step was taken on
        self._trained = False  # whether training has ended by itself
        self._restarts = 0
        self._reached = 0  # the step at which the executors before these ended
        self._steps_redone = 0
        self._stages = 0
        self._generation = 0

    @property
    def told_to_stop(self) -> bool:
        """Whether a signal or a request has told it to end, whatever the exit code."""
        return self._stop

    # -- the loop --------------------------------------------------------------------------------------------------
    def run(self) -> int:
        """Run the job to its end; returns the exit code.

        Raises:
            JobError: if the folder is in use.
        """
        with self.folder.locked() as lock, self.folder.listening() as server, self._signals as wake:
            self._lock = lock
            self._events = EventReader(self.folder.events)
            step_file(self.folder.events).unlink(missing_ok=True)
            self._worlds.unlink(missing_ok=True)
            code = None
            try:
                self._launch()
                while code is None:
                    select.select([server, wake], [], [], _TICK)
                    self._take_signals()
                    while request := receive(server):
                        self._answer(*request)
                    self._follow_events()
                    self._follow_move()
                    code = self._look()
            except _AtOnce as end:
                code = 128 + end.number
                self._tell(f"ended at once by a second {signal.Signals(end.number).name}")
            finally:
                self._end_move()
                if self._stage is not None and code != 0:
                    self._stage.group.kill()
                self._write_state({0: "finished", STOPPED: "stopped"}.get(code, "failed"), code)  # type: ignore[arg-type]
            return code

    def _launch(self) -> None:
        if self._since is None:
            self._since = time.monotonic()
        self._end_move()
        self._report_devices("starting", self.devices)
        self._begin_stage(self._start(self.devices))
        checkpoint = self.folder.newest_checkpoint()
        self._tell(f"starting on {self.devices}, {f'from {checkpoint}' if checkpoint else 'from the beginning'}")
        self._write_state("running", None)

    def _start(self, devices: Devices, **options: Any) -> ExecutorGroup:
        variables = {
            FOLDER_VARIABLE: str(self.folder.path),
            EVENTS_VARIABLE: str(self.folder.events),
            WORLD_VARIABLE: str(self._worlds),
        }
        if self._given_num_ests is not None:
            variables["EASYSCALE_NUM_ESTS"] = str(self._given_num_ests)
        self._generation += 1
        return ExecutorGroup(
            self.command,
            devices,
            variables=variables,
            run_id=self._run_id,
            generation=self._generation,
            keep=self._lock,
            output=self._output,
            **options,
        )

    def _begin_stage(self, group: ExecutorGroup) -> None:
        self._stage, self._phase = Stage(group, grace=self._grace, tell=self._tell), "starting"
        self._stages += 1

    def _report_devices(self, event: str, devices: Devices) -> None:
        types = list(devices.types) or ["device"] * devices.count
        report_to(self.folder.events, event, devices=str(devices), types=types)

    def _look(self) -> int | None:
        """What the executors' exit codes mean; an exit code of our own when all is over."""
        stage = self._stage
        assert stage is not None
        ended = stage.ended()
        if ended is None:
            return None
        self._follow_events()
        return self._conclude(stage, ended)

    def _conclude(self, stage: Stage, codes: dict[int, int]) -> int | None:
        """Act on the exit codes of the executors that ended by themselves."""
        all_ended = len(codes) == len(stage.group.processes)
        self._reached = read_step(self.folder.events)
        if all_ended and not any(codes.values()):
            self._tell("finished")
            return 0
        if self._trained:
            return self._after_failure(stage, codes)
        saved = all_ended and all(code in (0, STOPPED) for code in codes.values())
        if saved or (stage.asked and all(code in (0, STOPPED) or code < 0 for code in codes.values())):
            if not saved:
                self._tell("the executors ended without a new checkpoint")
            if self._stop:
                self._tell("stopped; the same command continues the job")
                return STOPPED
            if self._next is None:
                self._tell("an executor was told to end; starting again")
                self._restarts += 1
            self._move()
            return None
        return self._after_failure(stage, codes)

    def _move(self) -> None:
        self.devices, self._next = self._next or self.devices, None
        self._launch()

    # -- changes in place ------------------------------------------------------------------------------------------
    def _begin_move(self, devices: Devices) -> None:
        assert self._stage is not None
        self._moving = Move(self._start(devices, before=self._stage.group, grace=self._grace), self._worlds)
        newcomers = len(self._moving.after.newcomers)
        if newcomers:
            self._tell(f"{newcomers} newcomers start; training goes on until they are ready")

    def _follow_move(self) -> None:
        """Look after the newcomers, and let all executors change worlds once they are ready."""
        move = self._moving
        if move is None:
            return
        code = move.lost()
        if code is not None and not move.announced:
            self._tell(f"a newcomer has failed with exit code {code}; training goes on on {self.devices}")
            self._end_move()
            self._next = None
        elif code is not None or move.deserted():
            assert self._stage is not None
            self._stage.settle()
        elif move.warm and not move.announced:
            move.announce()
            self._report_devices("moving", self._next or self.devices)
            self._terminate()

    def _end_move(self) -> None:
        if self._moving is not None:
            self._moving.cancel()
            self._moving = None

    def _arrive(self) -> None:
        """The next world has formed."""
        assert self._moving is not None
        assert self._next is not None
        self.devices, self._next = self._next, None
        after, self._moving = self._moving.after, None
        self._begin_stage(after)
        self._write_state("running", None)

    # -- failures --------------------------------------------------------------------------------------------------
    def _after_failure(self, stage: Stage, codes: dict[int, int]) -> int | None:
        failure = stage.failure(codes, read_step(self.folder.events))
        self._tell(str(failure))
        code = 128 - failure.code if failure.killed else failure.code
        if self._stop:
            self._tell("the executors failed while they were stopping; the newest good checkpoint is an older one")
            return code
        if self._trained:
            self._tell("giving up: training had ended, and starting again would repeat it")
            return code
        if self._next is None and not stage.started_well and self._good_devices not in (None, self.devices):
            self._tell(f"nothing has run on {self.devices}; going back to {self._good_devices}")
            self._next = self._good_devices
        verdict = self._policy.decide(
            failure, checkpoint=self.folder.newest_checkpoint(), started_well=self._good_devices is not None
        )
        if not verdict.restart:
            self._tell(f"giving up, because {verdict.why}. {failure}")
            return code
        self._restarts += 1
        if verdict.drop and self._next is None and self.devices.count > 1:
            self._next = self.devices.without(failure.executor)
            self._tell(f"leaving out the device of executor {failure.executor}")
        self._since = self._since or time.monotonic()
        self._move()
        return None

    # -- what executors report --------------------------------------------------------------------------------------
    def _follow_events(self) -> None:
        for event in self._events.new():
            kind = event["event"]
            if self._moving is not None:
                self._moving.note(event)
                if self._moving.formed(event):
                    self._arrive()
            paused = f"{time.monotonic() - self._since:.2f} s" if self._since is not None else ""
            if kind == "formed":
                self.num_ests = event["num_ests"]
                split = " + ".join(map(str, event["placement"]))
                self._tell(f"formed after {paused}: {self.num_ests} ESTs as {split}")
            elif kind == "first_step":
                self._tell(f"first step done after {paused}: step {event['step']}")
                self._steps_redone += max(0, self._reached - event["step"] + 1)
                assert self._stage is not None
                self._stage.started_well = True
                self._good_devices, self._since = self.devices, None
                if self._phase == "starting":
                    self._phase = "training"
            elif kind == "trained":
                self._trained, self._phase = True, "ending"
                self._tell(f"training has ended: step {read_step(self.folder.events)}")
            elif kind == "exception":
                assert self._stage is not None
                self._stage.note_error(event)
            elif kind in ("notice", "agreed", "saved"):
                self._since = self._since or time.monotonic()
                self._phase = "stopping"
                details = ", ".join(f"{k} {v}" for k, v in event.items() if k not in ("event", "time", "pid"))
                self._tell(f"{kind}: {details}")

    # -- requests --------------------------------------------------------------------------------------------------
    def _answer(self, connection: socket.socket, request: dict[str, Any]) -> None:
        do = {"status": self._on_status, "resize": self._on_resize, "stop": self._on_stop}.get(request.get("do", ""))
        if do is None:
            answer(connection, error=f"unknown request {request.get('do')!r}.")
            return
        answer(connection, **do(request))

    def _on_status(self, _: dict[str, Any]) -> dict[str, Any]:
        assert self._stage is not None
        return {
            **self._facts(),
            "state": self._phase,
            "count": self.devices.count,
            "executors": self._stage.group.pids,
            "checkpoint": self.folder.newest_checkpoint(),
        }

    def _on_resize(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            devices = Devices.parse(str(request.get("devices")))
        except (ValueError, RuntimeError) as error:
            return {"error": str(error)}
        why = why_no_resize(
            devices,
            running=self.devices,
            target=self._next,
            phase="ending" if self._trained else "stopping for good" if self._stop else self._phase,
            num_ests=self.num_ests,
        )
        if why is not None:
            return {"error": why}
        self._tell(f"resize: {self.devices} -> {devices}")
        self._next = devices
        if self._in_place and devices.shared_with(self.devices):
            self._begin_move(devices)
        else:
            self._terminate()
        return {"from": str(self.devices), "to": str(devices)}

    def _on_stop(self, _: dict[str, Any]) -> dict[str, Any]:
        if not self._stop:
            self._begin_stop("stop")
        return {"from": str(self.devices)}

    def _begin_stop(self, why: str) -> None:
        self._end_move()
        self._stop, self._next = True, None
        if self._trained:
            self._tell(f"{why}: training has ended, so the script is left to end by itself")
            return
        self._tell(f"{why}: saving and ending")
        self._terminate()

    def _terminate(self) -> None:
        assert self._stage is not None
        self._since = time.monotonic()
        report_to(self.folder.events, "stopping")
        self._phase = "stopping"
        self._stage.terminate()

    # -- signals ---------------------------------------------------------------------------------------------------
    def _take_signals(self) -> None:
        for number in self._signals.take():
            if self._stop:
                raise _AtOnce(number)
            self._begin_stop(signal.Signals(number).name)

    def _write_state(self, state: str, code: int | None) -> None:
        try:
            self.folder.write_state(state=state, code=code, command=self.command, **self._facts())
        except OSError as error:  # a full disk; the job needs the state only once this process is gone
            self._tell(f"the job's state cannot be written: {error}")

    def _facts(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "devices": str(self.devices),
            "num_ests": self.num_ests,
            "step": read_step(self.folder.events),
            "restarts": self._restarts,
            "steps_redone": self._steps_redone,
            "stages": self._stages,
        }


class _AtOnce(Exception):
    """A second signal."""

    def __init__(self, number: int) -> None:
        self.number = number
