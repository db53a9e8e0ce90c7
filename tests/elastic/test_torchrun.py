"""torchrun's agents come and go; the result stays that of one undisturbed process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.launch.test_launch import ROOT, environment
from tests.ports import free_port

pytestmark = pytest.mark.timeout(900)


def start(command: list[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(**variables),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for(log: Path, text: str, count: int = 1) -> None:
    """Wait until `text` is in a log `count` times."""
    deadline = time.monotonic() + 300
    while log.read_text(errors="replace").count(text) < count:
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
        time.sleep(0.05)


def end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text())


@pytest.mark.matrix
@pytest.mark.fault("torchrun agents join, one of them as a spare")
def test_agents_that_join_change_the_placement_and_not_the_result(tmp_path: Path) -> None:
    """One agent trains 2 ESTs; a second joins, and a third, whose worker waits as a spare."""
    script = ["-m", "tests.elastic.script", "--num-ests", "2", "--epochs", "20"]
    (tmp_path / "alone").mkdir()
    alone = start([sys.executable, *script, "--out", str(tmp_path / "alone")], tmp_path / "alone.log")
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:4", "--nproc-per-node=1", "--max-restarts=3"]
    agent += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-id=x"]
    agent += ["--rdzv-conf=last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"]
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "EASYSCALE_ELASTIC_DIR": str(tmp_path / "job")}
    out = tmp_path / "agents"
    out.mkdir()
    hurry = str(tmp_path / "hurry")
    logs = [tmp_path / f"{name}.log" for name in ("first", "second", "third")]
    agents: list[subprocess.Popen[bytes]] = []
    try:
        for log in logs:
            agents.append(
                start([*agent, *script, "--out", str(out), "--delay", "0.7", "--hurry", hurry], log, **variables)
            )
            stage = len(agents)
            wait_for(logs[0], "2 ESTs as 2 on 1" if stage == 1 else "2 ESTs as 1 + 1 on 2", max(1, stage - 1))
            wait_for_steps(out, 2)
        assert "1 of 3 processes wait as spares for 2 ESTs" in logs[0].read_text()
        Path(hurry).touch()
        for process in agents:
            assert process.wait(300) == 0, logs[0].read_text()[-3000:]
        assert alone.wait(300) == 0
    finally:
        for process in (*agents, alone):
            end(process)
    assert result(out) == result(tmp_path / "alone")
    assert "going on from" in logs[0].read_text()


def wait_for_steps(out: Path, more: int) -> None:
    """Wait until the record has grown by some steps."""
    file = out / "record" / "est-00000.jsonl"

    def steps() -> int:
        return file.read_text().count('{"kind":"step"') if file.exists() else 0

    before, deadline = steps(), time.monotonic() + 200
    while steps() < before + more:
        assert time.monotonic() < deadline
        time.sleep(0.05)
