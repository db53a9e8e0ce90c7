"""A process that torchrun starts beyond the number of ESTs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lightning_easyscale.elastic.spare import Spares
from tests.launch.test_launch import start
from tests.ports import free_port


@pytest.mark.timeout(200)
def test_a_spare_runs_the_script_up_to_fit_and_ends_well_with_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_easyscale.elastic.spare._HEARING_SECONDS", 150.0)
    agent = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    agent |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "x"}
    os.environ.update(agent)
    script = [sys.executable, "-m", "tests.elastic.script", "--num-ests", "1", "--out", str(tmp_path)]
    spare = start(script, **agent, EASYSCALE_ELASTIC_DIR=str(tmp_path / "job"))
    try:
        Spares(1).release()
        spare.wait(20)
    finally:
        spare.kill()
    output = spare.communicate()[0]
    assert spare.returncode == 0, output
    assert not (tmp_path / "result.json").exists()
