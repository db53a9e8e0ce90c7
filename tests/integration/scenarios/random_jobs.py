"""Random small jobs: architecture, optimizer, scheduler, accumulation, clipping and data drawn from a seed."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..scenario import Script


def draw(seed: int) -> dict[str, Any]:
    """What seed `seed` stands for."""
    pick = random.Random(seed)
    return {
        "kind": ("mlp", "conv", "embedding")[seed % 3],
        "depth": pick.randint(1, 3),
        "width": pick.choice((5, 8, 13)),
        "dropout": pick.choice((0.0, 0.2, 0.5)),
        "norm": pick.choice(("batch", "layer", "none")),
        "optimizer": pick.choice(("sgd", "momentum", "adam", "adamw", "rmsprop")),
        "scheduler": pick.choice(("none", "step", "cosine", "onecycle", "epoch")),
        "accumulate": pick.choice((1, 1, 2, 3)),
        "clip": pick.choice(("none", "none", "norm", "value")),
        "shuffle": pick.choice((True, True, False)),
        "noise": pick.choice((True, False)),
        "validate": pick.choice(("none", "epoch", "inside")),
        "bucket_cap_mb": pick.choice((None, None, 1)),
    }


class Samples(Dataset):
    def __init__(self, kind: str, n: int, noise: bool) -> None:
        generator = torch.Generator().manual_seed(n)
        if kind == "embedding":
            self.x = torch.randint(0, 20, (n, 4), generator=generator)
        else:
            self.x = torch.randn(n, *((3, 8, 8) if kind == "conv" else (6,)), generator=generator)
        self.y = torch.randint(0, 3, (n,), generator=generator)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = self.x[index]
        if self.noise:
            x = x.roll(random.randint(0, 2)) if x.dtype == torch.int64 else x + 0.1 * torch.randn(x.shape)
        return x, self.y[index]


def _layers(draws: dict[str, Any]) -> nn.Module:
    width, layers = draws["width"], []
    norms: dict[str, Any] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
    if draws["kind"] == "conv":
        channels = 3
        for _ in range(draws["depth"]):
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            if draws["norm"] != "none":
                layers.append(nn.BatchNorm2d(width) if draws["norm"] == "batch" else nn.GroupNorm(1, width))
            layers += [nn.ReLU(), nn.Dropout(draws["dropout"])]
            channels = width
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 3))
    size = 6
    if draws["kind"] == "embedding":
        layers, size = [nn.Embedding(20, width), nn.Flatten()], 4 * width
    for _ in range(draws["depth"]):
        layers.append(nn.Linear(size, width))
        if draws["norm"] != "none":
            layers.append(norms[draws["norm"]](width))
        layers += [nn.GELU(), nn.Dropout(draws["dropout"])]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, 3))


def _noisy(grad: Tensor) -> Tensor:
    return grad + 0.1 * random.random() * torch.randn_like(grad)


class RandomModel(LightningModule):
    def __init__(self, draws: dict[str, Any]) -> None:
        super().__init__()
        self.draws = draws
        self.net = _layers(draws)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        logits = self.net(x)
        if self.global_step >= self.draws.get("noisy_gradients_from", math.inf):
            logits.register_hook(_noisy)
        loss = F.cross_entropy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("synced", loss, on_step=False, on_epoch=True, sync_dist=True)
        return {"loss": loss, "logits": logits}

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("val", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        make: dict[str, Any] = {
            "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
            "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
            "adam": lambda p: torch.optim.Adam(p, lr=0.01),
            "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
            "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.003, momentum=0.5),
        }
        optimizer = make[self.draws["optimizer"]](self.parameters())
        schedules: dict[str, Any] = {
            "step": lambda: (torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7), "step"),
            "cosine": lambda: (torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10), "step"),
            "onecycle": lambda: (torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=60), "step"),
            "epoch": lambda: (torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "epoch"),
        }
        if self.draws["scheduler"] == "none":
            return optimizer
        scheduler, interval = schedules[self.draws["scheduler"]]()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}


def random_job(config: dict[str, Any], root: Path) -> Script:
    """Two epochs of six micro-batches per rank, the last one short; `config` has the seed, N and overrides."""
    draws = {**draw(config["seed"]), **config.get("override", {})}
    n = config["n"]
    train = Samples(draws["kind"], 6 * 3 * n - 2 * n + 1, draws["noise"])
    data: dict[str, Any] = {"train_dataloaders": DataLoader(train, batch_size=3, shuffle=draws["shuffle"])}
    trainer: dict[str, Any] = {
        "max_epochs": 2,
        "accumulate_grad_batches": draws["accumulate"],
        "gradient_clip_val": {"none": None, "norm": 0.5, "value": 0.05}[draws["clip"]],
        "gradient_clip_algorithm": None if draws["clip"] == "none" else draws["clip"],
    }
    if draws["validate"] != "none":
        data["val_dataloaders"] = DataLoader(Samples(draws["kind"], 5 * n, False), batch_size=3)
        trainer["val_check_interval"] = 1.0 if draws["validate"] == "epoch" else 0.5
    ddp = {} if draws["bucket_cap_mb"] is None else {"bucket_cap_mb": draws["bucket_cap_mb"]}
    return Script(RandomModel(draws), data, trainer, ddp)
