"""A job under the supervisor, in this process, while a thread does something to it: resizes it, kills its processes.

The supervisor needs the main thread for its signals, so what disturbs it runs beside it and ends with the job.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_easyscale.elastic.control import JobError, JobFolder
from lightning_easyscale.elastic.group import Devices
from lightning_easyscale.elastic.supervisor import Supervisor

from ._runs import RunFailedError, _tail
from ._stage import RunSpec


class JobEndedError(Exception):
    """The job has ended, and with it whatever was to be done to it."""


class ElasticRun:
    """One EasyScale job that may be disturbed.

    Args:
        spec: the job; where it runs is the supervisor's affair.
        directory: its folder.
        devices: what it starts on, as for ``--devices``.
        tell: takes lines for people.
        max_restarts: restarts in a row without progress before the job fails.
        in_place: whether executors whose devices stay keep their processes.
        timeout_s: seconds after which the job is ended and has failed; its processes then say in the log where they
            were.
    """

    def __init__(
        self,
        spec: RunSpec,
        directory: Path,
        devices: str,
        *,
        tell: Callable[[str], None],
        max_restarts: int = 3,
        in_place: bool = False,
        timeout_s: float = float("inf"),
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.spec = spec
        self.folder = JobFolder(directory)
        self.log = directory / "executors.log"
        file = directory / "spec.json"
        file.write_text(spec.dumps())
        command = [sys.executable, "-m", f"{__package__}._stage", str(file)]
        self._ended = threading.Event()
        self._timed_out = False
        self._errors: list[BaseException] = []
        self._deadline = time.monotonic() + timeout_s
        self._supervisor = Supervisor(
            self.folder,
            command,
            Devices.parse(devices),
            tell=tell,
            output=self.log,
            max_restarts=max_restarts,
            in_place=in_place,
        )

    def run(self, disturb: Callable[[ElasticRun], None]) -> dict[str, Any]:
        """Run the job to its end while `disturb` goes on in a thread.

        Returns:
            The supervisor's last state.

        Raises:
            RunFailedError: if the job fails.
            SystemExit: if a signal has ended it.
        """
        thread = threading.Thread(target=self._play, args=[disturb])
        thread.start()
        try:
            code = self._supervisor.run()
        finally:
            self._ended.set()
            thread.join()
        if self._errors:
            raise self._errors[0]
        if code != 0 and self._supervisor.told_to_stop and not self._timed_out:
            raise SystemExit(code)  # somebody has ended this recipe
        if code != 0:
            raise RunFailedError(f"the job ended with status {code}; its log is {self.log}:\n{_tail(self.log)}")
        return self.folder.read_state()

    @property
    def has_trained(self) -> bool:
        """Whether training has ended by itself, whatever became of the processes then."""
        return '"event": "trained"' in self.folder.events.read_text()

    def _play(self, disturb: Callable[[ElasticRun], None]) -> None:
        try:
            disturb(self)
        except JobEndedError:
            pass
        except TimeoutError:
            self._timed_out = True
            for pid in self.status()["executors"]:
                os.kill(pid, signal.SIGUSR2)
            time.sleep(1.0)
            for _ in range(2):  # the second one ends the job at once
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(2.0)
        except BaseException as error:
            self._errors.append(error)

    def status(self) -> dict[str, Any]:
        """The job's state.

        Raises:
            JobEndedError: if it has ended.
        """
        while True:
            try:
                return self.folder.request("status")
            except JobError:
                self.pause(0.05)

    def pause(self, seconds: float) -> None:
        """Wait.

        Raises:
            JobEndedError: if the job ends meanwhile.
            TimeoutError: if its time is up.
        """
        if time.monotonic() > self._deadline:
            raise TimeoutError
        if self._ended.wait(seconds):
            raise JobEndedError

    def resize(self, devices: str) -> bool:
        """Ask for other devices; whether the supervisor has agreed."""
        try:
            self.folder.request("resize", devices=devices)
        except JobError:
            return False
        return True

    def trained_to(self, step: int) -> dict[str, Any]:
        """Wait until the job trains and has done `step` steps; returns its status."""
        return self._wait_until(lambda status: status["step"] >= step)

    def trained(self, steps: int) -> dict[str, Any]:
        """Wait until the job has done some more steps on one set of devices; returns its status."""
        seen: tuple[int, int] | None = None

        def enough(status: dict[str, Any]) -> bool:
            nonlocal seen
            if seen is None or seen[0] != status["stages"]:
                seen = status["stages"], status["step"]
            return status["step"] >= seen[1] + steps

        return self._wait_until(enough)

    def _wait_until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until the job trains and `condition` holds for its status, which is returned."""
        while True:
            status = self.status()
            if status["state"] == "training" and condition(status):
                return status
            self.pause(0.05)
