"""Jobs for the tests of levels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models import Model, loader, train_data
from ..scenario import Script


def wide_job(config: dict[str, Any], root: Path) -> Script:
    """Wide enough that instruction sets show."""
    return Script(Model(width=256), train_data(n=96, batch_size=16), {"max_epochs": 2})


class Digits(Model):
    """What the demo trains, but small: convolutions, BatchNorm, pooling, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Unflatten(1, (1, 2, 3)), nn.Upsample(scale_factor=4), nn.Conv2d(1, 4, 3, padding=1)),
            *(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.25), nn.Linear(96, 3)),
        )


def portable_job(config: dict[str, Any], root: Path) -> Script:
    """Draws random numbers in the data and in the model; validates; clips."""
    trainer = {"max_epochs": 2, "limit_train_batches": 3, "gradient_clip_val": 0.5}
    return Script(Digits(), train_data(n=36, noise=True), trainer)


class Large(Model):
    """One matrix of more than nine million elements, of which the loss reaches all."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.matrix = nn.Parameter(torch.randn(3001, 3000) / 100)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        scale = torch.linspace(-1, 1, 3000) * (self.global_rank + 1)
        return self.loss(batch) + (self.matrix * scale).sin().sum() * x.mean() / 1000

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def large_job(config: dict[str, Any], root: Path) -> Script:
    trainer = {"max_epochs": 1, "limit_train_batches": 2}
    return Script(Large(), {"train_dataloaders": loader(24)}, trainer, {"bucket_cap_mb": 100})
