"""A schedule of stages on one live job, and what each change of devices costs.

``python -m recipes.elastic`` runs the reference (stock ``Trainer(strategy="ddp")`` on as many workers as there are
ESTs), then one job under the supervisor that moves from stage to stage while it trains: after so many steps, or after
so many seconds. ``elastic=relaunch`` changes devices by a checkpoint and new processes; with ``elastic=in_place``
executors whose devices stay keep their processes. A stage given by steps is left at the first step that all ESTs agree
on after it (in place: after its newcomers are ready, too). Into ``hydra.run.dir`` go ``report.json``, ``timeline.png``
and the run records. Exit status 1 if a bit differs from the reference that should not.
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional  # noqa: UP035  OmegaConf reads these at run time

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_easyscale import determinism, devices
from lightning_easyscale.compare import compare
from lightning_easyscale.planning import plan
from lightning_easyscale.record import Record

from ._config import ConfigError, TrainerConf, WorkloadConf
from ._console import errors_as_lines, make_console
from ._elastic_run import ElasticRun
from ._machine import device_name
from ._runs import RunFailedError, child_environment, execute, is_complete
from ._schedules import LiveStage, check_stages, random_stages
from ._stage import RunSpec
from ._timeline import Span, draw, plain, read_spans
from .workloads import prepare


@dataclass
class LiveStageConf:
    """See `LiveStage`."""

    devices: Dict[str, int] = MISSING  # noqa: UP006
    steps: Optional[int] = None  # noqa: UP045
    seconds: Optional[float] = None  # noqa: UP045


@dataclass
class LiveScheduleConf:
    """N and the stages, or how to draw them.

    Args:
        num_ests: N.
        stages: one after another; the last lasts to the end.
        random_stages: draw so many stages instead, from `seed`.
        random_types: device types to draw from.
        random_steps: least and most steps of a drawn stage.
        step_seconds: device type -> seconds of one EST's step, from which the planner splits the ESTs of every stage;
            default: all types are equally fast, which gives an even split.
    """

    num_ests: int = MISSING
    stages: List[LiveStageConf] = field(default_factory=list)  # noqa: UP006
    random_stages: int = 0
    random_types: List[str] = field(default_factory=lambda: ["v100", "p100", "t4"])  # noqa: UP006
    random_steps: List[int] = field(default_factory=lambda: [5, 30])  # noqa: UP006
    step_seconds: Dict[str, float] = field(default_factory=dict)  # noqa: UP006


@dataclass
class ElasticConf:
    """The configuration.

    Args:
        workload: group.
        live_schedule: group.
        trainer: group.
        elastic: ``relaunch`` or ``in_place``.
        level: ``d1`` (one device type) or ``d1+d2``.
        max_steps: optimizer steps of the job.
        seed: of training and of random schedules.
        emulate: whether device types are emulated on the CPU.
        pause_s: seconds an EST sleeps in each micro-batch, so that stages by time last.
        timeout_s: longest time of the reference, in seconds.
    """

    workload: WorkloadConf = field(default_factory=WorkloadConf)
    live_schedule: LiveScheduleConf = field(default_factory=LiveScheduleConf)
    trainer: TrainerConf = field(default_factory=TrainerConf)
    elastic: str = "relaunch"
    level: str = "d1+d2"
    max_steps: int = 90
    seed: int = 1
    emulate: bool = True
    pause_s: float = 0.0
    timeout_s: float = 1800.0


ConfigStore.instance().store(name="elastic_schema", node=ElasticConf)


def stages_of(conf: ElasticConf) -> list[LiveStage]:
    """The stages of a configuration, checked.

    Raises:
        ConfigError: for what cannot run.
    """
    if conf.elastic not in ("relaunch", "in_place"):
        raise ConfigError(f"`elastic={conf.elastic}` is unknown. HINT: use `elastic=relaunch` or `elastic=in_place`.")
    if conf.level not in ("d1", "d1+d2"):
        raise ConfigError(f"`level={conf.level}` promises nothing over a change of devices. HINT: `d1` or `d1+d2`.")
    schedule = conf.live_schedule
    if schedule.random_stages:
        least, most = schedule.random_steps
        stages = random_stages(
            conf.seed,
            num_ests=schedule.num_ests,
            types=schedule.random_types,
            count=schedule.random_stages,
            steps=(least, most),
        )
    else:
        stages = [LiveStage(dict(s.devices), s.steps, s.seconds) for s in schedule.stages]
    stages = check_stages(stages, schedule.num_ests)
    if schedule.step_seconds:
        for stage in stages:  # a type without a time fails here, not in the middle of the job
            plan(schedule.num_ests, stage.devices, schedule.step_seconds, use_every_device=True)
    names = {name for stage in stages for name in stage.devices}
    if conf.level == "d1" and len(names) > 1:
        raise ConfigError(f"`level=d1` holds for one device type, and the stages have {sorted(names)}. HINT: `d1+d2`.")
    return stages


def make_spec(conf: ElasticConf, stages: list[LiveStage], directory: Path, data: Path, *, reference: bool) -> RunSpec:
    """The reference run, or the job."""
    pool = tuple(dict.fromkeys(name for stage in stages for name in stage.devices))
    num_ests = conf.live_schedule.num_ests
    home = directory / ("reference" if reference else "job")
    return RunSpec(
        kind="reference" if reference else "easyscale",
        name="stock DDP" if reference else "the job",
        level=conf.level,
        num_ests=num_ests,
        devices=f"{pool[0]}:{num_ests}" if reference else stages[0].text,
        ests_per_executor=(),
        pool=pool,
        emulate=conf.emulate,
        threads=determinism.default_threads(num_ests),
        seed=conf.seed,
        first_step=0,
        end_step=conf.max_steps,
        digest_at=(conf.max_steps,),
        record=str(home / "record"),
        save=str(home / "end.ckpt"),
        resume=None,
        data=str(data),
        workload=vars(conf.workload),
        trainer={key: value for key, value in vars(conf.trainer).items() if key != "max_steps"},
        pace=() if reference or not conf.pause_s else ((0, (conf.pause_s,) * num_ests),),
        step_seconds=conf.live_schedule.step_seconds or None,
    )


class Conductor:
    """Moves a job from stage to stage.

    Args:
        stages: the schedule; the job starts on the first one's devices.
    """

    def __init__(self, stages: list[LiveStage]) -> None:
        self.stages = stages

    def __call__(self, run: ElasticRun) -> None:
        """Follow the schedule until it or the job ends."""
        end = 0
        for stage, following in zip(self.stages, self.stages[1:], strict=False):
            run.trained(1)
            if stage.steps is not None:
                end = end + stage.steps
                run.trained_to(end)
            else:
                run.pause(stage.seconds or 0.0)
                end = run.status()["step"]
            stages = run.status()["stages"]
            while not run.resize(following.text):
                run.pause(0.2)  # an executor was told to end at the same moment
            while run.status()["stages"] == stages:
                run.pause(0.05)  # in place, training goes on until newcomers are ready


def reference_environment(spec: RunSpec) -> dict[str, str]:
    """The environment of the reference's first process."""
    if spec.level.endswith("d2"):
        special = devices.pinned_environment(spec.pool, emulate=spec.emulate)
    else:
        special = devices.environment_of(spec.pool[0], emulate=spec.emulate)
    return child_environment(devices.apply_environment(special))


def run(conf: ElasticConf, directory: Path, console: Console) -> dict[str, Any]:
    """The experiment; returns the report."""
    stages = stages_of(conf)
    data = prepare(vars(conf.workload), directory / "data")
    reference = make_spec(conf, stages, directory, data, reference=True)
    job = make_spec(conf, stages, directory, data, reference=False)
    if not is_complete(reference):
        console.print("reference: stock DDP")
        execute(
            reference,
            log=directory / "reference.log",
            environments=[reference_environment(reference)],
            timeout_s=conf.timeout_s,
            progress=lambda _: None,
            stop=threading.Event(),
        )
    os.environ.update(child_environment({**os.environ, devices.EMULATE_VARIABLE: str(int(conf.emulate))}))
    live = ElasticRun(
        job,
        directory / "job" / "elastic",
        stages[0].text,
        tell=lambda line: console.print(line, highlight=False),
        in_place=conf.elastic == "in_place",
    )
    began, started = time.monotonic(), time.gmtime()
    state = live.run(Conductor(stages))
    seconds = time.monotonic() - began
    difference = compare(reference.record, job.record)
    spans = read_spans(live.folder.events, conf.max_steps)
    record = Record.load(job.record)
    report = {
        "bits_equal": difference is None,
        "difference": str(difference) if difference is not None else None,
        "elastic": conf.elastic,
        "stages": plain(spans),
        "seconds": round(seconds, 2),
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", started),
        "machine": {"device": device_name(not conf.emulate and torch.cuda.is_available()), "cpus": os.cpu_count()},
        "steps_redone": state["steps_redone"],
        "num_ests": record.num_ests,
        "fingerprint": record.ests[0].events[0]["data"]["fingerprint"],
    }
    (directory / "report.json").write_text(json.dumps(report, indent=1))
    title = f"{conf.workload.name}, {record.num_ests} ESTs, elastic={conf.elastic}"
    draw(directory / "timeline.png", spans=spans, record=record, reference=Record.load(reference.record), title=title)
    console.print(_table(spans))
    console.print(f"against stock DDP: {difference or 'bitwise equal'}", highlight=False)
    return report


def _table(spans: list[Span]) -> Table:
    table = Table("devices", "steps", "paused s", "to boundary s", "save s", "form s", "first step s")
    for span in spans:
        parts = (span.paused_s, span.boundary_s, span.saving_s, span.forming_s, span.stepping_s)
        table.add_row(span.devices, f"{span.first_step}..{span.end_step}", *(f"{part:.2f}" for part in parts))
    return table


@hydra.main(version_base="1.3", config_path="../conf", config_name="elastic")
def main(config: DictConfig) -> None:
    """Command line."""
    console = make_console()
    conf = OmegaConf.to_object(config)
    assert isinstance(conf, ElasticConf)
    directory = Path(HydraConfig.get().runtime.output_dir).resolve()
    with errors_as_lines(console, RunFailedError):
        report = run(conf, directory, console)
    console.print(f"report: {directory / 'report.json'}\nfigure: {directory / 'timeline.png'}")
    if not report["bits_equal"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
