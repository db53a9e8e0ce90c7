"""Jobs with everything that a stop can spoil: generators, buffers, metrics, logs, schedules, savers, early stopping."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torchmetrics import MeanMetric

from ..integration.models import Model, loader
from ..integration.scenario import Script
from .faults import reach


class Job(Model):
    def __init__(self, plateau: str, pause: float, compiled: bool) -> None:
        super().__init__()
        if compiled:
            self.net = torch.compile(self.net, backend=_compile)  # type: ignore[assignment]
        self.pause = pause
        self.plateau = plateau
        self.seen = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(self.pause)
        loss = super().training_step(batch, batch_idx)
        self.seen.update(loss)
        self.log("seen", self.seen, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val_noise", torch.rand(()))
        return super().validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        if self.plateau:
            schedule: Any = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
            config = {"scheduler": schedule, "monitor": "train_loss", "interval": self.plateau}
        else:
            config = {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5), "interval": "epoch"}
        return {"optimizer": optimizer, "lr_scheduler": config}


def job(config: dict[str, Any], root: Path) -> Script:
    """A job; `config` holds arguments of the Trainer."""
    options = dict(config)
    plateau = options.pop("plateau", "")
    compiled = options.pop("compiled", False)
    workers, pause = options.pop("workers", 0), options.pop("pause", 0.0)
    batch, val_batch = options.pop("batch", 4), options.pop("val_batch", 4)
    saver = ModelCheckpoint(
        dirpath=root / "ckpt",
        filename="{epoch}-{step}-{val_loss:.4f}",
        monitor="val_loss",
        save_top_k=2,
        save_last=True,
    )
    trainer = {
        "max_epochs": 3,
        "num_sanity_val_steps": 2,
        "log_every_n_steps": 1,
        "logger": CSVLogger(root),
        "callbacks": [saver, EarlyStopping("val_loss", patience=5)],
        **options,
    }
    data = {
        "train_dataloaders": loader(noise=True, batch_size=batch, num_workers=workers),
        "val_dataloaders": loader(30, val_batch, shuffle=False, noise=True),
    }
    return Script(Job(plateau, pause, compiled), data, trainer)


def _compile(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    reach("compile")
    return graph.forward
