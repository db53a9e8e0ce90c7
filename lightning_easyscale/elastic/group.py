"""The executors of one stage: processes that run the user's script, one per device.

Each is started as torchrun would start it (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ...), so the script stays as it
is, with the instruction-set variables of its device type. Each leads a session of its own: what it starts can be ended
with it, and a Ctrl-C in the terminal reaches the supervisor alone. When the supervisor dies, the kernel sends SIGTERM
to every executor, which then saves and ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from lightning_easyscale.devices import apply_environment, environment_of, parse_devices

from .membership import DEVICES_VARIABLE, World

_PR_SET_PDEATHSIG = 1
_AGENT_VARIABLES = ("NODE_RANK", "EASYSCALE_EXECUTOR", DEVICES_VARIABLE)


@dataclass(frozen=True)
class Devices:
    """What a stage runs on.

    Args:
        count: number of devices, one executor each.
        types: their types, in executor order; empty where the script's accelerator decides.
    """

    count: int
    types: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Devices:
        """Read ``"4"`` or ``"v100:1,p100:2"``.

        Raises:
            ValueError: if it makes no sense, or names a type that is not there.
        """
        if text.strip().isdigit():
            if int(text) < 1:
                raise ValueError(f"`--devices {text}` names no device. HINT: ask for at least one, or use `stop`.")
            return cls(int(text))
        types = parse_devices(text)
        return cls(len(types), types)

    def shared_with(self, other: Devices) -> list[int]:
        """Executors that have the same place and device type in both."""
        both = range(min(self.count, other.count))
        return [i for i in both if self.types[i : i + 1] == other.types[i : i + 1]]

    def without(self, executor: int) -> Devices:
        """All but one."""
        return Devices(self.count - 1, self.types[:executor] + self.types[executor + 1 :])

    def __str__(self) -> str:
        if not self.types:
            return f"{self.count} device" + "s" * (self.count > 1)
        return " + ".join(f"{len(list(same))} {name}" for name, same in groupby(self.types))


class ExecutorGroup:
    """Running executors.

    Args:
        command: the user's command, without the variables.
        devices: one executor each.
        variables: more variables for all of them.
        run_id: tells the jobs apart.
        generation: the number of their world.
        keep: descriptor that the executors inherit.
        output: file that takes what they print; None: they share this process's.
        before: executors that run; those that have the device of one of these stay, the others are to leave.
        grace: seconds that those who leave have for it.
    """

    def __init__(
        self,
        command: list[str],
        devices: Devices,
        *,
        variables: Mapping[str, str],
        run_id: str,
        generation: int,
        keep: int,
        output: Path | None = None,
        before: ExecutorGroup | None = None,
        grace: float = 0.0,
    ) -> None:
        self.devices = devices
        staying = devices.shared_with(before.devices) if before is not None else range(0)
        self.survivors = {i: before.processes[i] for i in staying} if before is not None else {}
        self.leavers = [] if before is None else [p for i, p in enumerate(before.processes) if i not in staying]
        names = [
            before.world.members[i] if before and i in staying else f"{generation}-{i}" for i in range(devices.count)
        ]
        run_id = f"{run_id}-{generation}"
        self.world: World = World(generation, tuple(names), devices.types, _free_port())
        self._deadline = time.monotonic() + grace
        base = {k: v for k, v in os.environ.items() if k not in _AGENT_VARIABLES}
        self.processes: list[subprocess.Popen[bytes]] = []
        with output.open("ab") if output is not None else nullcontext() as log:
            for index in range(devices.count):
                if index in self.survivors:
                    self.processes.append(self.survivors[index])
                    continue
                own = {**base, **variables, **self.world.variables(index), "TORCHELASTIC_RUN_ID": run_id}
                if devices.types:
                    own = apply_environment(environment_of(devices.types[index]), own)
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env=own,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                        pass_fds=(keep,),
                        preexec_fn=_die_with_supervisor,
                    )
                )

    @property
    def newcomers(self) -> list[subprocess.Popen[bytes]]:
        """Executors that this group has started."""
        return [p for i, p in enumerate(self.processes) if i not in self.survivors]

    @property
    def codes(self) -> list[int | None]:
        """Each executor's exit code, None while it runs."""
        for process in self.leavers:
            if process.poll() is None and time.monotonic() > self._deadline:
                _kill(process)
        return [process.poll() for process in self.processes]

    @property
    def pids(self) -> list[int]:
        """Process ids of the executors that run."""
        return [process.pid for process in self.processes if process.poll() is None]

    def terminate(self) -> None:
        """Ask every executor to save and to end."""
        for process in self.processes:
            if process.poll() is None:
                process.terminate()

    def end_newcomers(self) -> None:
        """End what this group has started, and nothing else."""
        _kill(*self.newcomers)

    def kill(self) -> None:
        """End every executor and whatever it has started, and wait for the executors."""
        _kill(*self.processes, *self.leavers)


def _kill(*processes: subprocess.Popen[bytes]) -> None:
    for process in processes:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


_libc = ctypes.CDLL(None)  # found before any fork


def _die_with_supervisor() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
