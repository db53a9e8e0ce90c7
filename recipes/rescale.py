"""What a change of devices costs: in place, by relaunch, and under torchrun, measured in one run.

``python -m recipes.rescale`` runs one and the same job, an elastic schedule such as 4 -> 2 -> 3 executors, again and
again in each way, the ways taking turns. Each change is taken apart: from the notice to the step at which all ESTs stop
(they train until then), until the snapshot is committed, until the executors are connected again, until the first step
is done. ``paused`` is the last three together. Into ``hydra.run.dir`` go ``rescale.json`` (every change, min, median,
max, and ratios of the medians) and the jobs' logs.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, List  # noqa: UP035  OmegaConf reads these at run time

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_easyscale import determinism, devices
from lightning_easyscale.record import Record

from ._agents import run_under_agents
from ._config import ConfigError, TrainerConf, WorkloadConf
from ._console import errors_as_lines, make_console
from ._elastic_run import ElasticRun
from ._machine import device_name
from ._runs import RunFailedError, child_environment
from ._schedules import LiveStage
from ._stage import RunSpec
from ._timeline import Span, read_spans
from .elastic import Conductor
from .workloads import prepare

WAYS = ("in_place", "relaunch", "torchrun")
_PARTS = ("boundary_s", "saving_s", "forming_s", "stepping_s")
_NEVER = 1_000_000  # steps; a job ends when it is told to


@dataclass
class RescaleConf:
    """The configuration.

    Args:
        workload: group.
        trainer: group.
        ways: of `WAYS`; ratios are taken to the first.
        num_ests: N.
        counts: executors of each stage.
        cycles: how often a job goes through `counts`.
        steps: least optimizer steps of a stage.
        repeats: jobs in each way.
        pause_s: seconds an EST sleeps in each micro-batch.
        seed: of training.
        device: ``cpu``, or a type of this machine's GPUs; then `counts` may not exceed their number.
        timeout_s: longest time of a job, in seconds.
    """

    workload: WorkloadConf = field(default_factory=WorkloadConf)
    trainer: TrainerConf = field(default_factory=TrainerConf)
    ways: List[str] = field(default_factory=lambda: list(WAYS))  # noqa: UP006
    num_ests: int = 4
    counts: List[int] = field(default_factory=lambda: [4, 2, 3])  # noqa: UP006
    cycles: int = 2
    steps: int = 4
    repeats: int = 1
    pause_s: float = 0.0
    seed: int = 1
    device: str = "cpu"
    timeout_s: float = 600.0


ConfigStore.instance().store(name="rescale_schema", node=RescaleConf)


def check(conf: RescaleConf) -> None:
    """Refuse what cannot run.

    Raises:
        ConfigError: with the key, its value and the cure.
    """
    if unknown := set(conf.ways) - set(WAYS):
        raise ConfigError(f"`ways` has {sorted(unknown)[0]!r}. HINT: there are {', '.join(WAYS)}.")
    cycle = list(conf.counts)
    if len(cycle) < 2 or min(cycle) < 1 or max(cycle) > conf.num_ests:
        raise ConfigError(f"`counts={cycle}` must be two or more numbers in 1..{conf.num_ests}, `num_ests`.")
    if any(a == b for a, b in zip(cycle, cycle[1:], strict=False)) or (conf.cycles > 1 and cycle[0] == cycle[-1]):
        raise ConfigError(f"`counts={cycle}` changes nothing somewhere. HINT: neighbours must differ.")


def make_spec(conf: RescaleConf, directory: Path, data: Path) -> RunSpec:
    """The job, whose files go to `directory`."""
    return RunSpec(
        kind="easyscale",
        name="rescale",
        level="d1",
        num_ests=conf.num_ests,
        devices=f"{conf.device}:{conf.counts[0]}",
        ests_per_executor=(),
        pool=(conf.device,),
        emulate=False,
        threads=determinism.default_threads(conf.num_ests),
        seed=conf.seed,
        first_step=0,
        end_step=_NEVER,
        digest_at=(),
        record=str(directory / "record"),
        save=str(directory / "end.ckpt"),
        resume=None,
        data=str(data),
        workload=vars(conf.workload),
        trainer={key: value for key, value in vars(conf.trainer).items() if key != "max_steps"},
        pace=((0, (conf.pause_s,) * conf.num_ests),) if conf.pause_s else (),
        control=str(directory / "end"),
    )


def run_job(conf: RescaleConf, way: str, directory: Path, data: Path, console: Console) -> list[Span]:
    """Run the job once in one way; returns its stages."""
    directory.mkdir(parents=True)
    spec = make_spec(conf, directory, data)
    counts = list(conf.counts) * conf.cycles
    if way == "torchrun":
        one = replace(spec, devices=f"{conf.device}:1")
        events = run_under_agents(one, directory / "job", counts, steps=conf.steps, timeout_s=conf.timeout_s)
        return read_spans(events, _NEVER)
    stages = [LiveStage({conf.device: count}, steps=conf.steps) for count in counts]
    live = ElasticRun(
        spec,
        directory / "job",
        stages[0].text,
        tell=lambda line: console.print(f"  {line}", style="dim", highlight=False, markup=False),
        in_place=way == "in_place",
        timeout_s=conf.timeout_s,
    )

    def conduct(job: ElasticRun) -> None:
        Conductor(stages)(job)
        job.trained(conf.steps)
        Path(spec.control or "").touch()

    live.run(conduct)
    return read_spans(live.folder.events, _NEVER)


def changes_of(spans: list[Span]) -> list[dict[str, Any]]:
    """Every change of devices and what it cost."""
    found = []
    for before, after in zip(spans, spans[1:], strict=False):
        parts = {name: getattr(after, name) for name in _PARTS}
        paused = after.paused_s - after.boundary_s
        found.append({"change": f"{len(before.types)} -> {len(after.types)}", "paused_s": paused, **parts})
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Part -> min, median and max."""
    return {
        part: {
            name: round(function([row[part] for row in rows]), 3)
            for name, function in (("min", min), ("median", statistics.median), ("max", max))
        }
        for part in ("paused_s", *_PARTS)
    }


def run(conf: RescaleConf, directory: Path, console: Console) -> dict[str, Any]:
    """The benchmark; returns the report."""
    check(conf)
    data = prepare(vars(conf.workload), directory / "data")
    os.environ.update(child_environment({**os.environ, devices.EMULATE_VARIABLE: "0"}))
    started, rows = time.gmtime(), {way: [] for way in conf.ways}  # type: dict[str, list[dict[str, Any]]]
    for repeat in range(conf.repeats):
        for way in conf.ways:
            console.print(f"job {repeat}, {way}", highlight=False)
            home = directory / f"{way}_{repeat}"
            rows[way] += changes_of(run_job(conf, way, home, data, console))
    record = Record.load(directory / f"{conf.ways[0]}_0" / "record")
    ways = {}
    for way, found in rows.items():
        names = dict.fromkeys(row["change"] for row in found)
        ways[way] = {name: summary([row for row in found if row["change"] == name]) for name in names}
        ways[way]["all"] = summary(found)
    first = ways[conf.ways[0]]["all"]["paused_s"]["median"]
    report = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", started),
        "machine": {"device": device_name(conf.device != "cpu"), "cpus": os.cpu_count(), "load": os.getloadavg()},
        "fingerprint": record.ests[0].events[0]["data"]["fingerprint"],
        "configuration": asdict(conf),
        "ways": ways,
        "ratio_of_medians": {way: round(ways[way]["all"]["paused_s"]["median"] / first, 2) for way in ways},
        "changes": {way: [_rounded(row) for row in found] for way, found in rows.items()},
    }
    (directory / "rescale.json").write_text(json.dumps(report, indent=1) + "\n")
    console.print(_table(ways))
    console.print(f"medians against {conf.ways[0]}: {report['ratio_of_medians']}", highlight=False)
    return report


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}


def _table(ways: dict[str, Any]) -> Table:
    table = Table("way", "change", "paused s: min", "median", "max", "to boundary", "save", "form", "first step")
    for way, changes in ways.items():
        for name, parts in changes.items():
            paused = [f"{parts['paused_s'][key]:.2f}" for key in ("min", "median", "max")]
            table.add_row(way, name, *paused, *(f"{parts[part]['median']:.2f}" for part in _PARTS))
    return table


@hydra.main(version_base="1.3", config_path="../conf", config_name="rescale")
def main(config: DictConfig) -> None:
    """Command line."""
    console = make_console()
    conf = OmegaConf.to_object(config)
    assert isinstance(conf, RescaleConf)
    directory = Path(HydraConfig.get().runtime.output_dir).resolve()
    with errors_as_lines(console, RunFailedError):
        run(conf, directory, console)
    console.print(f"report: {directory / 'rescale.json'}")


if __name__ == "__main__":
    main()
