"""Figs. 11 and 13 for every workload: configuration, and a run in small from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hydra")
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console

from recipes import est_overhead
from recipes._config import ConfigError
from recipes.est_overhead import PUBLISHED_MS, PUBLISHED_PARTS_MS, EstOverheadConf, draw, measure

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
        measure(EstOverheadConf(**options), tmp_path, Console())


def test_published_ratios_are_those_of_the_paper():
    ratios = [on / off - 1 for off, on in PUBLISHED_MS.values()]
    assert -0.006 < min(ratios) < -0.004  # -0.5 %
    assert 0.019 < max(ratios) < 0.021  # +2.0 %
    assert list(PUBLISHED_PARTS_MS) == list(PUBLISHED_MS)
    # Fig. 13's middle ESTs are Fig. 11's with switching on.
    assert [parts[1] for parts in PUBLISHED_PARTS_MS.values()] == pytest.approx(
        [on for _, on in PUBLISHED_MS.values()], rel=1e-3
    )
    assert OmegaConf.structured(EstOverheadConf).workloads == list(PUBLISHED_MS)


@pytest.mark.parametrize(
    ("options", "orders"),
    [({}, ["auto", "tree"]), ({"reduction": "ddp"}, ["ddp", "ddp"])],
    ids=["by default", "in the ddp order"],
)
def test_each_side_has_the_threads_that_it_has_by_itself(options, orders, monkeypatch, tmp_path):
    def started(sides, warm, **_):
        assert {kind: side.threads for kind, side in sides.items()} == {
            **dict.fromkeys(["easyscale", "alone", "host", "overlap"], 2),
            **dict.fromkeys(["accumulate", "ddp"], 16),
        }
        assert [sides[kind].reduction for kind in ("easyscale", "host")] == orders
        assert sides["host"].offload == "host"
        raise InterruptedError

    monkeypatch.setattr(est_overhead, "interleave", started)
    monkeypatch.setattr(est_overhead.determinism, "default_threads", lambda workers: 16 // workers)
    conf = EstOverheadConf(workloads=["neumf"], ests=8, host=True, overlap=True, accelerator="cpu", **options)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"), pytest.raises(InterruptedError):
        est_overhead._row(conf, "neumf", False, tmp_path, None)


@pytest.mark.matrix
def test_one_workload_from_end_to_end(tmp_path):
    command = [sys.executable, "-m", "recipes.est_overhead", f"hydra.run.dir={tmp_path}", "workloads=[neumf]"]
    command += ["ests=2", "blocks=2", "steps=1", "warmup=1", "accelerator=cpu", "threads=1"]
    command += ["host=true", "overlap=true"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "neumf" in done.stdout
    report = json.loads((tmp_path / "est_overhead.json").read_text())
    (row,) = report["rows"]
    assert min(row[name] for name in ("ratio", "lead", "middle", "last", "host", "alone", "overlap")) > 0
    assert {kind: len(side) for kind, side in row["blocks"].items()} == dict.fromkeys(
        ("easyscale", "alone", "accumulate", "ddp", "host", "overlap"), 2
    )
    for block in row["blocks"]["alone"]:
        # Two ESTs that share a step's time, and never hold the baton together.
        assert set(block["slices"]) == {"0", "1"}
        assert 0 < sum(block["slices"].values()) <= block["seconds"]
    assert (tmp_path / "est_overhead.csv").read_text().startswith("workload,batch_size,easyscale_ms")

    for name in ("est_overhead", "est_parts"):
        (tmp_path / f"{name}.png").unlink()
    draw(tmp_path, report)
    for name in ("est_overhead", "est_parts"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"

    # What is there is kept: nothing is started again.
    (tmp_path / "sides").rename(tmp_path / "old")
    sides = {"accelerator": "cpu", "threads": 1, "host": True, "overlap": True}
    conf = EstOverheadConf(workloads=["neumf"], ests=2, blocks=2, steps=1, warmup=1, **sides)
    measure(conf, tmp_path, Console())
    assert not (tmp_path / "sides").exists()
