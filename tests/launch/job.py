"""A small job with everything a rank can have: generators, buffers, a metric, several callbacks, augmentation."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from lightning_easyscale import EasyScaleStrategy

warnings.filterwarnings("ignore", "The '.*' does not have many workers")
warnings.filterwarnings("ignore", "The number of training batches")
warnings.filterwarnings("ignore", "You defined a `validation_step` but have no")


class Points(Dataset):
    """Points on the fly, jittered at every visit."""

    def __init__(self, samples: int = 48) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(samples, 6, generator=generator)
        self.y = torch.randint(0, 3, (samples,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index] + 0.1 * torch.randn(6), self.y[index]


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.get_rng_state()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 3))
        torch.set_rng_state(generator)
        self.seen = MeanMetric()
        self.losses: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.seen.update(loss)
        self.losses.append(loss.detach().numpy().tobytes().hex())
        self.log("train", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val", nn.functional.cross_entropy(self.net(x), y), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}


def loader(samples: int = 48, *, shuffle: bool = True, **options: Any) -> DataLoader:
    return DataLoader(Points(samples), batch_size=options.pop("batch_size", 4), shuffle=shuffle, **options)


def make_trainer(root: Any, *, strategy: Any = None, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": root,
    }
    return pl.Trainer(strategy=strategy or EasyScaleStrategy(num_ests=2), **{**defaults, **options})


def state_digest(trainer: pl.Trainer) -> str:
    """Digest of parameters, buffers, the lead's metric and optimizer state, and what was logged."""
    digest = hashlib.blake2b(digest_size=8)
    module = trainer.lightning_module
    tensors = [*module.state_dict().values(), *module.seen.metric_state.values()]
    for optimizer in trainer.optimizers:
        tensors += [v for state in optimizer.state_dict()["state"].values() for v in state.values()]
    tensors += [value for _, value in sorted(trainer.callback_metrics.items())]
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class SaveAt(Callback):
    """Saves a checkpoint after a number of batches."""

    def __init__(self, path: Path, batches: int) -> None:
        self.path = path
        self.batches = batches
        self.done = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.done += 1
        if self.done == self.batches:
            trainer.save_checkpoint(self.path)
