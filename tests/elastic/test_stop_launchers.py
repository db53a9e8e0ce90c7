"""A stop signal where executors are started by fork or spawn from the trainer call."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from lightning_easyscale.compare import compare
from tests.launch.test_launch import ROOT, environment

pytestmark = [pytest.mark.timeout(400), pytest.mark.matrix]
LENGTH = ["--epochs", "2", "--samples", "48", "--num-ests", "2"]


def run(out: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.elastic.script", "--out", str(out), *LENGTH, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == code, output
    return output


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference")
    finished(run(out, "--reference"))
    return out


def wait_for_steps(out: Path, steps: int) -> None:
    deadline = time.monotonic() + 100
    file = out / "record" / "est-00001.jsonl"
    while not file.exists() or file.read_text().count('"kind":"step"') < steps:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("whom", ["the caller", "executor 0", "executor 1"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_stop_is_heard_by_all_and_loses_no_bit(tmp_path: Path, reference: Path, method: str, whom: str) -> None:
    arguments = ["--devices", "2", "--start-method", method]
    folder = {"EASYSCALE_ELASTIC_DIR": str(tmp_path / "job")}
    job = run(tmp_path, *arguments, "--delay", "0.5", **folder)
    wait_for_steps(tmp_path, 2)
    executors = executors_of(job)
    assert len(executors) == 2
    target = job.pid if whom == "the caller" else executors[int(whom[-1])].pid
    psutil.Process(target).send_signal(signal.SIGTERM)
    output = finished(job, 75)
    assert "stopped by a signal after step" in output
    assert len(list((tmp_path / "job" / "checkpoints").glob("*.ckpt"))) == 1
    events = [json.loads(line) for line in (tmp_path / "record" / "est-00001.jsonl").read_text().splitlines()]
    assert [e["data"]["type"] for e in events if e.get("event") == "exception"] == ["TrainingStopped"]
    again = finished(run(tmp_path, *arguments, **folder))
    assert "going on from" in again
    difference = compare(tmp_path / "record", reference / "record")
    assert difference is None, str(difference)


def test_a_second_signal_ends_all_at_once(tmp_path: Path) -> None:
    job = run(tmp_path, "--devices", "2", "--start-method", "fork", "--delay", "30")
    deadline = time.monotonic() + 100
    while len(executors_of(job)) < 2 or not (tmp_path / "asleep").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    executors = executors_of(job)
    job.terminate()
    time.sleep(1.5)
    job.terminate()
    finished(job, 128 + signal.SIGTERM)
    _, alive = psutil.wait_procs(executors, timeout=20)
    assert not alive


def executors_of(job: subprocess.Popen[str]) -> list[Any]:
    """The processes that the trainer call has started, without the helper of `multiprocessing`."""
    children = psutil.Process(job.pid).children()
    return [p for p in children if "resource_tracker" not in " ".join(p.cmdline())]
