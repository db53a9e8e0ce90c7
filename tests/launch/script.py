"""What a user would write; run as a script, with ``-m``, under torchrun, or by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import lightning.pytorch as pl

from lightning_easyscale import EasyScaleStrategy

from .job import Classifier, loader, make_trainer, state_digest


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--devices", default="2")
    parser.add_argument("--num-ests", type=int, default=3)
    parser.add_argument("--num-nodes", type=int, default=1)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--determinism", default="D1")
    parser.add_argument("--start-method", default="popen")
    parser.add_argument("--no-seed", action="store_true")
    parser.add_argument("--fail", type=int)
    arguments = parser.parse_args()
    if not arguments.no_seed:
        pl.seed_everything(11, verbose=False)
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    strategy = EasyScaleStrategy(
        num_ests=arguments.num_ests or None,
        determinism=arguments.determinism,
        start_method=arguments.start_method,
        threads_per_est=1,
    )
    devices = int(arguments.devices) if arguments.devices.isdigit() else arguments.devices
    trainer = make_trainer(
        arguments.out,
        strategy=strategy,
        accelerator=arguments.accelerator,
        devices=devices,
        num_nodes=arguments.num_nodes,
        max_epochs=1,
    )
    module = Failing(arguments.fail) if arguments.fail is not None else Classifier()
    trainer.fit(module, loader(), loader(shuffle=False))
    trainer.save_checkpoint(arguments.out / "after.ckpt")
    if trainer.global_rank == 0:
        result = {"losses": module.losses, "seed": pl.seed_everything(workers=False, verbose=False)}
        if strategy.session is not None:
            result["state"] = state_digest(trainer)
        else:
            result["parameters"] = [p.tolist() for p in module.parameters()]
        (arguments.out / "result.json").write_text(json.dumps(result))


class Failing(Classifier):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def on_train_epoch_end(self) -> None:
        if self.global_rank == self.rank:
            raise ZeroDivisionError("on purpose")


if __name__ == "__main__":
    main()
