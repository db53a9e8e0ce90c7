"""One run in processes of its own: a reference run, or one stage of an EasyScale job.

``python -m recipes._stage spec.json``. The launcher of the strategy starts the same command again for the other ranks
or executors, or forks that process for each, so everything a process must know is in the file, as plain JSON. A stage
over several hosts is started by one torchrun agent per host instead.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class RunSpec:
    """Everything that decides a run.

    Args:
        kind: ``reference`` (stock DDP, one process per worker) or ``easyscale``.
        name: for logs.
        level: ``d0``, ``d1``, ``d0+d2`` or ``d1+d2``.
        num_ests: N.
        devices: as `EasyScaleAccelerator` reads them: ``"v100:1,p100:2"``; a reference has one type.
        ests_per_executor: of an EasyScale stage, in device order; empty: the planner decides.
        step_seconds: device type -> seconds of one EST's step, for the planner; None: all are equally fast.
        hosts: the ``devices`` of each of several hosts, empty on one: of an EasyScale stage, or of a reference whose
            workers share a device, which stock DDP allows only between hosts.
        pool: device types that the job may ever use.
        emulate: whether types are emulated.
        threads: CPU threads per worker.
        seed: for ``seed_everything``.
        first_step: optimizer steps done before.
        end_step: optimizer steps done afterwards, where a checkpoint is taken.
        job_steps: optimizer steps of all stages, on which learning rate schedules may depend; None: ``end_step``.
        digest_at: optimizer steps after which the state is digested.
        record: directory of the run record.
        save: the checkpoint to write.
        resume: the checkpoint to start from.
        data: directory of the prepared data.
        workload: fields of `WorkloadConf`.
        trainer: arguments of the Trainer.
        reduction: order of gradient reduction.
        process_group_backend: of the workers; None: the device's own.
        pace: ``(first step, seconds per executor)``, ascending: from that step on every EST of an executor sleeps
            so long in its mini-batch, which makes an emulated device as slow as one likes without using a core.
        report: file that executor ``i`` appends the time of each of its steps to, as ``<report>.<i>``; None: no file.
        control: file that ends the run at the next step, with a checkpoint, when it appears; None: no file.
        rebalance: arguments of `Rebalance`; None: ESTs stay.
        snapshot_every: optimizer steps between snapshots of an elastic run, or ``auto``; None: no snapshots.
        phases: file in which executors keep what they are doing (`_phases`); None: no file.
        start_method: how the strategy's launcher makes processes: ``"popen"`` or ``"fork"``.
    """

    kind: str
    name: str
    level: str
    num_ests: int
    devices: str
    ests_per_executor: tuple[int, ...]
    pool: tuple[str, ...]
    emulate: bool
    threads: int
    seed: int
    first_step: int
    end_step: int
    digest_at: tuple[int, ...]
    record: str
    save: str
    resume: str | None
    data: str
    workload: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    reduction: str = "auto"
    process_group_backend: str | None = None
    hosts: tuple[str, ...] = ()
    pace: tuple[tuple[int, tuple[float, ...]], ...] = ()
    report: str | None = None
    control: str | None = None
    rebalance: dict[str, Any] | None = None
    step_seconds: dict[str, float] | None = None
    snapshot_every: int | str | None = None
    phases: str | None = None
    job_steps: int | None = None
    start_method: Literal["popen", "fork"] = "popen"

    def dumps(self) -> str:
        """As JSON; equal text means an equal run."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def load(cls, file: str | Path) -> RunSpec:
        """Read what :meth:`dumps` wrote."""
        plain: dict[str, Any] = json.loads(Path(file).read_text())
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}
        return cls(**fields)


def run(spec: RunSpec) -> None:
    """Train from ``first_step`` to ``end_step``."""
    import lightning.pytorch as pl
    import torch

    from lightning_easyscale.callbacks import RunRecord
    from lightning_easyscale.rebalance import Rebalance

    from ._phases import Phases
    from ._stage_callbacks import Pace, SaveAtEnd, StepReport
    from .workloads import build

    torch.set_num_threads(spec.threads)
    pl.seed_everything(spec.seed, workers=True, verbose=False)
    module, datamodule = build(spec.workload, spec.data)
    arguments = _reference_arguments(spec) if spec.kind == "reference" else _easyscale_arguments(spec)
    callbacks = [RunRecord(spec.record, digest_at=spec.digest_at), *arguments.pop("callbacks", ())]
    if spec.pace:
        callbacks.append(Pace(spec.pace))
    if spec.phases is not None:
        callbacks.append(Phases(spec.phases))
    if spec.report is not None:
        callbacks.append(StepReport(spec.report))
    if spec.rebalance is not None:
        callbacks.append(Rebalance(**spec.rebalance))
    callbacks.append(SaveAtEnd(spec.save, end_step=spec.end_step, control=spec.control))
    trainer = pl.Trainer(
        **arguments,
        callbacks=callbacks,
        max_epochs=-1,
        max_steps=spec.job_steps or spec.end_step,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **spec.trainer,
    )
    trainer.fit(module, datamodule=datamodule, ckpt_path=spec.resume)


def run_file(file: Path) -> None:
    """Run the spec in a file."""
    run(RunSpec.load(str(file)))


def _reference_arguments(spec: RunSpec) -> dict[str, Any]:
    """Stock DDP: nothing of ours but the level's flags."""
    from lightning.pytorch.strategies import DDPStrategy

    from lightning_easyscale.callbacks import DeterminismCallback
    from lightning_easyscale.devices import device_type

    heterogeneous = spec.level.endswith("d2")
    name = spec.devices.partition(":")[0]
    kind, devices = device_type(name, emulate=spec.emulate).kind, 1 if spec.hosts else spec.num_ests
    return {
        "strategy": DDPStrategy(process_group_backend=spec.process_group_backend, start_method=spec.start_method),
        "accelerator": kind,
        "devices": _gpus(name)[:devices] if kind == "cuda" else devices,
        "num_nodes": max(len(spec.hosts), 1),
        "callbacks": [
            DeterminismCallback(
                spec.level, threads=spec.threads, pool=spec.pool if heterogeneous else None, emulate=spec.emulate
            )
        ],
    }


def _gpus(name: str) -> list[int]:
    """Where the GPUs of a type are."""
    from lightning_easyscale.devices import detect

    return [index for index, found in enumerate(detect()) if found.name == name]


def _easyscale_arguments(spec: RunSpec) -> dict[str, Any]:
    from lightning_easyscale import EasyScaleStrategy
    from lightning_easyscale.accelerator import EasyScaleAccelerator

    strategy = EasyScaleStrategy(
        num_ests=spec.num_ests,
        determinism=spec.level,
        reduction=spec.reduction,  # type: ignore[arg-type]
        pool=spec.pool if spec.level.endswith("d2") else None,
        threads_per_est=spec.threads,
        ests_per_executor=spec.ests_per_executor or None,
        step_seconds=spec.step_seconds,
        process_group_backend=spec.process_group_backend,
        start_method=spec.start_method,
        snapshot_every_n_steps=spec.snapshot_every,  # type: ignore[arg-type]
    )
    # over several hosts, torchrun started this process and says which of them this is
    here = spec.hosts[int(os.environ["GROUP_RANK"])] if spec.hosts else spec.devices
    return {
        "strategy": strategy,
        "accelerator": EasyScaleAccelerator(emulate=spec.emulate),
        "devices": here,
        "num_nodes": max(len(spec.hosts), 1),
    }


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "Agg")
    faulthandler.register(signal.SIGUSR2)  # a run that hangs can be asked where
    run_file(Path(sys.argv[1]))
