"""Slurm, as far as a machine without it can tell: its variables, its signal, and an `scontrol` that notes its calls."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_easyscale.elastic.notice import STOPPED
from lightning_easyscale.elastic.requeue import requeue_job
from tests.launch.test_launch import result, start
from tests.ports import free_port


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the calls are noted."""
    program, calls = tmp_path / "bin" / "scontrol", tmp_path / "calls"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return calls


def srun(tasks: int, out: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    """What srun starts on one node."""
    port = str(free_port())
    script = [sys.executable, "-m", "tests.elastic.script", "--num-ests", "2", "--out", str(out)]
    common = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": str(tasks),
        "SLURM_NTASKS_PER_NODE": str(tasks),
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "127.0.0.1",
        "MASTER_PORT": port,
        "EASYSCALE_ELASTIC_DIR": str(out / "job"),
    }
    ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(tasks)]
    return [start([*script, "--devices", str(tasks), *arguments], **common, **rank) for rank in ranks]


def wait_for_steps(out: Path, steps: int) -> None:
    file, deadline = out / "record" / "est-00000.jsonl", time.monotonic() + 120
    while not file.exists() or file.read_text().count('{"kind":"step"') < steps:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.matrix
@pytest.mark.timeout(600)
@pytest.mark.fault("SIGUSR1 from Slurm to all tasks")
def test_a_job_whose_time_is_up_is_requeued_once_and_goes_on_with_another_number_of_tasks(
    tmp_path: Path, scontrol: Path
) -> None:
    """One checkpoint, one requeue, exit code 75; the rest on one task has the same bits."""
    (tmp_path / "whole").mkdir()
    (whole,) = srun(1, tmp_path / "whole")
    out = tmp_path / "out"
    out.mkdir()
    tasks = srun(2, out, "--delay", "0.5")
    try:
        wait_for_steps(out, 2)
        for task in tasks:
            task.send_signal(signal.SIGUSR1)
        outputs = [task.communicate(timeout=100)[0] for task in tasks]
        assert [task.returncode for task in tasks] == [STOPPED] * 2, outputs
        assert scontrol.read_text() == "requeue 4711\n"
        (again,) = srun(1, out)
        output = again.communicate(timeout=200)[0]
        assert again.returncode == 0, output
        assert "going on from" in output
        assert whole.wait(100) == 0
    finally:
        for process in (*tasks, whole):
            process.kill()
    whole.communicate()
    assert result(out) == result(tmp_path / "whole")


def test_an_array_job_is_requeued_by_its_task(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"JOB_ID": "9", "ARRAY_JOB_ID": "8", "ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    requeue_job()
    assert scontrol.read_text() == "requeue 8_3\n"


@pytest.mark.parametrize(("program", "why"), [("#!/bin/sh\necho no such job >&2\nexit 1\n", "no such job"), (None, "")])
def test_a_job_that_cannot_be_requeued_is_told(
    scontrol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str | None, why: str
) -> None:
    file = tmp_path / "bin" / "scontrol"
    file.write_text(program) if program is not None else file.unlink()
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    with pytest.warns(UserWarning, match=rf"job 9 could not be put back .*{why}.* HINT: `scontrol requeue 9`"):
        requeue_job()
