"""A small live cluster: real EasyScale jobs under the inter-job scheduler, against the simulator's prediction.

Devices are emulated and paced: an EST sleeps in its mini-batch for as long as its device type is slow, so that jobs
do not fight for cores. First the jobs' speeds are measured (`recipes.profile`), then what a start and a rescale cost.
The simulator predicts every job's completion time from those; then the same jobs run for real, submitted over time and
moved by relaunch whenever the policy says so. At the end each job is compared, bit for bit, with stock DDP that nobody
disturbed.

Into ``hydra.run.dir`` go ``cluster.json``, ``jct.png``, Gantt views of both and, per job, its records and logs. The
exit status is 1 if a job's bits differ.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_easyscale.compare import compare
from lightning_easyscale.devices import parse_devices
from lightning_easyscale.planning import Profile
from lightning_easyscale.simulation import (
    ClusterSpec,
    Costs,
    Engine,
    JobRecord,
    JobSpec,
    Result,
    build_jobs,
    make_policy,
)

from ._console import errors_as_lines, make_console
from ._live import LiveCluster, LiveJob, stage_of
from ._live_config import LiveConf, check, draw_trace, register
from ._live_figures import draw
from ._profile_config import ExchangeConf, ProfileConf, read_pace
from ._profile_runs import Measurer
from ._runs import RunFailedError
from ._stage import RunSpec
from ._stage_callbacks import read_report
from .profile import measure
from .workloads import prepare

register()


class LiveExperiment:
    """Everything that the parts share.

    Args:
        conf: the configuration.
        directory: of the run.
        console: for progress.
    """

    def __init__(self, conf: LiveConf, directory: Path, console: Console) -> None:
        self.conf, self.directory, self.console = conf, directory, console
        self.types = dict(Counter(parse_devices(conf.devices, emulate=True)))
        self.capacity = tuple(self.types.values())
        self.policy = conf.policy.names[0]
        self.trace = draw_trace(conf, self.types)
        self.profiling = ProfileConf(
            workload=conf.workload,
            file=conf.profile or str(directory / "profile.json"),
            devices=conf.devices,
            num_ests=sorted({job.max_ests for job in self.trace}),
            levels=sorted({"d1+d2" if job.d2 else "d1" for job in self.trace}),
            steps=conf.profile_steps,
            warmup=2,
            pace=conf.pace,
            exchange=ExchangeConf([], [], 1, ""),
        )
        self.data = prepare(vars(conf.workload), directory / "data")

    def base(self, spec: JobSpec) -> RunSpec:
        """The stage that a job's stages are made from."""
        home = self.directory / "jobs" / spec.name
        pace = read_pace(self.conf.pace)
        return RunSpec(
            kind="easyscale",
            name=spec.name,
            level="d1+d2" if spec.d2 else "d1",
            num_ests=spec.max_ests,
            devices=f"{spec.preferred}:{spec.max_ests}",
            ests_per_executor=(1,) * spec.max_ests,
            pool=tuple(self.types) if spec.d2 else (spec.preferred,),
            emulate=True,
            threads=1,
            seed=self.conf.seed,
            first_step=0,
            end_step=int(spec.steps),
            digest_at=(int(spec.steps),),
            record=str(home / "record"),
            save=str(home / "end.ckpt"),
            resume=None,
            data=str(self.data),
            workload=vars(self.conf.workload),
            trainer={"limit_val_batches": 0},
            pace=((0, tuple(pace.get(name, 0.0) for name in self.types)),),
        )

    def calibrate(self, measurer: Measurer, profile: Profile) -> Costs:
        """Seconds without progress of a start (with its end) and of a rescale, medians of a few."""
        first = next(iter(self.types))
        job = JobSpec("calibration", 0.0, self.conf.workload.name, 2, 12, self.conf.workload.batch_size, True, first)
        base = self.base(job)
        seconds = dict.fromkeys(self.types, 1.0)
        starts, rescales = [], []
        warm = measurer.warm(base.level, first)
        one = tuple(int(name == first) for name in self.types)
        for number in range(self.conf.calibrations):
            part = replace(base, record=str(self.directory / "calibration" / str(number) / "record"))
            held = {"types": list(self.types), "counts": one, "seconds": seconds}
            before = replace(stage_of(part, 0, first_step=0, **held), end_step=6, control=None)
            after = replace(stage_of(part, 1, first_step=6, **held), control=None)
            ran = []
            for index, stage in enumerate((before, after)):
                assert stage.report is not None
                began = time.monotonic()
                warm.start(stage, Path(part.record).parent / f"log_{index}").wait(120)
                lines = read_report(stage.report, 0)
                ran.append((began, lines, time.monotonic()))
            (began, one_lines, _), (_, two_lines, ended) = ran
            step = median(b[1] - a[1] for a, b in zip(one_lines[1:], one_lines[2:-1], strict=False))
            starts.append(one_lines[0][1] - began + ended - (two_lines[-2][1] + step))
            rescales.append(two_lines[0][1] - (one_lines[-2][1] + step))
        start, rescale = median(starts), median(rescales)
        return Costs(start_s=start, rescale_s=rescale, resume_s=rescale)

    def predict(self, profile: Profile, costs: Costs) -> Result:
        """What the simulator says."""
        jobs = build_jobs(self.trace, tuple(self.types), profile)
        cluster = ClusterSpec(self.types, devices_per_node=sum(self.capacity))
        return Engine(cluster, jobs, make_policy(self.policy), costs=costs).run()

    def live(self, measurer: Measurer, profile: Profile, costs: Costs) -> tuple[Result, list[LiveJob]]:
        """The real thing."""
        jobs = []
        for state in build_jobs(self.trace, tuple(self.types), profile):
            base = self.base(state.spec)
            jobs.append(LiveJob(state, base, measurer.warm(base.level, state.spec.preferred)))
            jobs[-1].warm.wait_until_ready()  # what imports now would slow the first jobs
        policy = make_policy(self.policy)
        cluster = LiveCluster(tuple(self.types), self.capacity, policy, jobs, profile, costs=costs, on_event=self._say)
        cluster.run(self.conf.timeout_s)
        records = [_record(job) for job in jobs]
        makespan = max(record.finish_s for record in records)
        return Result("live", tuple(self.types), self.capacity, records, makespan), jobs

    def differences(self, measurer: Measurer, jobs: list[LiveJob]) -> dict[str, str | None]:
        """Each job against stock DDP on as many workers that ran alone: the first difference, or None."""
        found = {}
        for job in jobs:
            home = self.directory / "jobs" / job.base.name
            spec = replace(
                job.base, kind="reference", record=str(home / "reference"), save=str(home / "reference.ckpt"), pace=()
            )
            measurer.warm(spec.level, spec.pool[0]).start(spec, home / "log_reference").wait(self.conf.timeout_s)
            difference = compare(spec.record, job.base.record)
            found[job.base.name] = None if difference is None else str(difference)
        return found

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False)


def _record(job: LiveJob) -> JobRecord:
    state = job.state
    assert state.started_s is not None
    assert state.finished_s is not None
    return JobRecord(
        state.spec.name,
        state.spec.workload,
        state.spec.max_ests,
        state.spec.submit_s,
        state.started_s,
        state.finished_s,
        state.spec.steps * state.planner.seconds(state.gang()),
        state.device_seconds,
        state.rescales,
        state.preemptions,
        tuple(state.segments),
    )


def report_of(
    experiment: LiveExperiment, costs: Costs, predicted: Result, live: Result, differences: dict[str, str | None]
) -> dict[str, Any]:
    """Every job's completion time both ways, and what became of its bits."""
    rows = []
    for told, was in zip(predicted.records, live.records, strict=True):
        rows.append(
            {
                "job": was.name,
                "num_ests": was.max_ests,
                "submit_s": was.submit_s,
                "jct_live_s": was.jct_s,
                "jct_predicted_s": told.jct_s,
                "error": abs(told.jct_s / was.jct_s - 1.0),
                "rescales_live": was.rescales,
                "rescales_predicted": told.rescales,
                "devices_live": was.segments,
                "devices_predicted": told.segments,
                "difference": differences[was.name],
            }
        )
    return {
        "policy": experiment.policy,
        "cluster": experiment.types,
        "pace": experiment.conf.pace,
        "costs": asdict(costs),
        "median_error": median(row["error"] for row in rows),
        "mean_error": mean(row["error"] for row in rows),
        "largest_error": max(row["error"] for row in rows),
        "avg_jct_live_s": mean(row["jct_live_s"] for row in rows),
        "avg_jct_predicted_s": mean(row["jct_predicted_s"] for row in rows),
        "makespan_live_s": live.makespan_s,
        "makespan_predicted_s": predicted.makespan_s,
        "bits_equal": all(difference is None for difference in differences.values()),
        "jobs": rows,
    }


def table(report: dict[str, Any]) -> Table:
    """Job by job."""
    out = Table()
    out.add_column("job")
    for name in ("submitted s", "JCT live s", "predicted s", "error", "rescales live / predicted", "bits"):
        out.add_column(name, justify="right")
    for row in report["jobs"]:
        times = (f"{row[key]:.1f}" for key in ("submit_s", "jct_live_s", "jct_predicted_s"))
        moves = f"{row['rescales_live']} / {row['rescales_predicted']}"
        bits = "equal" if row["difference"] is None else "[bold red]differ[/]"
        out.add_row(row["job"], *times, f"{row['error']:.1%}", moves, bits)
    return out


def run(conf: LiveConf, directory: Path, console: Console) -> dict[str, Any]:
    """The whole experiment; returns the report."""
    experiment = LiveExperiment(conf, directory, console)
    for stale in ("jobs", "calibration"):  # of an earlier run in this directory, of which only the profile is kept
        shutil.rmtree(directory / stale, ignore_errors=True)
    profile = measure(experiment.profiling, directory / "profiling", console)
    with Measurer(experiment.profiling, directory / "profiling", experiment.data) as measurer:
        costs = experiment.calibrate(measurer, profile)
        console.print(f"a start costs {costs.start_s:.2f} s, a rescale {costs.rescale_s:.2f} s")
        predicted = experiment.predict(profile, costs)
        live, jobs = experiment.live(measurer, profile, costs)
        differences = experiment.differences(measurer, jobs)
    report = report_of(experiment, costs, predicted, live, differences)
    (directory / "cluster.json").write_text(json.dumps(report, indent=1))
    draw(directory, report, predicted, live)
    return report


@hydra.main(version_base="1.3", config_path="../conf", config_name="live")
def main(config: DictConfig) -> None:
    """Command line."""
    console = make_console()
    conf = OmegaConf.to_object(config)
    assert isinstance(conf, LiveConf)
    directory = Path(HydraConfig.get().runtime.output_dir).resolve()
    with errors_as_lines(console, RunFailedError):
        check(conf)
        report = run(conf, directory, console)
    console.print(table(report))
    console.print(
        f"median error {report['median_error']:.1%}, mean {report['mean_error']:.1%}; average JCT"
        f" {report['avg_jct_live_s']:.1f} s live, {report['avg_jct_predicted_s']:.1f} s predicted; {directory}"
    )
    if not report["bits_equal"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
