"""Hosts with torchrun agents on one machine: by loopback addresses, or each in a network namespace of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed import TCPStore

from tests.launch.test_launch import ROOT, environment
from tests.ports import free_port

_RENDEZVOUS = "last_call_timeout=1,keep_alive_interval=2,keep_alive_max_attempt=3,is_host=0"
_PATIENCE = 300


class Host:
    """Runs one agent at a time and has an elastic folder of its own.

    Args:
        number: from 1; torchrun gives the first rank to the lowest.
        root: where its folder and logs go.
        prefix: of its address.
        namespace: of the network; empty: the machine's own.
    """

    def __init__(self, number: int, root: Path, prefix: str, namespace: str = "") -> None:
        self.address = f"{prefix}{number}"
        self.folder = root / f"host{number}" / "elastic"
        self.log = root / f"host{number}.log"
        self.log.touch()
        self.agent: subprocess.Popen[bytes] | None = None
        self._enter = ["ip", "netns", "exec", namespace] if namespace else []
        self._interface = {"GLOO_SOCKET_IFNAME": f"{namespace}-in"} if namespace else {}

    def start(self, endpoint: str, nodes: str, *script: str) -> None:
        """Start an agent with one process."""
        command = [*self._enter, sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}"]
        command += ["--nproc-per-node=1", "--max-restarts=9", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
        command += ["--rdzv-id=x", f"--rdzv-conf={_RENDEZVOUS}", f"--local-addr={self.address}", *script]
        variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "EASYSCALE_ELASTIC_DIR": str(self.folder)}
        with self.log.open("wb") as out:
            self.agent = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(**variables, **self._interface),
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def processes(self) -> list[psutil.Process]:
        """The agent and what it has started."""
        assert self.agent is not None
        with suppress(psutil.NoSuchProcess):
            agent = psutil.Process(self.agent.pid)
            return [agent, *agent.children(recursive=True)]
        return []

    def lose(self) -> None:
        """All processes are killed at one moment, and the folder is gone with them."""
        self.kill(self.processes())
        shutil.rmtree(self.folder.parent)

    def kill(self, processes: list[psutil.Process]) -> None:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        assert self.agent is not None
        self.agent.wait(30)

    def ended(self, within: float = _PATIENCE) -> int:
        assert self.agent is not None
        return self.agent.wait(within)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, count: int = 1) -> None:
        """Wait until the agent or its processes have printed `text` so often."""
        deadline = time.monotonic() + _PATIENCE
        while self.text().count(text) < count:
            assert time.monotonic() < deadline, self.text()[-4000:]
            time.sleep(0.05)

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").glob("*.ckpt"))

    def wait_for_checkpoint(self) -> None:
        """Wait until this host has a checkpoint that was not there before."""
        before, deadline = self.checkpoints(), time.monotonic() + _PATIENCE
        while not set(self.checkpoints()) - set(before):
            assert time.monotonic() < deadline, self.text()[-4000:]
            time.sleep(0.05)


class Cluster:
    """Hosts that share a rendezvous store, which outlives them all."""

    def __init__(self, hosts: list[Host], address: str, out: Path) -> None:
        port = free_port()
        self.hosts = hosts
        self.out = out
        out.mkdir()
        self.endpoint = f"{address}:{port}"
        self.hurry = out / "hurry"
        self._store = TCPStore(address, port, is_master=True, wait_for_workers=False)

    def start(self, host: Host, nodes: str, *script: str) -> None:
        common = ["-m", "tests.elastic.script", "--out", str(self.out), "--delay", "0.7", "--hurry", str(self.hurry)]
        host.start(self.endpoint, nodes, *common, *script)

    def wait_for_steps(self, more: int) -> None:
        """Wait until the run record has grown by some steps."""
        file = self.out / "record" / "est-00000.jsonl"

        def steps() -> int:
            return file.read_text().count('{"kind":"step"') if file.exists() else 0

        before, deadline = steps(), time.monotonic() + _PATIENCE
        while steps() < before + more:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def close(self) -> None:
        for host in self.hosts:
            if host.agent is not None:
                host.kill(host.processes())

    def result(self) -> dict[str, Any]:
        return json.loads((self.out / "result.json").read_text())


@contextmanager
def cluster(tmp_path: Path, number: int, *, namespaces: bool = False) -> Iterator[Cluster]:
    """A cluster of `number` hosts; skips the test where namespaces are wanted and cannot be made."""
    names = [f"es{os.getpid() % 10000}-{i + 1}" for i in range(number)] if namespaces else [""] * number
    prefix = "10.213.7." if namespaces else "127.0.0.1"
    with _network(names, prefix) if namespaces else nullcontext():
        hosts = [Host(i + 1, tmp_path, prefix, name) for i, name in enumerate(names)]
        made = Cluster(hosts, f"{prefix}254" if namespaces else "127.0.0.1", tmp_path / "out")
        try:
            yield made
        finally:
            made.close()


@contextmanager
def _network(names: list[str], prefix: str) -> Iterator[None]:
    """Network namespaces that see each other over a bridge."""
    bridge = f"{names[0]}-br"
    commands = [f"link add {bridge} type bridge", f"addr add {prefix}254/24 dev {bridge}", f"link set {bridge} up"]
    for number, name in enumerate(names, 1):
        inside = f"netns exec {name} ip"
        commands += [
            f"netns add {name}",
            f"link add {name}-in type veth peer name {name}-out",
            f"link set {name}-in netns {name}",
            f"link set {name}-out master {bridge} up",
            f"{inside} addr add {prefix}{number}/24 dev {name}-in",
            f"{inside} link set {name}-in up",
            f"{inside} link set lo up",
        ]
    try:
        for command in commands:
            try:
                subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True)
            except FileNotFoundError:
                pytest.skip("network namespaces need the `ip` command")
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces cannot be made here: `ip {command}`: {error.stderr.strip()}")
        yield
    finally:
        for command in (*(f"netns del {name}" for name in names), f"link del {bridge}"):
            with suppress(FileNotFoundError):
                subprocess.run(["ip", *command.split()], capture_output=True)
