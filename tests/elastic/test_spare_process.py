"""A process that torchrun starts beyond the number of ESTs."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from lightning_easyscale.elastic.spare import mark_finished
from tests.launch.test_launch import start


@pytest.mark.timeout(200)
def test_a_spare_runs_the_script_up_to_fit_and_ends_well_with_the_job(tmp_path: Path) -> None:
    agent = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    agent |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x"}
    script = [sys.executable, "-m", "tests.elastic.script", "--num-ests", "1", "--out", str(tmp_path)]
    spare = start(script, **agent, EASYSCALE_ELASTIC_DIR=str(tmp_path / "job"))
    try:
        while spare.poll() is None:
            mark_finished(tmp_path / "job")
            time.sleep(0.5)
    finally:
        spare.kill()
    output = spare.communicate()[0]
    assert spare.returncode == 0, output
    assert not (tmp_path / "result.json").exists()
