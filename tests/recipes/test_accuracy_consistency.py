"""The main job: configuration, promises, report, figure, and a run of a few steps from end to end."""

import io
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

pytest.importorskip("hydra")
from hydra import compose, initialize
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from rich.console import Console

from lightning_easyscale.compare import compare
from lightning_easyscale.devices import pinned_environment
from lightning_easyscale.digest import digest_state
from lightning_easyscale.record import Record
from lightning_easyscale.record_writer import RecordWriter
from recipes import _figure, _report
from recipes._config import ConfigError, check
from recipes._runs import RunFailedError, _StepCounter, child_environment, execute, is_complete, marker
from recipes._stage import RunSpec
from recipes._stage_callbacks import SaveAtEnd
from recipes.accuracy_consistency import draw_again, environments_of, plan, run, start_method
from recipes.workloads import prepare

from .conftest import POOL

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("determinism=d1_d2", "workload.batch_size=8")
GROUPS = ("workload", "schedule", "determinism", "trainer", "experiment")


def configure(*overrides):
    with initialize(version_base="1.3", config_path="../../conf"):
        return OmegaConf.to_object(compose("accuracy_consistency", overrides=list(overrides)))


@pytest.mark.parametrize(
    "override", [f"{group}={file.stem}" for group in GROUPS for file in sorted((ROOT / "conf" / group).glob("*.yaml"))]
)
def test_every_file_composes_and_can_run(override):
    assert check(configure(override))


def test_fig9_is_the_published_schedule():
    stages = check(configure("experiment=fig9"))
    assert [(s.devices, s.ests_per_executor, s.first_step, s.end_step) for s in stages] == [
        ({"v100": 4}, (1, 1, 1, 1), 0, 100),
        ({"v100": 2}, (2, 2), 100, 200),
        ({"v100": 1, "p100": 2}, (2, 1, 1), 200, 300),
    ]


def test_the_planner_splits_what_a_stage_leaves_open():
    stages = check(configure("schedule=planned"))
    assert [s.ests_per_executor for s in stages] == [(1, 1, 1, 1), (3, 1), (2, 1, 1)]
    own = check(configure("schedule.stages=[{devices: {v100: 1, t4: 1}, steps: 1, step_seconds: {v100: 1, t4: 9}}]"))
    assert own[0].ests_per_executor == (3, 1)
    small = check(configure("schedule=planned", "+schedule.max_ests={v100: 2}"))
    assert [s.ests_per_executor for s in small] == [(1, 1, 1, 1), (2, 2), (2, 1, 1)]


def test_default_split_is_even_and_max_steps_ends_the_schedule_early():
    stages = check(
        configure("schedule.stages=[{devices: {v100: 1, p100: 2}, steps: 10}, {devices: {v100: 3}, steps: 9}]")
    )
    assert stages[0].ests_per_executor == (2, 1, 1)
    assert [s.end_step for s in check(configure("trainer.max_steps=150"))] == [100, 150]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.num_est=4", "Key 'num_est' not in 'ScheduleConf'"),
        ("schedule.stages=[{device: {v100: 1}, steps: 3}]", "Key 'device' not in 'StageConf'"),
        ("trainer.max_step=3", "Key 'max_step' not in 'TrainerConf'"),
        ("workload.lr=fast", "could not be converted to Float"),
        ("schedule=shrink", "Could not find 'schedule/shrink'"),
    ],
)
def test_misspelt_keys_are_named(override, message):
    with pytest.raises((ConfigCompositionException, Exception)) as caught:
        configure(override)
    chain, error = "", caught.value
    while error is not None:
        chain, error = f"{chain}\n{error}", error.__cause__
    assert message in chain


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("determinism.levels=[d3]", "`determinism.levels` has 'd3'"),
        ("jobs=0", "`jobs=0` runs nothing"),
        ("determinism.levels=[]", "at least one each"),
        ("schedule.stages=[{devices: {v100: 5}, steps: 1}]", r"`num_ests=4` cannot run on 5 devices"),
        ("schedule.stages=[{devices: {v100: 0}, steps: 1}]", "count of at least 1"),
        ("schedule.stages=[{devices: {v100: 1}, steps: 0}]", "trains nothing"),
        (
            "schedule.stages=[{devices: {v100: 2}, steps: 1, ests_per_device: {v100: 1}}]",
            r"ESTs per device \[1, 1\] add up to 2, but `schedule.num_ests=4`",
        ),
        (
            "schedule.stages=[{devices: {v100: 2}, steps: 1, ests_per_device: {p100: 2}}]",
            r"names \['p100'\] and `devices` \['v100'\]",
        ),
        (
            "schedule.stages=[{devices: {p100: 1}, steps: 1, step_seconds: {v100: 1.0}}]",
            r"stages\[0\]`: `step_seconds` has no time for device type `p100`",
        ),
        (
            "schedule.stages=[{devices: {v100: 2}, steps: 1, hosts: [{v100: 1}]}]",
            r"hosts=\[\{'v100': 1\}\]` does not spread `devices=\{'v100': 2\}`",
        ),
        ("trainer.max_steps=301", "goes past the schedule's 300 steps"),
        ("trainer.max_steps=0", "trains nothing"),
        ("pool=[v100,h200]", r"`pool=\['v100', 'h200'\]` lacks 'p100' of the stages"),
    ],
)
def test_stages_that_cannot_run_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        check(configure(override))


def test_promises_are_those_of_the_paper():
    stages = check(configure())
    promised = {level: [_report.is_promised(level, stages, i) for i in range(3)] for level in ("d0", "d1", "d0+d2")}
    assert promised == {"d0": [True, False, False], "d1": [True, True, False], "d0+d2": [True, False, False]}
    assert all(_report.is_promised("d1+d2", stages, i) for i in range(3))


def write_record(directory, *, change=None, state=None, steps=(0, 9), digests=(3, 6, 9)):
    for rank in range(2):
        writer = RecordWriter(directory, rank=rank, num_ests=2)
        for step in range(*steps):
            loss = 1 / (step + 1) + rank + (change or {}).get((step, rank), 0.0)
            writer.step(step=step, batch=step, tensors={"loss": torch.tensor(loss)})
            if step + 1 in digests:
                value = torch.tensor((state or {}).get(step + 1, 0.0))
                states = {name: digest_state({"w": value}) for name in ("parameters", "buffers", "optimizer")}
                writer.digest(step=step + 1, batch=step + 1, states=states)
        writer.close()
    return Record.load(directory)


@pytest.fixture
def records(tmp_path):
    return {
        "ddp-homo": write_record(tmp_path / "ddp-homo"),
        "ddp-heter": write_record(tmp_path / "ddp-heter"),
        "d0": write_record(tmp_path / "d0", change={(4, 1): 1e-3}, state={6: 1.0, 9: 1.0}),
        "d1": write_record(tmp_path / "d1", change={(8, 0): 1e-3}, state={9: 1.0}),
        "d0+d2": write_record(tmp_path / "d0+d2", state={6: 1.0, 9: 1.0}),
        "d1+d2": write_record(tmp_path / "d1+d2"),
    }


def make_report(records):
    conf = configure("schedule=smoke")
    return _report.build(
        num_ests=2, stages=check(conf), levels=conf.determinism.levels, records=records, about={"seconds": 1.0}
    )


def test_report_tells_where_each_configuration_equals_its_reference(records):
    report = make_report(records)
    assert report["num_ests"] == 2
    assert report["stages"][2]["devices"] == {"v100": 1, "p100": 1}
    assert report["stages"][1]["ests_per_executor"] == [2]
    assert report["stages"][1]["steps"] == 3
    assert report["equal"] == {
        "d0": {"stage_0": True, "stage_1": False, "stage_2": False},
        "d1": {"stage_0": True, "stage_1": True, "stage_2": False},
        "d0+d2": {"stage_0": True, "stage_1": False, "stage_2": False},
        "d1+d2": {"stage_0": True, "stage_1": True, "stage_2": True},
    }
    assert report["promises_kept"]
    assert report["first_difference"]["d0"]["stage_1"]["step"] == 4
    assert report["first_difference"]["d0"]["stage_1"]["est"] == 1
    assert "digest of" in report["first_difference"]["d0+d2"]["stage_1"]["what"]
    assert _report.stages_of(json.loads(json.dumps(report))) == check(configure("schedule=smoke"))


def test_broken_promise_is_seen(records, tmp_path):
    broken = write_record(tmp_path / "broken", change={(5, 1): 1e-6})
    report = make_report({**records, "d1": broken})
    assert not report["promises_kept"]
    assert not report["equal"]["d1"]["stage_1"]


def test_missing_state_digest_is_no_equality(records, tmp_path):
    report = make_report({**records, "d1+d2": write_record(tmp_path / "none", digests=(3, 9))})
    assert report["equal"]["d1+d2"] == {"stage_0": True, "stage_1": False, "stage_2": True}
    assert not report["promises_kept"]


def test_figure_shows_exact_differences(records, tmp_path):
    x, y = _figure.loss_difference(records["d1"], records["ddp-homo"], 1)
    assert list(x) == list(range(9))
    assert not y.any()
    assert _figure.loss_difference(records["d0"], records["ddp-homo"], 1)[1].nonzero()[0].tolist() == [4]
    conf = configure("schedule=smoke")
    file = tmp_path / "fig9.png"
    _figure.draw(file, stages=check(conf), levels=conf.determinism.levels, records=records, title="x")
    assert file.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.filterwarnings("error")
def test_figure_of_levels_of_one_reference(records, tmp_path):
    conf = configure("schedule=smoke")
    _figure.draw(tmp_path / "fig9.png", stages=check(conf)[:2], levels=["d1+d2"], records=records, title="x")


def test_plan_hands_each_stage_to_the_next(tmp_path):
    conf = configure("determinism=d1_d2")
    runs = plan(conf, check(conf), tmp_path, tmp_path)
    assert [spec.kind for spec in runs] == ["reference", "easyscale", "easyscale", "easyscale"]
    assert runs[0].digest_at == (100, 200, 300)
    assert [spec.resume for spec in runs[1:]] == [None, runs[1].save, runs[2].save]
    assert runs[3].devices == "v100:1,p100:2"
    assert runs[3].ests_per_executor == (2, 1, 1)
    file = tmp_path / "spec.json"
    file.write_text(runs[3].dumps())
    assert RunSpec.load(file) == runs[3]


def test_run_counts_as_complete_only_as_it_was_asked_for(tmp_path):
    conf = configure("schedule=smoke", "determinism=d1")
    spec = plan(conf, check(conf), tmp_path, tmp_path)[1]
    write_record(spec.record, steps=(0, 3))
    assert not is_complete(spec)
    Path(spec.save).parent.mkdir(parents=True)
    Path(spec.save).write_bytes(b"")
    marker(spec).write_text(spec.dumps())
    assert is_complete(spec)
    assert not is_complete(replace(spec, seed=2))
    write_record(spec.record, steps=(0, 2))
    assert not is_complete(spec)


def test_progress_follows_a_growing_record(tmp_path):
    counter = _StepCounter(tmp_path / "est-00000.jsonl")
    assert counter.count() == 0
    write_record(tmp_path, steps=(0, 4))
    assert counter.count() == 4
    write_record(tmp_path, steps=(0, 2))
    assert counter.count() == 2


@pytest.mark.parametrize(
    ("emulate", "threads", "level", "types", "method"),
    [
        pytest.param(True, 1, "d1", ("v100",), "fork", marks=pytest.mark.emulation),
        pytest.param(True, 1, "d1+d2", ("v100", "p100"), "fork", marks=pytest.mark.emulation),
        pytest.param(True, 1, "d1", ("v100", "p100"), "popen", marks=pytest.mark.emulation),
        (False, 2, "d1", ("cpu",), "popen"),
        (False, 1, "d1", ("cpu",), "fork"),
    ],
)
def test_processes_are_forked_where_a_fork_may_do_all_that_a_new_one_may(emulate, threads, level, types, method):
    assert start_method(emulate, threads, types, level, types) == method


def test_a_stage_ends_early_in_a_job_whose_schedule_knows_its_whole_length(tmp_path):
    class Model(BoringModel):
        def configure_optimizers(self):
            self.known = self.trainer.max_steps
            return super().configure_optimizers()

    model, save = Model(), tmp_path / "end.ckpt"
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=9,
        callbacks=[SaveAtEnd(str(save), end_step=3, control=None)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model)
    assert model.known == 9
    assert trainer.global_step == 3
    assert torch.load(save, weights_only=True)["global_step"] == 3


def test_every_run_knows_the_length_of_the_job(tmp_path):
    conf = configure("schedule=shrink_4_2_1", "determinism=all")
    assert {spec.job_steps for spec in plan(conf, check(conf), tmp_path, tmp_path)} == {300}


@pytest.mark.emulation
def test_forked_executors_have_the_bits_of_stock_ddp(tmp_path):
    """Both in processes that their own launchers fork, as `make demo` runs them."""
    pytest.importorskip("mlxtend")
    conf = configure("schedule=smoke", *SMALL, "threads_per_est=1")
    runs = plan(conf, check(conf), tmp_path, prepare(vars(conf.workload), tmp_path / "data"))[:2]
    for number, spec in enumerate(runs):
        assert spec.start_method == "fork"
        execute(
            replace(spec, end_step=3, digest_at=(3,)),
            log=tmp_path / f"{number}.log",
            environments=environments_of(spec),
            timeout_s=200.0,
            progress=lambda done: None,
            stop=threading.Event(),
        )
    assert compare(runs[1].record, runs[0].record) is None
    assert Record.load(runs[1].record).num_ests == 2


@pytest.fixture
def forked(warm, monkeypatch):
    """The recipe in this process, its runs forked from the warm process instead of started; what it printed."""

    def execute_forked(spec, *, log, environments, timeout_s, progress, stop):
        assert all(environments[0][name] == value for name, value in pinned_environment(POOL, emulate=True).items())
        marker(spec).unlink(missing_ok=True)
        warm.start(replace(spec, start_method="popen"), log).wait(timeout_s)
        progress(spec.end_step - spec.first_step)
        marker(spec).write_text(spec.dumps())
        return 0.0

    monkeypatch.setattr("recipes.accuracy_consistency.execute", execute_forked)
    stages = "{devices: {v100: 2}, steps: 3}, {devices: {v100: 1}, steps: 3}, {devices: {v100: 1, t4: 1}, steps: 3}"
    conf = configure("schedule=smoke", f"schedule.stages=[{stages}]", *SMALL, "threads_per_est=1", "jobs=1")

    def recipe(directory):
        console = Console(file=io.StringIO(), width=200)
        return run(conf, directory, console), console.file.getvalue()

    return recipe


@pytest.fixture
def started():
    """The same from the command line, every run in processes that start anew."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("EASYSCALE_")}

    def recipe(directory):
        command = [sys.executable, "-m", "recipes.accuracy_consistency", "schedule=smoke", *SMALL]
        command.append(f"hydra.run.dir={directory}")
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=environment)
        return done.returncode, done.stdout + done.stderr

    return recipe


@pytest.mark.emulation
@pytest.mark.parametrize("how", ["forked", pytest.param("started", marks=pytest.mark.matrix)])
def test_a_few_steps_from_end_to_end(tmp_path, how, request):
    pytest.importorskip("mlxtend")
    recipe = request.getfixturevalue(how)
    status, printed = recipe(tmp_path)
    assert status == 0, printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["equal"] == {"d1+d2": {"stage_0": True, "stage_1": True, "stage_2": True}}
    assert (tmp_path / "fig9.png").exists()

    (tmp_path / "fig9.png").unlink()
    (tmp_path / "checkpoints" / "d1+d2" / "stage_2.done.json").unlink()  # as if killed in the last stage
    status, printed = recipe(tmp_path)
    assert status == 0, printed
    assert printed.count("complete already") == 3
    assert json.loads((tmp_path / "report.json").read_text())["equal"] == report["equal"]

    (tmp_path / "fig9.png").unlink()
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")  # the records are enough
    draw_again(tmp_path)
    assert (tmp_path / "fig9.png").exists()
    assert json.loads((tmp_path / "report.json").read_text())["equal"] == report["equal"]


def test_drawing_again_needs_a_report(tmp_path):
    with pytest.raises(ConfigError, match="finds no report"):
        draw_again(tmp_path)


def test_failed_run_shows_the_end_of_its_log_and_is_not_complete(tmp_path):
    conf = configure("schedule=smoke", "determinism=d1", "workload.model=nonsense")
    spec = plan(conf, check(conf), tmp_path, tmp_path)[1]
    marker(spec).parent.mkdir(parents=True)
    marker(spec).write_text(spec.dumps())
    arguments = {"timeout_s": 100.0, "progress": lambda done: None, "stop": threading.Event()}
    environment = child_environment(dict(os.environ))
    with pytest.raises(RunFailedError, match=r"(?s)ended with status 1; its log is .*`workload.model=nonsense`"):
        execute(spec, log=tmp_path / "log" / "x.log", environments=[environment], **arguments)
    assert not marker(spec).exists()
    with pytest.raises(RunFailedError, match="has not ended after 1 s"):
        execute(spec, log=tmp_path / "log" / "x.log", environments=[environment], **{**arguments, "timeout_s": 1.0})
