"""A classifier of digits that is fine-tuned: the backbone is frozen at first and thawed after an epoch."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from .digits import Digits
from .options import parse, trainer


class Thaw(BaseFinetuning):
    """Freezes the backbone once DDP has taken note of its parameters, and thaws it after the first epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        """Not yet: DDP does not reduce gradients of parameters that are frozen when it wraps the module."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.freeze(pl_module.backbone, train_bn=True)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, initial_denom_lr=10)


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(16 * 36, 10))
        self.train_accuracy = MulticlassAccuracy(10)
        self.val_accuracy = MulticlassAccuracy(10)
        self.confusion = MulticlassConfusionMatrix(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y, label_smoothing=0.1)
        self.train_accuracy(logits, y)
        self.log("train_accuracy", self.train_accuracy, on_step=True, on_epoch=True)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.val_accuracy(logits, y)
        self.confusion.update(logits, y)
        self.log("val_accuracy", self.val_accuracy)
        self.log("val_loss", F.cross_entropy(logits, y), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        matrix = self.confusion.compute()
        self.log("hardest", (matrix.diag() / matrix.sum(1).clamp(min=1)).min())
        self.confusion.reset()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.val_accuracy(self(x), y)
        self.log("test_accuracy", self.val_accuracy)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.head.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


def main() -> None:
    options = parse()
    pl.seed_everything(3)
    fitter = trainer(
        options,
        Thaw(),
        LearningRateMonitor("epoch"),
        EarlyStopping("val_loss", patience=2),
        ModelCheckpoint(options.out / "checkpoints", monitor="val_accuracy", mode="max", save_top_k=2, save_last=True),
        max_epochs=3,
        logger=CSVLogger(options.out),
        log_every_n_steps=3,
    )
    data = Digits(options.data, batch_size=16, samples=300, augment=True)
    fitter.fit(Classifier(), data)
    fitter.test(ckpt_path="best", datamodule=data)


if __name__ == "__main__":
    main()
