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
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from lightning_easyscale.devices import apply_environment, environment_of, parse_devices

DEVICES_VARIABLE = "EASYSCALE_DEVICES"
"""The device type of every executor of a host, in order, where the supervisor decides about types."""

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
        run_id: tells the stages of all jobs apart.
        keep: descriptor that the executors inherit.
        output: file that takes what they print; None: they share this process's.
    """

    def __init__(
        self,
        command: list[str],
        devices: Devices,
        *,
        variables: Mapping[str, str],
        run_id: str,
        keep: int,
        output: Path | None = None,
    ) -> None:
        self.devices = devices
        self.processes: list[subprocess.Popen[bytes]] = []
        base = {k: v for k, v in os.environ.items() if k not in _AGENT_VARIABLES}
        common = {
            **variables,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(devices.count),
            "LOCAL_WORLD_SIZE": str(devices.count),
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "TORCHELASTIC_RUN_ID": run_id,
        }
        if devices.types:
            common[DEVICES_VARIABLE] = ",".join(devices.types)
        with output.open("ab") if output is not None else nullcontext() as log:
            for index in range(devices.count):
                own = {**base, **common, "RANK": str(index), "LOCAL_RANK": str(index)}
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
    def codes(self) -> list[int | None]:
        """Each executor's exit code, None while it runs."""
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

    def kill(self) -> None:
        """End every executor and whatever it has started, and wait for the executors."""
        for process in self.processes:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()


_libc = ctypes.CDLL(None)  # found before any fork


def _die_with_supervisor() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
