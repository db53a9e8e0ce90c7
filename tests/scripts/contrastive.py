"""A contrastive learner: two views of every image, negatives from all ranks by `all_gather(sync_grads=True)`."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from .digits import Digits
from .options import parse, trainer


class Contrastive(pl.LightningModule):
    """SimCLR's loss over the views of all ranks."""

    def __init__(self, temperature: float = 0.2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 169, 32)
        )
        self.projector = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Two views, made on the device."""
        x, y = batch
        views = [x + 0.2 * torch.randn_like(x), x.flip(-1) * torch.rand(len(x), 1, 1, 1, device=x.device)]
        return torch.cat(views), y

    def _loss(self, views: Tensor) -> tuple[Tensor, Tensor]:
        features = F.normalize(self.projector(self.encoder(views)), dim=-1)
        everyone = self.all_gather(features, sync_grads=True).reshape(-1, features.shape[-1])
        n, first = len(features), self.global_rank * len(features)
        logits = features @ everyone.T / self.hparams.temperature
        rows = torch.arange(n, device=views.device)
        logits[rows, rows + first] = float("-inf")
        target = (rows + n // 2) % n + first
        return F.cross_entropy(logits, target), (logits.argmax(1) == target).float().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, accuracy = self._loss(batch[0])
        self.log_dict({"loss": loss, "accuracy": accuracy}, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, accuracy = self._loss(batch[0])
        self.log_dict({"val_loss": loss, "val_accuracy": accuracy}, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, foreach=True)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)]


def main() -> None:
    options = parse()
    pl.seed_everything(11)
    fitter = trainer(
        options,
        EMAWeightAveraging(decay=0.9),
        ModelCheckpoint(options.out / "checkpoints", monitor="val_loss", save_last=True),
        max_epochs=2,
        logger=CSVLogger(options.out),
        log_every_n_steps=2,
    )
    fitter.fit(Contrastive(), Digits(options.data, batch_size=12, samples=300, augment=True))


if __name__ == "__main__":
    main()
