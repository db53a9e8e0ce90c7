"""Fig. 9: training that moves between devices gives the bits of stock DDP.

``python -m recipes.accuracy_consistency`` runs the two references (stock ``Trainer(strategy="ddp")`` with deterministic
kernels, and the same under the D2 policy), then every EasyScale configuration through all stages of the schedule. Each
stage runs in fresh processes and hands over by an on-demand checkpoint in the middle of an epoch. Into
``hydra.run.dir`` go ``report.json``, ``fig9.png``, the run records, checkpoints and logs; a table says where each
configuration equals its reference. The exit status is 1 if a promised equality fails, 2 if the configuration cannot
run.

What has been run is not run again: start the same command once more after an interruption, or with ``plot_only=true``
to draw anew, or with ``force=true`` to run all of it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lightning_easyscale import determinism, devices
from lightning_easyscale.record import Record

from . import _figure, _report
from ._config import AccuracyConsistencyConf, ConfigError, Stage, check, name_gpu, register
from ._console import errors_as_lines, make_console
from ._runs import RunFailedError, child_environment, execute, is_complete
from ._stage import RunSpec
from .workloads import prepare

register()

_ABOUT = ("seed", "workload", "threads_per_est", "cpu_count", "seconds")


def plan(conf: AccuracyConsistencyConf, stages: list[Stage], directory: Path, data: Path) -> list[RunSpec]:
    """All runs of the experiment in order: the references that the levels need, then each level's stages."""
    types = tuple(dict.fromkeys(name for stage in stages for name in stage.devices))
    pool = tuple(conf.pool or types)
    gpus = [name for name in types if devices.device_type(name, emulate=conf.emulate).kind == "cuda"]
    threads = conf.threads_per_est or determinism.default_threads(conf.schedule.num_ests)
    ends = tuple(stage.end_step for stage in stages)
    common: dict[str, Any] = {
        "num_ests": conf.schedule.num_ests,
        "pool": pool,
        "emulate": conf.emulate,
        "threads": threads,
        "seed": conf.seed,
        "job_steps": ends[-1],
        "data": str(data),
        "workload": vars(conf.workload),
        "trainer": {key: value for key, value in vars(conf.trainer).items() if key != "max_steps"},
        # With GPUs the reference is stock DDP over gloo: NCCL's order is no fixed one, and its ranks share no device.
        "reduction": "ddp" if gpus and conf.reduction == "auto" else conf.reduction,
        "process_group_backend": conf.process_group_backend or ("gloo" if gpus else None),
    }
    runs = []

    def method(level: str, types: tuple[str, ...]) -> Literal["fork", "popen"]:
        # Even to look at a GPU takes a CUDA context, which a forked process cannot have.
        return "popen" if gpus else start_method(conf.emulate, threads, pool, level, types)

    levels = list(dict.fromkeys(conf.determinism.levels))
    for reference in dict.fromkeys(map(_report.reference_of, levels)):
        level = "d1+d2" if reference == "ddp-heter" else "d1"
        runs.append(
            RunSpec(
                kind="reference",
                name=_report.REFERENCES[reference],
                level=level,
                devices=f"{types[0]}:{conf.schedule.num_ests}",
                hosts=_shared(types[0], conf.schedule.num_ests) if types[0] in gpus else (),
                ests_per_executor=(1,) * conf.schedule.num_ests,
                first_step=0,
                end_step=ends[-1],
                digest_at=ends,
                record=str(directory / "records" / reference),
                save=str(directory / "checkpoints" / reference / "end.ckpt"),
                resume=None,
                start_method=method(level, types[:1]),
                **common,
            )
        )
    for level in levels:
        resume = None
        for stage in stages:
            save = directory / "checkpoints" / level / f"{stage.key}.ckpt"
            runs.append(
                RunSpec(
                    kind="easyscale",
                    name=f"{level.upper()} {stage.key} ({stage.label})",
                    level=level,
                    devices=_as_text(stage.devices),
                    hosts=tuple(map(_as_text, stage.hosts)),
                    ests_per_executor=stage.ests_per_executor,
                    first_step=stage.first_step,
                    end_step=stage.end_step,
                    digest_at=(stage.end_step,),
                    record=str(directory / "records" / level),
                    save=str(save),
                    resume=resume,
                    start_method=method(level, tuple(stage.devices)) if not stage.hosts else "popen",
                    **common,
                )
            )
            resume = str(save)
    return runs


def start_method(
    emulate: bool, threads: int, pool: tuple[str, ...], level: str, types: tuple[str, ...]
) -> Literal["fork", "popen"]:
    """How a run on CPU devices of these types gets from its first process to all of them.

    To import torch and Lightning takes a process longer than to train a short stage. A fork has imported them, but it
    can have neither its parent's pool of OpenMP threads nor an instruction set of its own.
    """
    environments = [devices.environment_of(name, emulate=emulate) for name in types]
    alike = _is_pinned(level, pool, emulate) or all(environment == environments[0] for environment in environments)
    return "fork" if alike and threads == 1 else "popen"


def _is_pinned(level: str, pool: tuple[str, ...], emulate: bool) -> bool:
    """Whether one environment is that of all processes, whatever the type of their device."""
    return level.endswith("d2") and devices.d2_policy(pool, emulate=emulate) == "pinned"


def _shared(gpu: str, workers: int) -> tuple[str, ...]:
    """Hosts of a device each for a reference's workers; none where this machine has a GPU for every worker."""
    present = sum(found.name == gpu for found in devices.detect())
    return (f"{gpu}:1",) * workers if present < workers else ()


def _as_text(counts: dict[str, int]) -> str:
    return ",".join(f"{name}:{count}" for name, count in counts.items())


def environments_of(spec: RunSpec) -> list[dict[str, str]]:
    """The environment of a run's first process on each host, so that it need not start itself again."""
    if _is_pinned(spec.level, spec.pool, spec.emulate):
        special = [devices.pinned_environment(spec.pool, emulate=spec.emulate)] * max(len(spec.hosts), 1)
    else:
        first_types = [text.partition(":")[0] for text in spec.hosts or (spec.devices,)]
        special = [devices.environment_of(name, emulate=spec.emulate) for name in first_types]
    return [child_environment(devices.apply_environment(variables)) for variables in special]


def execute_all(conf: AccuracyConsistencyConf, runs: list[RunSpec], directory: Path, console: Console) -> float:
    """Run what is not there yet; returns the seconds it took.

    Runs that write to one record follow each other; of the other chains, ``jobs`` go on at a time: most of a short
    stage is waiting for processes to start.
    """
    began = time.monotonic()
    chains: dict[str, list[tuple[int, RunSpec]]] = {}
    for number, spec in enumerate(runs):
        chains.setdefault(spec.record, []).append((number, spec))
    stop = threading.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars, ThreadPoolExecutor(conf.jobs) as pool:
        total = bars.add_task("all runs", total=sum(spec.end_step - spec.first_step for spec in runs))
        done = [pool.submit(_execute_chain, conf, chain, directory, bars, total, stop) for chain in chains.values()]
        try:
            for future in as_completed(done):
                future.result()
        except BaseException:
            stop.set()  # the other chains end their processes; what is complete stays
            pool.shutdown(cancel_futures=True)
            raise
    return time.monotonic() - began


def _execute_chain(
    conf: AccuracyConsistencyConf,
    chain: list[tuple[int, RunSpec]],
    directory: Path,
    bars: Progress,
    total: TaskID,
    stop: threading.Event,
) -> None:
    """Run what is missing of one record, from the first missing run on: what follows a rewritten run is stale."""
    stale = conf.force
    for number, spec in chain:
        steps = spec.end_step - spec.first_step
        if not stale and is_complete(spec):
            bars.advance(total, steps)
            bars.console.print(f"{spec.name}: complete already")
            continue
        stale = True
        bar = bars.add_task(spec.name, total=steps)
        shown = 0

        def show(done: int, bar: TaskID = bar) -> None:
            nonlocal shown
            bars.advance(total, done - shown)
            bars.update(bar, completed=done)
            shown = done

        seconds = execute(
            spec,
            log=directory / "logs" / f"{number:02d}.log",
            environments=environments_of(spec),
            timeout_s=conf.timeout_s,
            progress=show,
            stop=stop,
        )
        bars.remove_task(bar)
        bars.console.print(f"{spec.name}: {steps} steps in {seconds:.1f} s")


def conclude(stages: list[Stage], levels: list[str], directory: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Compare the records below ``directory``, write ``report.json`` and draw ``fig9.png``; returns the report."""
    names = [*levels, *dict.fromkeys(map(_report.reference_of, levels))]
    records = {name: Record.load(directory / "records" / name) for name in names}
    num_ests = records[levels[0]].num_ests
    report = _report.build(num_ests=num_ests, stages=stages, levels=levels, records=records, about=about)
    _report.write(report, directory / "report.json")
    title = f"{about['workload']['name']}, {num_ests} ESTs, batch {about['workload']['batch_size']} each"
    _figure.draw(directory / "fig9.png", stages=stages, levels=levels, records=records, title=title)
    return report


def draw_again(directory: Path) -> tuple[dict[str, Any], list[Stage]]:
    """Table and figure from the records of a run that has ended, whatever the configuration says now.

    Raises:
        ConfigError: if there is no report.
    """
    file = directory / "report.json"
    if not file.exists():
        raise ConfigError(f"`plot_only=true` finds no report in {directory}. HINT: say hydra.run.dir=<that of a run>.")
    old = json.loads(file.read_text())
    stages = _report.stages_of(old)
    return conclude(stages, list(old["equal"]), directory, {key: old[key] for key in _ABOUT}), stages


def run(conf: AccuracyConsistencyConf, directory: Path, console: Console) -> int:
    """The experiment; returns the exit status."""
    if conf.plot_only:
        report, stages = draw_again(directory)
    else:
        name_gpu(conf)
        stages = check(conf)
        console.print(
            f"[bold]accuracy consistency[/]: {conf.workload.name}, {conf.schedule.num_ests} ESTs, {directory}"
        )
        runs = plan(conf, stages, directory, prepare(vars(conf.workload), directory / "data"))
        seconds = round(execute_all(conf, runs, directory, console), 1)
        facts = (conf.seed, vars(conf.workload), runs[0].threads, os.cpu_count(), seconds)
        levels = list(dict.fromkeys(conf.determinism.levels))
        report = conclude(stages, levels, directory, dict(zip(_ABOUT, facts, strict=True)))
    console.print(_report.table(report, stages))
    console.print(f"report: {directory / 'report.json'}\nfigure: {directory / 'fig9.png'}")
    if not report["promises_kept"]:
        console.print("[bold red]A promised equality does not hold.[/] To see the bits, run")
        console.print(f"python -m lightning_easyscale.compare A B, with A and B of {directory / 'records'}.")
    return 0 if report["promises_kept"] else 1


@hydra.main(version_base="1.3", config_path="../conf", config_name="accuracy_consistency")
def main(config: DictConfig) -> None:
    """Command line."""
    console = make_console()
    conf = OmegaConf.to_object(config)
    assert isinstance(conf, AccuracyConsistencyConf)
    directory = Path(HydraConfig.get().runtime.output_dir).resolve()
    with errors_as_lines(console, RunFailedError, resume=f"hydra.run.dir={directory}"):
        status = run(conf, directory, console)
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    main()
