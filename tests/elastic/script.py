"""A training script as a user would write it: nothing in it knows of elasticity.

It keeps a run record and ends with ``result.json``; ``--delay`` makes a step last long enough to be disturbed, until
the file ``--hurry`` is there. The file ``asleep`` shows that a step has come so far.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_easyscale import DeterminismCallback, EasyScaleStrategy, RunRecord
from tests.launch.job import Classifier, loader, make_trainer, state_digest


class Slow(Classifier):
    def __init__(self, delay: float, hurry: Path | None, asleep: Path) -> None:
        super().__init__()
        self.delay, self.hurry, self.asleep = delay, hurry, asleep

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 0 and not (self.hurry is not None and self.hurry.exists()):
            self.asleep.touch()
            time.sleep(self.delay)
        return super().training_step(batch, batch_idx)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-ests", type=int, default=4)
    parser.add_argument("--devices", type=int, default=1, help="where no supervisor decides")
    parser.add_argument("--start-method", default="popen")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--hurry", type=Path)
    parser.add_argument("--snapshots", type=lambda text: text if text == "auto" else int(text), help="interval")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--reference", action="store_true", help="stock DDP, in a process per worker")
    arguments = parser.parse_args()
    pl.seed_everything(11, verbose=False)
    callbacks: list[Any] = [RunRecord(arguments.out / "record", digest_every_n_steps=4, flush_every_n_steps=1)]
    strategy: Any = EasyScaleStrategy(
        num_ests=arguments.num_ests,
        threads_per_est=1,
        snapshot_every_n_steps=arguments.snapshots if not arguments.reference else None,
        snapshot_replicas=arguments.replicas,
        start_method=arguments.start_method,
    )
    if arguments.reference:
        strategy = "ddp"
        callbacks.append(DeterminismCallback("D1", threads=1))
    trainer = make_trainer(
        arguments.out,
        strategy=strategy,
        devices=arguments.num_ests if arguments.reference else arguments.devices,
        max_epochs=arguments.epochs,
        callbacks=callbacks,
    )
    module = Slow(arguments.delay, arguments.hurry, arguments.out / "asleep")
    workers = {"num_workers": arguments.workers, "persistent_workers": arguments.workers > 0}
    trainer.fit(module, loader(arguments.samples, **workers), loader(shuffle=False))
    if trainer.global_rank == 0:
        result = {"state": state_digest(trainer), "step": trainer.global_step}
        (arguments.out / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
