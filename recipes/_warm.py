"""Start the processes of many short runs quickly: fork them from one process that has imported everything.

`WarmProcesses` keeps that process. A run is started as a cluster manager would: one process per executor, each told by
the environment which one it is and where to meet. The warm process touches no GPU, so that those forked from it may:
what it imports asks NVML alone which there are. A process writes ``<log>.status`` when it ends; one that vanishes
without has failed. All of them end with the process that started them.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from ._runs import RunFailedError, _count, _tail, child_environment
from ._stage import RunSpec

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_STAGES = (f"{__package__}._stage", f"{__package__}._stage_callbacks", f"{__package__}.workloads.classification")


class WarmRun:
    """The processes of one run.

    Args:
        name: for messages.
        log: the processes' logs are ``<log>.<i>``.
        pids: of the processes.
    """

    def __init__(self, name: str, log: Path, pids: list[int]) -> None:
        self.name, self.log, self.pids = name, log, pids

    def poll(self) -> bool:
        """Whether all processes have ended well.

        Raises:
            RunFailedError: if one has failed; the others are ended first.
        """
        done = 0
        for i, pid in enumerate(self.pids):
            gone = not _alive(pid)
            status = Path(f"{self.log}.{i}.status")
            if status.exists():
                text = status.read_text()
                if text == "0":
                    done += gone
                    continue
                gone = text != ""
            if gone:
                self.kill()
                log = Path(f"{self.log}.{i}")
                raise RunFailedError(f"{self.name}: process {i} failed; its log is {log}:\n{_tail(log)}")
        return done == len(self.pids)

    def wait(self, timeout_s: float) -> None:
        """Wait until all have ended well.

        Raises:
            RunFailedError: if one fails or it takes too long.
        """
        deadline = time.monotonic() + timeout_s
        while not self.poll():
            if time.monotonic() > deadline:
                self.kill()
                raise RunFailedError(
                    f"{self.name} has not ended after {timeout_s:.0f} s.\n{_tail(Path(f'{self.log}.0'))}"
                )
            time.sleep(0.02)

    def kill(self) -> None:
        """End all processes."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait_until_gone(self, timeout_s: float = 30.0) -> None:
        """Wait until no process is left, however it ended, or some seconds have passed."""
        deadline = time.monotonic() + timeout_s
        while any(map(_alive, self.pids)) and time.monotonic() < deadline:
            time.sleep(0.02)


class WarmProcesses:
    """Starts runs from one warm process.

    Args:
        environment: instruction-set variables of all runs, complete as for `apply_environment`.
        threads: CPU threads of each process.
        modules: what to import beside Lightning and EasyScale; what is not installed is left to the run that needs it.
    """

    def __init__(self, environment: dict[str, str], *, threads: int = 1, modules: Sequence[str] = _STAGES) -> None:
        full = child_environment(environment)
        full.update(OMP_NUM_THREADS=str(threads), MPLBACKEND="Agg", PYTORCH_NVML_BASED_CUDA_CHECK="1")
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}._warm", *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=full,
            start_new_session=True,  # Ctrl-C is for the recipe, which ends this process
        )
        self._ready = False

    def __enter__(self) -> WarmProcesses:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def start(self, spec: RunSpec, log: Path) -> WarmRun:
        """Start a run; its processes are those of its devices, or one per worker of a reference run.

        Args:
            spec: the run.
            log: where the processes write, without their number.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        Path(spec.save).parent.mkdir(parents=True, exist_ok=True)
        file = log.with_suffix(".json")
        file.write_text(spec.dumps())
        ranks = [{"NODE_RANK": "0", "LOCAL_RANK": str(i)} for i in range(_count(spec.devices))]
        return self.launch(spec.name, f"{__package__}._stage:run_file", file, log, ranks)

    def launch(self, name: str, function: str, file: Path, log: Path, ranks: Sequence[dict[str, str]]) -> WarmRun:
        """Start processes that meet at a port of their own.

        Args:
            name: for messages.
            function: ``module:name`` of what each of them calls.
            file: its argument.
            log: where the processes write, without their number.
            ranks: for each process, the variables that tell it which one it is.
        """
        assert self._process.stdin is not None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        pids = []
        for i, rank in enumerate(ranks):
            Path(f"{log}.{i}.status").unlink(missing_ok=True)
            task = [function, str(file), f"{log}.{i}", {**meeting, **rank}]
            print(json.dumps(task), file=self._process.stdin, flush=True)
            pids.append(int(self._answer()))
        return WarmRun(name, log, pids)

    def wait_until_ready(self) -> None:
        """Wait until the warm process has imported everything; `start` would.

        Raises:
            RunFailedError: if it has ended.
        """
        assert self._process.stdout is not None
        while not self._ready:
            line = self._process.stdout.readline()
            if not line:
                raise RunFailedError(f"the process that runs are forked from has ended ({self._process.wait()}).")
            self._ready = line.strip() == "ready"

    def _answer(self) -> str:
        self.wait_until_ready()
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def close(self) -> None:
        """End the warm process, and with it what is left of its runs."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _serve(modules: Sequence[str]) -> None:
    """Fork a process for every line read."""
    import lightning.pytorch  # noqa: F401

    import lightning_easyscale  # noqa: F401

    for module in modules:
        with suppress(ModuleNotFoundError):
            import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _child(*json.loads(line))
        print(pid, flush=True)


def _child(function: str, file: str, log: str, environment: dict[str, str]) -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with open(log, "wb", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ.update(environment)
    status = 0
    try:
        module, _, name = function.partition(":")
        getattr(import_module(module), name)(Path(file))
    except BaseException:  # noqa: BLE001 - goes to the log
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    Path(f"{log}.status").write_text(str(status))
    os._exit(status)


if __name__ == "__main__":
    _serve(sys.argv[1:])
