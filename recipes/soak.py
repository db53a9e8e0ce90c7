"""Random trouble, and the bits of an undisturbed stock DDP run.

``python -m recipes.soak minutes=M seed=S`` runs stock ``Trainer(strategy="ddp")`` once, then the same job under the
supervisor again and again until the time is up. While it trains, it is resized, its executors get SIGTERM and SIGKILL
at random moments, also while they save. The model has BatchNorm, dropout, augmentation, accumulation, logged metrics
and a learning rate schedule; every round's run record is compared with the reference's bit for bit.

``report.json`` in ``hydra.run.dir``: ``events`` (count by kind), ``bits_equal``, ``restarts``, ``steps_redone``
(optimizer steps that were done before and had to be done again), ``samples_lost`` and ``samples_repeated`` (samples of
micro-batches that the reference has and the run has not, or that the run has twice). Exit status 1 if bits differ.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_easyscale import determinism
from lightning_easyscale.compare import compare
from lightning_easyscale.devices import apply_environment
from lightning_easyscale.record import Record, est_file, read_lines

from ._config import TrainerConf, WorkloadConf
from ._elastic_run import ElasticRun
from ._runs import RunFailedError, child_environment, execute, is_complete
from ._stage import RunSpec
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
        pause_s: seconds an EST sleeps in each micro-batch, so that there is a step to disturb.
        quiet_steps: most steps between two events.
        weights: how often each kind of event happens, relatively.
        timeout_s: longest time of the reference, in seconds.
    """

    workload: WorkloadConf = field(default_factory=WorkloadConf)
    trainer: TrainerConf = field(default_factory=TrainerConf)
    minutes: float = 10.0
    rounds: Optional[int] = None  # noqa: UP045
    seed: int = 1
    num_ests: int = 4
    steps: int = 80
    pause_s: float = 0.02
    quiet_steps: int = 10
    weights: dict[str, float] = field(
        default_factory=lambda: {"resize": 4.0, "sigterm": 2.0, "sigkill": 1.0, "sigkill_in_save": 1.0}
    )
    timeout_s: float = 1800.0


ConfigStore.instance().store(name="soak_schema", node=SoakConf)


class Trouble:
    """Random events for one round.

    Args:
        conf: the configuration.
        choose: draws everything that is random.
        events: counts the events by kind.
        console: for lines.
    """

    def __init__(self, conf: SoakConf, choose: random.Random, events: Counter[str], console: Console) -> None:
        self.conf, self.choose, self.events, self.console = conf, choose, events, console

    def __call__(self, run: ElasticRun) -> None:
        """Disturb the job until it ends."""
        kinds, weights = zip(*self.conf.weights.items(), strict=True)
        while True:
            status = run.trained(self.choose.randint(1, self.conf.quiet_steps))
            run.pause(self.choose.random() * 0.2)  # anywhere inside a step, or in what follows it
            kind = self.choose.choices(kinds, weights)[0]
            if getattr(self, f"_{kind}")(run, status):
                self.events[kind] += 1
                self.console.print(f"event: {kind} at step {status['step']} on {status['devices']}", highlight=False)

    def _resize(self, run: ElasticRun, status: dict[str, Any]) -> bool:
        others = [count for count in range(1, self.conf.num_ests + 1) if count != status["count"]]
        return bool(others) and run.resize(str(self.choose.choice(others)))

    def _sigterm(self, run: ElasticRun, status: dict[str, Any]) -> bool:
        return self._signal(signal.SIGTERM, status)

    def _sigkill(self, run: ElasticRun, status: dict[str, Any]) -> bool:
        return self._signal(signal.SIGKILL, status)

    def _sigkill_in_save(self, run: ElasticRun, status: dict[str, Any]) -> bool:
        if not self._signal(signal.SIGTERM, status):
            return False
        run.pause(self.choose.random() * 0.5)
        return self._signal(signal.SIGKILL, status)

    def _signal(self, number: int, status: dict[str, Any]) -> bool:
        """Send a signal to a random executor; whether there was one."""
        if not status["executors"]:
            return False
        with suppress(ProcessLookupError):
            os.kill(self.choose.choice(status["executors"]), number)
            return True
        return False


def make_spec(conf: SoakConf, directory: Path, data: Path, *, reference: bool) -> RunSpec:
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
        pace=() if reference else ((0, (conf.pause_s,) * conf.num_ests),),
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
    data = prepare(vars(conf.workload), directory / "data")
    reference = make_spec(conf, directory / "reference", data, reference=True)
    began = time.monotonic()
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
    choose = random.Random(conf.seed)
    events: Counter[str] = Counter()
    report: dict[str, Any] = {"bits_equal": True, "rounds": 0, "restarts": 0, "steps_redone": 0}
    report.update(samples_lost=0, samples_repeated=0, differences=[])
    os.environ.update(child_environment(dict(os.environ)))
    while report["rounds"] != conf.rounds and (not report["rounds"] or time.monotonic() - began < 60 * conf.minutes):
        home = directory / f"round_{report['rounds']}"
        spec = make_spec(conf, home, data, reference=False)
        job = ElasticRun(
            spec, home / "job", str(choose.randint(1, conf.num_ests)), tell=_quietly(console), max_restarts=1000
        )
        state = job.run(Trouble(conf, choose, events, console))
        difference = compare(reference.record, spec.record)
        lost, repeated = count_samples(
            Path(reference.record), Path(spec.record), num_ests=conf.num_ests, batch_size=conf.workload.batch_size
        )
        report["rounds"] += 1
        report["restarts"] += state["stages"] - 1
        report["steps_redone"] += state["steps_redone"]
        report["samples_lost"] += lost
        report["samples_repeated"] += repeated
        if difference is not None:
            report["bits_equal"] = False
            report["differences"].append({"round": report["rounds"] - 1, "first": str(difference)})
        console.print(f"round {report['rounds']}: {difference or 'bitwise equal to stock DDP'}", highlight=False)
        report.update(events=dict(sorted(events.items())), minutes=round((time.monotonic() - began) / 60, 2))
        report.update(seed=conf.seed, num_ests=conf.num_ests, steps=conf.steps, threads=spec.threads)
        report.update(fingerprint=Record.load(spec.record).ests[0].events[0]["data"]["fingerprint"])
        (directory / "report.json").write_text(json.dumps(report, indent=1))
    return report


def _quietly(console: Console) -> Any:
    return lambda line: console.print(f"  {line}", style="dim", highlight=False, markup=False)


@hydra.main(version_base="1.3", config_path="../conf", config_name="soak")
def main(config: DictConfig) -> None:
    """Command line."""
    console = Console()
    conf = OmegaConf.to_object(config)
    assert isinstance(conf, SoakConf)
    directory = Path(HydraConfig.get().runtime.output_dir).resolve()
    try:
        report = run(conf, directory, console)
    except (RunFailedError, ImportError, ValueError) as error:
        console.print(f"{type(error).__name__}: {error}", markup=False, style="red")
        raise SystemExit(2) from None
    console.print(f"report: {directory / 'report.json'}: {sum(report['events'].values())} events {report['events']}")
    if not report["bits_equal"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
