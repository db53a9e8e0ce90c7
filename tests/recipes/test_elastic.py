"""Live schedules, and a short soak, with real jobs against real stock DDP."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hydra")

from lightning_easyscale.elastic.supervisor import Supervisor
from recipes._config import ConfigError
from recipes._elastic_run import ElasticRun
from recipes._runs import RunFailedError
from recipes._schedules import LiveStage, check_stages, random_stages
from recipes._timeline import read_spans
from recipes.elastic import ElasticConf, LiveScheduleConf, LiveStageConf, stages_of
from recipes.soak import SoakConf, count_samples, make_spec
from tests.launch.test_launch import ROOT, environment


def test_a_random_schedule_depends_on_its_seed_alone() -> None:
    drawn = [random_stages(s, num_ests=4, types=["v100", "t4"], count=6, steps=(5, 9)) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert check_stages(drawn[0], 4) == drawn[0]
    assert all(5 <= (stage.steps or 0) <= 9 for stage in drawn[0])
    assert all(a.devices != b.devices for a, b in zip(drawn[0], drawn[0][1:], strict=False))


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([], "`live_schedule.stages` is empty"),
        ([LiveStage({"v100": 5})], "are 5 devices for `live_schedule.num_ests=4`"),
        ([LiveStage({"v100": 0})], "a count of at least 1"),
        ([LiveStage({"v100": 1}), LiveStage({"v100": 2})], r"stages\[0\]` never ends"),
        ([LiveStage({"v100": 1}, steps=1, seconds=1.0)], "give one of the two"),
        ([LiveStage({"v100": 1}, steps=0)], "lasts 0"),
    ],
)
def test_schedules_that_cannot_run_are_refused(stages: list[LiveStage], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_stages(stages, 4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"elastic": "x"}, "`elastic=x` is unknown. HINT: use `elastic=relaunch` or `elastic=in_place`"),
        ({"level": "d0"}, "promises nothing over a change"),
        ({"level": "d1"}, r"the stages have \['t4', 'v100'\]"),
    ],
)
def test_configurations_that_cannot_run_are_refused(changes: dict[str, Any], says: str) -> None:
    stages = [LiveStageConf({"v100": 1}, steps=3), LiveStageConf({"t4": 1})]
    with pytest.raises(ConfigError, match=says):
        stages_of(ElasticConf(live_schedule=LiveScheduleConf(num_ests=2, stages=stages), **changes))


def test_spans_are_read_from_events(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"event": "starting", "time": 0.0, "devices": "2 v100", "types": ["v100", "v100"]},
        {"event": "formed", "time": 3.0, "placement": [1, 1]},
        {"event": "first_step", "time": 4.0, "step": 1},
        {"event": "stopping", "time": 10.0},
        {"event": "agreed", "time": 10.25, "step": 6},
        {"event": "saved", "time": 10.5, "step": 6},
        {"event": "starting", "time": 11.0, "devices": "1 t4", "types": ["t4"]},
        {"event": "starting", "time": 12.0, "devices": "1 t4", "types": ["t4"]},  # the first start was killed
        {"event": "formed", "time": 14.0, "placement": [2]},
        {"event": "first_step", "time": 15.0, "step": 7},
        {"event": "moving", "time": 18.0, "devices": "2 t4", "types": ["t4", "t4"]},
        {"event": "stopping", "time": 18.0},
        {"event": "notice", "time": 18.0},
        {"event": "agreed", "time": 18.25, "step": 9},
        {"event": "saved", "time": 18.75, "step": 9},
        {"event": "formed", "time": 19.0, "placement": [1, 1]},
        {"event": "first_step", "time": 19.5, "step": 10},
    ]
    file = tmp_path / "events.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, third = read_spans(file, 20)
    assert (first.first_step, first.end_step, first.paused_s) == (0, 6, 4.0)
    assert (second.first_step, second.end_step, second.types) == (6, 9, ("t4",))
    assert (second.paused_s, second.boundary_s, second.saving_s) == (5.0, 0.25, 0.25)
    assert (second.forming_s, second.stepping_s) == (3.5, 1.0)
    assert (third.first_step, third.end_step, third.types) == (9, 20, ("t4", "t4"))
    assert (third.paused_s, third.boundary_s, third.saving_s, third.forming_s, third.stepping_s) == (
        *(1.5, 0.25, 0.5, 0.25, 0.5),
    )


def test_under_agents_nobody_says_that_executors_start(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"event": "formed", "time": 3.0, "placement": [1, 1]},
        {"event": "first_step", "time": 4.0, "step": 1},
        {"event": "notice", "time": 10.0},
        {"event": "agreed", "time": 10.25, "step": 6},
        {"event": "saved", "time": 10.5, "step": 6},
        {"event": "formed", "time": 14.0, "placement": [2]},
        {"event": "first_step", "time": 15.0, "step": 7},
    ]
    file = tmp_path / "events.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_spans(file, 9)
    assert (first.devices, first.first_step, first.end_step, first.paused_s) == ("2 devices", 0, 6, 1.0)
    assert (second.devices, second.paused_s, second.forming_s) == ("1 device", 5.0, 3.5)


def test_lost_and_repeated_samples_are_counted(tmp_path: Path) -> None:
    for name, batches in (("reference", [0, 1, 2]), ("run", [0, 0, 2])):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps({"kind": "step", "batch": b}) + "\n" for b in batches)
        (tmp_path / name / "est-00000.jsonl").write_text(lines)
    assert count_samples(tmp_path / "reference", tmp_path / "run", num_ests=1, batch_size=16) == (16, 16)


@pytest.mark.parametrize(("told", "ends"), [(False, RunFailedError), (True, SystemExit)])
def test_an_executor_that_was_terminated_does_not_end_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool, ends: type[BaseException]
) -> None:
    """Its exit code looks as if somebody had ended the supervisor."""
    monkeypatch.setattr(Supervisor, "run", lambda _: 128 + signal.SIGTERM)
    monkeypatch.setattr(Supervisor, "told_to_stop", told)
    spec = make_spec(SoakConf(), tmp_path, tmp_path, reference=False)
    run = ElasticRun(spec, tmp_path / "job", "1", tell=print)
    run.log.touch()
    with pytest.raises(ends, match="143"):
        run.run(lambda _: None)


def run_recipe(name: str, directory: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"recipes.{name}", f"hydra.run.dir={directory}", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads((directory / "report.json").read_text())


@pytest.mark.matrix
@pytest.mark.emulation
@pytest.mark.timeout(500)
def test_a_live_schedule_has_the_bits_of_stock_ddp(tmp_path: Path) -> None:
    stages = "live_schedule.stages=[{devices:{v100:2},steps:4},{devices:{v100:1}}]"
    report = run_recipe("elastic", tmp_path, "live_schedule.num_ests=2", stages, "max_steps=40", "pause_s=0.05")
    assert report["bits_equal"]
    assert [stage["types"] for stage in report["stages"]] == [["v100", "v100"], ["v100"]]
    assert report["stages"][0]["end_step"] >= 4
    assert report["steps_redone"] == 0
    assert (tmp_path / "timeline.png").stat().st_size > 10_000


@pytest.mark.timeout(500)
def test_a_short_soak_has_the_bits_of_stock_ddp(tmp_path: Path) -> None:
    options = ["num_ests=2", "steps=20", "quiet_steps=8", "rounds=1", "pauses_s=[0.05]", "workload.workers=1", "seed=2"]
    report = run_recipe("soak", tmp_path, *options)
    assert report["bits_equal"]
    assert sum(report["events"].values()) >= 1
    assert report["restarts"] >= 1
    assert report["samples_lost"] == report["samples_repeated"] == 0
