"""Random trouble, and the bits of an undisturbed stock DDP run.

``python -m recipes.soak minutes=M seed=S`` runs stock ``Trainer(strategy="ddp")`` once, then the same job under the
supervisor again and again until the time is up, by relaunch or in place. While it trains, it is resized, its executors
get SIGTERM and SIGKILL and lose loader workers: at any moment, inside accumulation windows, validations and saves, and
while they start (`_trouble.py`). The model has BatchNorm, dropout, augmentation, loader workers, accumulation, logged
metrics and a learning rate schedule; every round's run record is compared with the reference's bit for bit.

Into ``hydra.run.dir`` go ``timeline.jsonl``, a line for each event, and after each round ``report.json``: ``events``
(count by kind), ``bits_equal``, ``restarts`` (times that executors were formed anew, in place included),
``steps_redone`` (optimizer steps that were done before and had to be done again), ``samples_lost`` and
``samples_repeated`` (samples of micro-batches that the reference has and the run has not, or that the run has twice),
``failures`` (rounds that did not end). A round with equal bits leaves no other files. Exit status 1 if bits differ or a
round fails.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Union  # noqa: UP035  OmegaConf reads these at run time

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_easyscale import determinism
from lightning_easyscale.compare import compare
from lightning_easyscale.devices import apply_environment
from lightning_easyscale.record import Record, est_file, read_lines

from ._config import ConfigError, TrainerConf, WorkloadConf
from ._console import errors_as_lines, make_console
from ._elastic_run import ElasticRun
from ._machine import device_name
from ._runs import RunFailedError, child_environment, execute, is_complete
from ._stage import RunSpec
from ._trouble import ACTIONS, MOMENTS, Trouble
from .workloads import prepare


@dataclass
class SoakConf:
    """The configuration.

    Args:
        workload: group.
        trainer: group.
        minutes: how long; the round that runs then is finished.
        rounds: end after so many rounds; null: only the time counts.
        seed: of the events and of training.
        num_ests: N; the job runs on 1..N devices.
        steps: optimizer steps of a round.
        pauses_s: seconds an EST sleeps in each micro-batch, so that there is a step to disturb; one is drawn per round.
        in_place: share of the rounds that change devices in place.
        snapshot_every: optimizer steps between snapshots, or ``auto``.
        quiet_steps: most steps between two events.
        burst: share of events that follow the one before within a second.
        actions: how often each is drawn, relatively (`_trouble.ACTIONS`).
        moments: how often each is drawn, relatively (`_trouble.MOMENTS`).
        round_timeout_s: longest time of a round, in seconds; a longer one has failed.
        timeout_s: longest time of the reference, in seconds.
    """

    workload: WorkloadConf = field(default_factory=WorkloadConf)
    trainer: TrainerConf = field(default_factory=TrainerConf)
    minutes: float = 10.0
    rounds: Optional[int] = None  # noqa: UP045
    seed: int = 1
    num_ests: int = 4
    steps: int = 60
    pauses_s: List[float] = field(default_factory=lambda: [0.01, 0.03, 0.1])  # noqa: UP006
    in_place: float = 0.5
    snapshot_every: Union[int, str] = 4  # noqa: UP007
    quiet_steps: int = 6
    burst: float = 0.3
    actions: Dict[str, float] = field(  # noqa: UP006
        default_factory=lambda: {"resize": 4.0, "sigterm": 2.0, "sigkill": 2.0, "worker_kill": 1.0}
    )
    moments: Dict[str, float] = field(  # noqa: UP006
        default_factory=lambda: {"any": 3.0, "accumulation": 2.0, "validation": 2.0, "save": 2.0, "start": 1.0}
    )
    round_timeout_s: float = 1800.0
    timeout_s: float = 1800.0


ConfigStore.instance().store(name="soak_schema", node=SoakConf)


def check(conf: SoakConf) -> None:
    """Refuse what cannot run.

    Raises:
        ConfigError: with the key, its value and the cure.
    """
    for key, known in (("actions", ACTIONS), ("moments", MOMENTS)):
        weights: dict[str, float] = getattr(conf, key)
        if unknown := set(weights) - set(known):
            raise ConfigError(f"`{key}` has {sorted(unknown)[0]!r}. HINT: there are {', '.join(known)}.")
        if not any(weights.values()):
            raise ConfigError(f"`{key}={dict(weights)}` leaves nothing to draw. HINT: give one a weight.")
    if not conf.pauses_s:
        raise ConfigError("`pauses_s` is empty. HINT: `pauses_s=[0.02]`.")


def make_spec(conf: SoakConf, directory: Path, data: Path, *, reference: bool, pause_s: float = 0.0) -> RunSpec:
    """The reference, or the job of one round, whose files go to `directory`."""
    return RunSpec(
        kind="reference" if reference else "easyscale",
        name="stock DDP" if reference else "soak",
        level="d1",
        num_ests=conf.num_ests,
        devices=f"cpu:{conf.num_ests}",
        ests_per_executor=(),
        pool=("cpu",),
        emulate=False,
        threads=determinism.default_threads(conf.num_ests),
        seed=conf.seed,
        first_step=0,
        end_step=conf.steps,
        digest_at=(conf.steps,),
        record=str(directory / "record"),
        save=str(directory / "end.ckpt"),
        resume=None,
        data=str(data),
        workload=vars(conf.workload),
        trainer={key: value for key, value in vars(conf.trainer).items() if key != "max_steps"},
        pace=() if reference else ((0, (pause_s,) * conf.num_ests),),
        snapshot_every=None if reference else conf.snapshot_every,
        phases=None if reference else str(directory / "phases"),
    )


def count_samples(reference: Path, run: Path, *, num_ests: int, batch_size: int) -> tuple[int, int]:
    """Samples that the run lacks and that it has twice, by the micro-batches that both recorded."""
    lost = repeated = 0
    for rank in range(num_ests):
        wanted, found = (
            Counter(line["batch"] for line in read_lines(est_file(path, rank)) if line["kind"] == "step")
            for path in (reference, run)
        )
        lost += (wanted - found).total()
        repeated += (found - wanted).total()
    return lost * batch_size, repeated * batch_size


def run(conf: SoakConf, directory: Path, console: Console) -> dict[str, Any]:
    """The whole soak; returns the report."""
    check(conf)
    data = prepare(vars(conf.workload), directory / "data")
    reference = make_spec(conf, directory / "reference", data, reference=True)
    if not is_complete(reference):
        console.print("reference: stock DDP")
        execute(
            reference,
            log=directory / "reference.log",
            environments=[child_environment(apply_environment({}))],
            timeout_s=conf.timeout_s,
            progress=lambda _: None,
            stop=threading.Event(),
        )
    began = time.monotonic()
    choose = random.Random(conf.seed)
    events: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    report: dict[str, Any] = {"bits_equal": True, "rounds": 0, "failures": [], "differences": []}
    report["started"] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    report.update(seed=conf.seed, num_ests=conf.num_ests, steps=conf.steps, threads=reference.threads)
    report["machine"] = {"device": device_name(False), "cpus": os.cpu_count()}
    report["fingerprint"] = Record.load(reference.record).ests[0].events[0]["data"]["fingerprint"]
    os.environ.update(child_environment(dict(os.environ)))
    while report["rounds"] != conf.rounds and (not report["rounds"] or time.monotonic() - began < 60 * conf.minutes):
        home = directory / f"round_{report['rounds']}"
        outcome = _round(conf, home, data, reference, choose, events, console)
        totals.update(outcome["counts"])
        report["rounds"] += 1
        for kind in ("failures", "differences"):
            if outcome[kind] is not None:
                report["bits_equal"] = False
                report[kind].append({"round": report["rounds"] - 1, "what": outcome[kind]})
        report.update(events=dict(sorted(events.items())), minutes=round((time.monotonic() - began) / 60, 2))
        report.update(totals)
        (directory / "report.json").write_text(json.dumps(report, indent=1))
    return report


def _round(
    conf: SoakConf,
    home: Path,
    data: Path,
    reference: RunSpec,
    choose: random.Random,
    events: Counter[str],
    console: Console,
) -> dict[str, Any]:
    """One job from its start to its end, and how it compares."""
    spec = make_spec(conf, home, data, reference=False, pause_s=choose.choice(conf.pauses_s))
    count, in_place = choose.randint(1, conf.num_ests), choose.random() < conf.in_place
    mode = "in place" if in_place else "by relaunch"
    console.print(f"{home.name}: {mode}, {spec.pace[0][1][0]} s per micro-batch", highlight=False)
    job = ElasticRun(
        spec,
        home / "job",
        str(count),
        tell=lambda line: console.print(f"  {line}", style="dim", highlight=False, markup=False),
        max_restarts=1000,
        in_place=in_place,
        timeout_s=conf.round_timeout_s,
    )
    trouble = Trouble(
        num_ests=conf.num_ests,
        quiet_steps=conf.quiet_steps,
        burst=conf.burst,
        weights={"actions": conf.actions, "moments": conf.moments},
        choose=choose,
        events=events,
        timeline=home.parent / "timeline.jsonl",
        tell=lambda line: console.print(line, highlight=False),
    )
    failure, difference, lost, repeated = None, None, 0, 0
    try:
        state = job.run(trouble)
    except RunFailedError as error:
        state = job.folder.read_state()
        if not job.has_trained:  # killed after that, nothing of it is missing
            failure = str(error)
    if failure is None:
        difference = compare(reference.record, spec.record)
        lost, repeated = count_samples(
            Path(reference.record), Path(spec.record), num_ests=conf.num_ests, batch_size=conf.workload.batch_size
        )
    console.print(f"{home.name}: {failure or difference or 'bitwise equal to stock DDP'}", highlight=False)
    if failure is None and difference is None:
        shutil.rmtree(home)
    counts = {"restarts": state["stages"] - 1, "steps_redone": state["steps_redone"]}
    counts.update(samples_lost=lost, samples_repeated=repeated)
    return {"counts": counts, "failures": failure, "differences": None if difference is None else str(difference)}


@hydra.main(version_base="1.3", config_path="../conf", config_name="soak")
def main(config: DictConfig) -> None:
    """Command line."""
    console = make_console()
    conf = OmegaConf.to_object(config)
    assert isinstance(conf, SoakConf)
    directory = Path(HydraConfig.get().runtime.output_dir).resolve()
    with errors_as_lines(console, RunFailedError):
        report = run(conf, directory, console)
    console.print(f"report: {directory / 'report.json'}: {sum(report['events'].values())} events {report['events']}")
    if not report["bits_equal"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
