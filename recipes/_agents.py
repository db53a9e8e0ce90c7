"""A job under torchrun whose agents, one per device on this host, leave and join while it trains."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lightning_easyscale.elastic.control import FOLDER_VARIABLE
from lightning_easyscale.elastic.events import EVENTS_VARIABLE, EventReader, read_step

from ._runs import RunFailedError, _tail
from ._stage import RunSpec

_LAST_CALL = 1  # seconds that a rendezvous waits for more agents; torchrun's own is 30


def run_under_agents(spec: RunSpec, directory: Path, counts: Sequence[int], *, steps: int, timeout_s: float) -> Path:
    """Run a job on a number of agents after the other.

    Args:
        spec: the job, on one device as every agent sees it, with a file that ends it.
        directory: its folder.
        counts: agents of each stage.
        steps: optimizer steps of each stage, at least.
        timeout_s: longest time.

    Returns:
        The file of events.

    Raises:
        RunFailedError: if the job fails or takes too long.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "spec.json").write_text(spec.dumps())
    events = directory / "events.jsonl"
    environment = {**os.environ, FOLDER_VARIABLE: str(directory), EVENTS_VARIABLE: str(events)}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # torch 2.13: else agents that join do not find it
    on_gpus = not spec.devices.startswith("cpu:")
    agents = _Agents(directory, environment, on_gpus=on_gpus)
    deadline = time.monotonic() + timeout_s
    reader, formed, stepped = EventReader(events), 0, False
    try:
        done = 0
        for count in counts:
            agents.resize(count)
            while not (formed == count and stepped and read_step(events) >= done + steps):
                if time.monotonic() > deadline or agents.failed:
                    raise RunFailedError(f"the job under torchrun did not get on; its log:\n{_tail(agents.log)}")
                for event in reader.new():
                    if event["event"] == "formed":
                        formed, stepped = len(event["placement"]), False
                    elif event["event"] == "first_step" and formed == count:
                        stepped, done = True, event["step"]
                time.sleep(0.05)
        Path(spec.control or "").touch()
        agents.finish(deadline)
    finally:
        agents.end()
    return events


class _Agents:
    """Running agents, each with a GPU of its own if they are on GPUs; the first, at whose store they meet, stays."""

    def __init__(self, directory: Path, environment: dict[str, str], *, on_gpus: bool) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = directory / "agents.log"
        self._environment, self._on_gpus = environment, on_gpus
        self._command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:8", "--nproc-per-node=1"]
        self._command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=easyscale"]
        self._meeting = f"--rdzv-conf=last_call_timeout={_LAST_CALL},keep_alive_interval=1,keep_alive_max_attempt=3"
        self._arguments = ["--monitor-interval=0.1", "--max-restarts=100", "-m", f"{__package__}._stage"]
        self._arguments.append(str(directory / "spec.json"))
        self._running: list[subprocess.Popen[bytes]] = []
        self._left: list[subprocess.Popen[bytes]] = []

    @property
    def failed(self) -> bool:
        """Whether an agent has ended that was to stay."""
        return any(agent.poll() is not None for agent in self._running)

    def resize(self, count: int) -> None:
        """Start agents, or ask the newest to leave."""
        while len(self._running) > count:
            agent = self._running.pop()
            agent.send_signal(signal.SIGTERM)
            self._left.append(agent)
        with self.log.open("ab") as out:
            while len(self._running) < count:
                # On one host each of them could keep the store, and the one that is first there would.
                meeting = f"{self._meeting},is_host={'false' if self._running else 'true'}"
                command = [*self._command, meeting, *self._arguments]
                own = {"CUDA_VISIBLE_DEVICES": str(len(self._running))} if self._on_gpus else {}
                self._running.append(
                    subprocess.Popen(
                        command, env=self._environment | own, stdout=out, stderr=out, start_new_session=True
                    )
                )

    def finish(self, deadline: float) -> None:
        """Wait for the end of the job."""
        for agent in self._running:
            try:
                code = agent.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = -1
            if code != 0:
                raise RunFailedError(f"an agent ended with status {code}; its log is {self.log}:\n{_tail(self.log)}")

    def end(self) -> None:
        """End whatever is left: an agent's SIGTERM ends its workers, which are sessions of their own."""
        for agent in (*self._running, *self._left):
            if agent.poll() is None:
                agent.terminate()
        for agent in (*self._running, *self._left):
            try:
                agent.wait(60)
            except subprocess.TimeoutExpired:
                agent.kill()
                agent.wait()
