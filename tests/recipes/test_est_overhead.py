"""Fig. 11 for every workload: configuration, and a run in small from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hydra")
from omegaconf import OmegaConf

from recipes._config import ConfigError
from recipes.est_overhead import PUBLISHED_MS, EstOverheadConf, measure

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workloads": ["alexnet"]}, "`workloads` has 'alexnet'"),
        ({"ests": 1}, "`ests` at least 2"),
        ({"size": "huge"}, "`size` is 'small' or 'full'"),
        ({"blocks": 0}, "`blocks` and `steps` at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        measure(EstOverheadConf(**options), tmp_path)


def test_published_ratios_are_those_of_the_paper():
    ratios = [on / off - 1 for off, on in PUBLISHED_MS.values()]
    assert -0.006 < min(ratios) < -0.004  # -0.5 %
    assert 0.019 < max(ratios) < 0.021  # +2.0 %
    assert OmegaConf.structured(EstOverheadConf).workloads == list(PUBLISHED_MS)


def test_one_workload_from_end_to_end(tmp_path):
    command = [sys.executable, "-m", "recipes.est_overhead", f"hydra.run.dir={tmp_path}", "workloads=[neumf]"]
    command += ["ests=2", "blocks=2", "steps=1", "warmup=1", "accelerator=cpu", "threads=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for more in ("plot_only=false", "plot_only=true"):
        done = subprocess.run([*command, more], env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "neumf" in done.stdout
    (row,) = json.loads((tmp_path / "est_overhead.json").read_text())["rows"]
    assert row["ratio"] > 0
    assert [len(side) for side in row["blocks"].values()] == [2, 2]
    assert (tmp_path / "est_overhead.csv").read_text().startswith("workload,batch_size,on_ms,off_ms,ratio")
    assert (tmp_path / "est_overhead.png").read_bytes()[:4] == b"\x89PNG"
