"""One process of a run on a GPU: `python -m tests.gpu.job spec.json`, a stock DDP rank or an executor.

Several processes may share one GPU over gloo: each is started as a node of its own (``NODE_RANK=r``, one device).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_easyscale import DeterminismCallback, EasyScaleStrategy, RunRecord, ordered_allreduce_hook
from lightning_easyscale.reduction import inputs

from .features import FEATURES


class Block(nn.Module):
    """A residual block with BatchNorm."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.short = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.short(x))


def resnet() -> nn.Module:
    """A small residual net with dropout, 32 x 32 inputs, 10 classes."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 1, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        Block(32, 64, 2),
        Block(64, 128, 2),
        Block(128, 256, 2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(256 * 16, 10),
    )


class Transformer(nn.Module):
    """A small encoder with dropout over image rows, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(96, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.permute(0, 2, 1, 3).reshape(x.shape[0], 32, 96)
        return self.head(self.encoder(self.embed(rows)).mean(1))


class Images(Dataset):
    """Fixed random images with random augmentation drawn when an item is read."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(256, 3, 32, 32, generator=generator)
        self.y = torch.randint(0, 10, (256,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[i] + 0.1 * torch.randn(3, 32, 32), self.y[i]


class Model(pl.LightningModule):
    """Classifier with AdamW and a logged, synchronised loss."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net = resnet() if kind == "resnet" else Transformer()

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        x, y = batch
        x = x + 0.05 * torch.randn_like(x)  # on the device's generator
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss, on_epoch=True, sync_dist=True)
        return loss

    def on_train_batch_end(self, _: Any, batch: Any, __: int) -> None:
        # Greatest: whatever the order, the same bits.
        self.log("seen", batch[0].max(), sync_dist=True, reduce_fx="max")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


class SaveAt(Checkpoint):
    """Takes a checkpoint after the last step."""

    def __init__(self, path: str, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class TreeDDP(DDPStrategy):
    """Stock DDP with the ordered communication hook on any device."""

    def _register_ddp_hooks(self) -> None:
        self.model.register_comm_hook(None, ordered_allreduce_hook)


def main(spec: dict[str, Any]) -> None:
    """Train as the specification says."""
    pl.seed_everything(7, verbose=False)
    n, backend = spec["n"], spec["backend"]
    callbacks: list[Any] = [
        # A stage that stops inside an epoch logs that epoch's metrics early, so stages are compared without them.
        RunRecord(spec["record"], digest_at=spec["digest_at"], metrics=spec["metrics"])
    ]
    if spec["kind"] == "ddp":
        cls = TreeDDP if spec["reduction"] == "tree" else DDPStrategy
        strategy: Any = cls(process_group_backend=backend)
        callbacks.append(DeterminismCallback("D1", threads=2))
    else:
        inputs.WORTH = 1 << 16  # these batches are small
        strategy = EasyScaleStrategy(
            num_ests=n,
            ests_per_executor=spec["split"],
            reduction=spec["reduction"],
            overlap_backward=spec["overlap"],
            gradient_offload=spec["offload"],
            input_offload=spec["input_offload"],
            threads_per_est=2,
            process_group_backend=backend,
        )
    callbacks.append(SaveAt(spec["save"], spec["steps"]))
    feature = FEATURES.get(spec["model"])
    options = {"precision": spec["precision"], **(feature.trainer_options if feature is not None else {})}
    if spec["workload"] is not None:
        options |= {"limit_val_batches": 0}
    trainer = pl.Trainer(
        accelerator=spec["accelerator"],
        devices=spec["devices"],
        num_nodes=spec["num_nodes"],
        strategy=strategy,
        max_steps=spec["steps"],
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    if spec["workload"] is not None:
        from recipes.workloads import build

        module, data = build(spec["workload"], Path(spec["directory"]))
        trainer.fit(module, datamodule=data, ckpt_path=spec["resume"])
        return
    module = Model(spec["model"]) if feature is None else feature()
    data = DataLoader(
        Images(), batch_size=8, shuffle=True, pin_memory=feature is not None and torch.cuda.is_available()
    )
    trainer.fit(module, data, ckpt_path=spec["resume"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
