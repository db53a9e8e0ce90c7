"""The recipe of Fig. 12: what it refuses, the published ratios, and one workload from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from lightning_easyscale.kernels import build
from recipes._config import ConfigError
from recipes.determinism_overhead import PUBLISHED_MS, WAYS, DeterminismOverheadConf, run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workloads": ["alexnet"]}, "there are shufflenetv2"),
        ({"size": "huge"}, "`size` is 'small' or 'full'"),
        ({"blocks": 0}, "`warmup` at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run(DeterminismOverheadConf(**options), tmp_path, Console(quiet=True))


def test_published_ratios_are_those_of_the_paper():
    ratios = {name: d2 / free for name, (free, _, d2) in PUBLISHED_MS.items()}
    assert [round(ratios[name], 1) for name in ("vgg19", "resnet50", "shufflenetv2", "yolov3")] == [4.4, 2.3, 2.2, 1.2]
    assert all(0.99 < ratios[name] < 1.05 for name in ("swin", "bert", "electra", "neumf"))


@pytest.mark.matrix
@pytest.mark.skipif(bool(build.why_unavailable()), reason=build.why_unavailable() or "available")
def test_one_workload_from_end_to_end_goes_on_where_it_stopped(tmp_path):
    command = [sys.executable, "-m", "recipes.determinism_overhead", f"hydra.run.dir={tmp_path}", "workloads=[neumf]"]
    command += ["blocks=2", "steps=1", "warmup=1", "accelerator=cpu", "threads=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    rows = []
    for more in ("plot_only=false", "plot_only=false", "plot_only=true"):
        done = subprocess.run([*command, more], env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "neumf" in done.stdout
        rows.append(json.loads((tmp_path / "determinism_overhead.json").read_text())["rows"])
    assert rows[0] == rows[1] == rows[2]
    ((row,), *_) = rows
    assert [len(row["blocks_s"][way]) for way in WAYS] == [2] * 4
    assert row["d1_same_loss"]
    assert row["d2_same_loss"]
    assert (tmp_path / "determinism_overhead.csv").read_text().startswith("workload,batch_size,tf32_ms,tf32_ratio")
    assert (tmp_path / "determinism_overhead.png").read_bytes()[:4] == b"\x89PNG"
