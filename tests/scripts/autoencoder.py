"""An autoencoder run by LightningCLI: fit, test the best checkpoint, predict, as Lightning's basic example does.

``python -m tests.scripts.autoencoder --trainer.strategy=easyscale --trainer.devices=2 --data.folder=DIR``
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

import lightning_easyscale  # noqa: F401  registers the strategies

from .digits import Digits


class ImageSampler(pl.Callback):
    """Logs a grid of reconstructions at the end of every epoch."""

    @rank_zero_only
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        images = next(iter(trainer.datamodule.val_dataloader()))[0][:8].to(pl_module.device)  # type: ignore[attr-defined]
        pl_module.eval()
        with torch.no_grad():
            grid = pl_module(images.flatten(1)).view(-1, 28, 28).reshape(-1, 28)
        pl_module.train()
        trainer.logger.experiment.add_image("reconstructed", grid, trainer.global_step, dataformats="HW")  # type: ignore[union-attr]


class AutoEncoder(pl.LightningModule):
    """Fully connected encoder and decoder.

    Args:
        hidden: units of the hidden layers.
        learning_rate: of Adam.
    """

    def __init__(self, hidden: int = 64, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(28 * 28, hidden), nn.ReLU(), nn.Linear(hidden, 3))
        self.decoder = nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, 28 * 28))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))

    def _loss(self, batch: Any, stage: str) -> Tensor:
        x = batch[0].flatten(1)
        loss = F.mse_loss(self(x), x)
        self.log(f"{stage}_loss", loss, on_step=stage == "train", on_epoch=True, sync_dist=stage != "train")
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._loss(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._loss(batch, "valid")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._loss(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self(batch[0].flatten(1))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)


def main() -> None:
    cli = LightningCLI(
        AutoEncoder,
        Digits,
        seed_everything_default=1234,
        run=False,
        save_config_callback=None,
        trainer_defaults={"callbacks": ImageSampler(), "max_epochs": 2, "log_every_n_steps": 2, "accelerator": "cpu"},
    )
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    cli.trainer.test(ckpt_path="best", datamodule=cli.datamodule)
    predictions = cli.trainer.predict(ckpt_path="best", datamodule=cli.datamodule)
    print("predicted", [tuple(p.shape) for p in predictions])  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
