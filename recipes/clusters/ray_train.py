"""An elastic job under Ray Train: Ray gives the number of workers, the ESTs stay.

``python recipes/clusters/ray_train.py --workers 2 --dir /shared/job``; started again with another number of workers, it
goes on from its newest checkpoint, or has nothing left to do when training has ended.
"""

from __future__ import annotations

import argparse
from typing import Any

import ray.train
from ray.train.lightning import RayLightningEnvironment
from ray.train.torch import TorchTrainer


def train(config: dict[str, Any]) -> None:
    """Runs in every worker of Ray: an ordinary Lightning script."""
    import lightning.pytorch as pl
    from lightning.pytorch.demos.boring_classes import BoringModel

    from lightning_easyscale import EasyScaleStrategy

    pl.seed_everything(1)
    trainer = pl.Trainer(
        strategy=EasyScaleStrategy(num_ests=config["num_ests"], elastic_dir=config["dir"]),
        plugins=[RayLightningEnvironment()],
        accelerator=config["accelerator"],
        devices="auto" if config["accelerator"] == "gpu" else 1,
        max_epochs=1,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
    )
    model = BoringModel()
    trainer.fit(model)
    if trainer.is_global_zero:
        trainer.save_checkpoint(f"{config['dir']}/trained.ckpt", weights_only=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--num-ests", type=int, default=4)
    parser.add_argument("--dir", required=True, help="the job's folder, on storage that all workers share")
    parser.add_argument("--gpu", action="store_true")
    arguments = parser.parse_args()
    TorchTrainer(
        train,
        train_loop_config={
            "num_ests": arguments.num_ests,
            "dir": arguments.dir,
            "accelerator": "gpu" if arguments.gpu else "cpu",
        },
        scaling_config=ray.train.ScalingConfig(num_workers=arguments.workers, use_gpu=arguments.gpu),
    ).fit()


if __name__ == "__main__":
    main()
