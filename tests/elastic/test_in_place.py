"""Devices change while processes stay: the bits are those of stock DDP that nothing has disturbed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_easyscale.compare import compare
from lightning_easyscale.elastic.control import JobFolder
from tests.elastic.test_command_line import COMMAND, ended, result, wait_for_step
from tests.launch.test_launch import ROOT, environment

pytestmark = pytest.mark.timeout(280)
LENGTH = ["--epochs", "3", "--samples", "240", "--workers", "1"]  # 45 steps


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference")
    command = [sys.executable, "-m", "tests.elastic.script", "--out", str(out), "--reference", *LENGTH]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return out


class Job:
    """A supervised script whose devices change in place."""

    def __init__(self, folder: Path, devices: str, *arguments: str, **variables: str) -> None:
        self.folder = folder
        script = ["-m", "tests.elastic.script", "--out", str(folder.parent), *LENGTH, *arguments]
        self.hurry = folder.parent / "hurry"
        script += ["--delay", "3.0", "--hurry", str(self.hurry)]
        self.process = subprocess.Popen(
            [*COMMAND, "run", "--dir", str(folder), "--devices", devices, "--in-place", *script],
            cwd=ROOT,
            env=environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()  # of a test that failed; the executors stop with it
        self.process.communicate()

    def status(self) -> dict[str, Any]:
        return JobFolder(self.folder).request("status")

    def resize(self, devices: str, *, stages: int) -> list[int]:
        """Change devices, wait for a step on them, and return the processes that run then."""
        JobFolder(self.folder).request("resize", devices=devices)
        while True:
            now = self.status()
            if now["stages"] == stages and now["state"] == "training":
                return list(now["executors"])
            time.sleep(0.05)


def test_processes_stay_while_devices_come_and_go(tmp_path: Path, reference: Path) -> None:
    with Job(tmp_path / "job", "2") as job:
        wait_for_step(job.folder, 2)
        two = job.status()["executors"]
        three = job.resize("3", stages=2)
        one = job.resize("1", stages=3)
        job.hurry.touch()
        output = ended(job.process)
    assert three[:2] == two, output
    assert one == two[:1], output
    assert "4 ESTs as 2 + 1 + 1" in output
    assert output.count("starting on") == 1, output
    difference = compare(tmp_path / "record", reference / "record")
    assert difference is None, str(difference)
    assert result(job.folder) == result(reference / "job")
