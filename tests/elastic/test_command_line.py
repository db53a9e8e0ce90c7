"""The command line, with a real script."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_easyscale.elastic.__main__ import main
from lightning_easyscale.elastic.control import JobError, JobFolder
from tests.launch.test_launch import ROOT, environment

COMMAND = [sys.executable, "-m", "lightning_easyscale.elastic"]
pytestmark = pytest.mark.timeout(200)


def start(folder: Path, devices: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Start a supervisor with `script.py`, whose results go to the folder's parent."""
    script = ["-m", "tests.elastic.script", "--out", str(folder.parent), *arguments]
    return subprocess.Popen(
        [*COMMAND, "run", "--dir", str(folder), "--devices", devices, *script],
        cwd=ROOT,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    """What it printed, when it has ended with `code`."""
    try:
        output = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == code, output
    return output


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder.parent / "result.json").read_text())


def wait_for_step(folder: Path, step: int) -> None:
    """Wait until the job has done `step` steps."""
    while True:
        try:
            if JobFolder(folder).request("status")["step"] >= step:
                return
        except JobError:
            pass
        time.sleep(0.05)


@pytest.mark.emulation
def test_a_script_runs_unchanged_on_typed_devices(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    output = ended(start(folder, "v100:1,t4:1", "--epochs", "1", EASYSCALE_EMULATE="1"))
    assert "the supervisor has started 2 processes; `devices` (1) and `num_nodes` (1) of the Trainer are" in output
    assert "formed after" in output
    assert "4 ESTs as 2 + 2" in output
    assert result(folder)["step"] == 6
    events = [json.loads(line) for line in (tmp_path / "record" / "est-00000.jsonl").read_text().splitlines()]
    assert events[1]["data"]["placement"]["host_device_types"] == ["v100", "t4"]


def test_commands_do_not_import_torch(tmp_path: Path) -> None:
    """It takes seconds; whoever trains gets the strategy all the same."""
    command = [sys.executable, "-X", "importtime", *COMMAND[1:], "status", "--dir", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "there is no job" in done.stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "lightning_easyscale" in imported
    assert not imported & {"torch", "lightning", "numpy"}


def test_commands_without_a_job_and_bad_arguments_end_with_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "none")
    for command in (["status"], ["stop"], ["resize", "--devices", "2"]):
        assert main([*command, "--dir", folder]) == 2
        assert capsys.readouterr().err.startswith(f"error: there is no job in `{folder}`. HINT:")
    assert main(["run", "--dir", folder, "--devices", "5", "--num-ests", "4", "x.py"]) == 2
    assert "is 5 devices for `--num-ests 4`" in capsys.readouterr().err
    assert main(["run", "--dir", folder, "--devices", "z900:1", "x.py"]) == 2
    assert "`z900` is not on this machine" in capsys.readouterr().err
    JobFolder(folder).path.mkdir()
    JobFolder(folder).write_state(state="finished", step=7, devices="2 devices")
    assert main(["run", "--dir", folder, "--devices", "1", "x.py"]) == 2
    assert "has finished. HINT: give a new one another `--dir`" in capsys.readouterr().err
    assert main(["status", "--dir", folder]) == 0
    assert capsys.readouterr().out == f"the job in `{folder}` has finished. It has done 7 steps, on 2 devices last.\n"
