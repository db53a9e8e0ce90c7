"""Small seeded building blocks for scenarios."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Points(Dataset):
    """`n` points with labels; with `noise`, drawn anew whenever a point is read."""

    def __init__(self, n: int = 48, features: int = 6, noise: bool = False, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, features, generator=generator)
        self.y = torch.randint(0, 3, (n,), generator=generator)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = self.x[index]
        return (x + 0.1 * torch.randn(x.shape) if self.noise else x), self.y[index]


def loader(n: int = 48, batch_size: int = 4, *, shuffle: bool = True, noise: bool = False, **more: Any) -> DataLoader:
    return DataLoader(Points(n, noise=noise, seed=n), batch_size=batch_size, shuffle=shuffle, **more)


def net(dropout: float = 0.2, norm: bool = True, width: int = 8) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(6, width)]
    if norm:
        layers.append(nn.BatchNorm1d(width))
    layers += [nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 3)]
    return nn.Sequential(*layers)


class Model(LightningModule):
    """Classifier with BatchNorm and dropout, logging on step and epoch; scenarios override what they are about."""

    def __init__(self, lr: float = 0.1, **shape: Any) -> None:
        super().__init__()
        self.lr = lr
        self.net = net(**shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("val_loss", loss, sync_dist=True)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("test_loss", loss, sync_dist=True)
        return loss

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def train_data(**options: Any) -> dict[str, Any]:
    return {"train_dataloaders": loader(**options)}


def train_val_data(**options: Any) -> dict[str, Any]:
    return {"train_dataloaders": loader(**options), "val_dataloaders": loader(30, shuffle=False)}
