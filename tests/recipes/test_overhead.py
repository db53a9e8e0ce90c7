"""The overhead benchmark: configuration, statistics, hand-overs, and a run in small from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("hydra")
from hydra import compose, initialize
from omegaconf import OmegaConf

from recipes import _bench_figure, overhead
from recipes._bench_config import check
from recipes._bench_models import resnet18
from recipes._bench_runs import SideFailedError, bench_processes, interleave
from recipes._bench_switch import time_switches, time_threads
from recipes._bench_worker import Gate, Side
from recipes._config import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def configure(*overrides):
    with initialize(version_base="1.3", config_path="../../conf"):
        return OmegaConf.to_object(compose("overhead", overrides=list(overrides)))


@pytest.mark.parametrize("file", sorted((ROOT / "conf" / "bench").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_size_composes(file):
    check(configure(f"bench={file.stem}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("only=[speed]", "`only` has 'speed'"),
        ("ests=1", "`ests=1`"),
        ("accelerator=tpu", "`accelerator=tpu` is unknown"),
        ("bench.blocks=0", "`bench.blocks=0`"),
        ("bench.snapshot_steps=0", "`bench.snapshot_steps=0`"),
        ("bench.automatic_steps=0", "`bench.automatic_steps=0`"),
        ("~bench.models.tiny", "`bench.models` lacks 'tiny'"),
    ],
)
def test_what_cannot_be_measured_is_refused(override, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        check(configure(override))


def test_resnet18_is_the_published_one():
    model = resnet18()
    assert sum(p.numel() for p in model.parameters()) == 11_689_512
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 1000)


def test_a_ratio_is_that_of_neighbouring_blocks():
    ours = [{"seconds": s} for s in (1.0, 10.0, 3.0)]
    stock = [{"seconds": s} for s in (2.0, 10.0, 2.0)]
    row = overhead._ratio("c", "w", ours, stock, aim=1.02)
    assert (row["median"], row["min"], row["max"], row["blocks"]) == (1.0, 0.5, 1.5, 3)
    assert (row["ours_ms"], row["stock_ms"]) == (3000.0, 2000.0)


def test_hand_overs_are_counted_and_timed():
    seconds = time_switches(ests=3, device=torch.device("cpu"), blocks=2, rounds=5)
    assert len(seconds) == 2
    bare = time_threads(threads=3, blocks=2, rounds=5)
    assert len(bare) == 2
    assert all(0 < s < 1 for s in seconds + bare)


def test_a_gate_opens_at_its_block(tmp_path):
    gate = Gate(str(tmp_path), rank=0)
    gate.say("ready", {"rss": 5})
    assert json.loads((tmp_path / "ready.0").read_text()) == {"rss": 5}
    (tmp_path / "go").write_text("1")
    gate.wait(0)
    gate.wait(1)
    Gate(str(tmp_path), rank=1).report({"seconds": 9.0})
    gate.report({"seconds": 1.0})
    assert json.loads((tmp_path / "done").read_text()) == {"seconds": 1.0}


@pytest.mark.matrix
def test_a_side_that_fails_is_shown_with_its_log(tmp_path):
    side = Side("accumulate", "no such model", 2, 1, 8, 4, 1, 1, 1, "no such accelerator", 1, "ddp", str(tmp_path))
    with bench_processes() as warm, pytest.raises(SideFailedError, match="no such accelerator") as failed:
        interleave({"broken": side}, warm, timeout_s=60)
    assert not failed.value.out_of_memory


@pytest.mark.matrix
def test_a_small_run_from_end_to_end(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("EASYSCALE_")}

    def recipe(*overrides):
        command = [sys.executable, "-m", "recipes.overhead", "bench=smoke", f"hydra.run.dir={tmp_path}", *overrides]
        return subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=ROOT, env=environment)

    first = recipe("only=[switch,snapshots]", "accelerator=cpu", "ests=2")
    assert first.returncode == 0, first.stdout + first.stderr
    report = json.loads((tmp_path / "overhead.json").read_text())
    assert {row["comparison"] for row in report["rows"]} == {
        "switch",
        "switch empty",
        "snapshots resnet18",
        "snapshots resnet18 auto",
    }
    assert all(row["min"] <= row["median"] <= row["max"] for row in report["rows"])
    assert (tmp_path / "overhead.csv").read_text().count("\n") == len(report["rows"]) + 1

    (tmp_path / "overhead.png").unlink()
    again = recipe("plot_only=true")
    assert again.returncode == 0, again.stdout + again.stderr
    assert (tmp_path / "overhead.png").read_bytes()[:4] == b"\x89PNG"
    assert recipe("only=[speed]").returncode == 2


def test_figure_of_a_report_without_ratios(tmp_path):
    report = {"rows": [], "device": "a CPU", "torch": "2", "ests": 2}
    _bench_figure.draw(tmp_path / "x.png", report)
    assert (tmp_path / "x.png").exists()
