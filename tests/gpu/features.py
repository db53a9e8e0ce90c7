"""Features of stock DDP that need a CUDA device, as jobs of `tests.gpu.job`. What a step returns is compared."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import nn as dnn
from torch.utils.checkpoint import checkpoint


class Feature(pl.LightningModule):
    """A convolutional classifier with BatchNorm and dropout."""

    trainer_options: dict[str, Any] = {}
    group = "Collectives"  # of the table of features

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1)
        )
        self.head = nn.Sequential(nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32 * 64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Synchronized(Feature):
    """`sync_batchnorm=True`: statistics over all ranks, with collectives in forward and backward."""

    trainer_options = {"sync_batchnorm": True}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        norms = [m for m in self.modules() if isinstance(m, nn.SyncBatchNorm)]
        assert len(norms) == 2
        return {"loss": loss, "mean": norms[0].running_mean.clone(), "variance": norms[1].running_var.clone()}


class Skips(Feature):
    """`16-mixed`: one rank's loss overflows in the third batch, so all skip the step and halve the scale."""

    trainer_options = {"precision": "16-mixed", "gradient_clip_val": 0.5}
    group = "Precision"

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2 and self.global_rank == self.trainer.world_size - 1:
            loss = loss * 1e38
        scaler = self.trainer.precision_plugin.scaler  # type: ignore[attr-defined]
        steps = [state["step"] for state in self.optimizers().optimizer.state.values()]  # type: ignore[union-attr]
        taken = steps[0].detach().clone() if steps else torch.zeros(())
        return {"loss": loss, "scale": torch.tensor(scaler.get_scale()), "steps": taken}

    def on_train_end(self) -> None:
        scaler = self.trainer.precision_plugin.scaler  # type: ignore[attr-defined]
        assert scaler.get_scale() == 2.0**15, "no step was skipped"


class Collectives(Feature):
    """Collectives of device tensors in the step and in its backward, inside recomputed activations too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        features = nn.functional.normalize(self(x), dim=-1)
        everyone = self.all_gather(features, sync_grads=True).reshape(-1, features.shape[-1])
        logits = features @ everyone.T
        target = torch.arange(len(x), device=self.device) + self.global_rank * len(x)
        loss = nn.functional.cross_entropy(logits, target)
        loss = loss + dnn.functional.all_reduce(features.square().mean()) / self.trainer.world_size
        summed, spread = torch.randn(70_001, device=self.device), torch.randn(5, device=self.device)
        dist.all_reduce(summed)
        dist.broadcast(spread, 1)
        parts = [torch.empty_like(spread) for _ in range(self.trainer.world_size)]
        dist.all_gather(parts, spread + self.global_rank)
        objects: list[Any] = [None] * self.trainer.world_size
        dist.all_gather_object(objects, {"rank": self.global_rank, "largest": spread.max()})
        largest = torch.stack([o["largest"].cpu() for o in objects])
        return {"loss": loss, "summed": summed, "spread": spread, "parts": torch.cat(parts), "largest": largest}


class Transfer(Feature):
    """Batch-transfer hooks: pinned batches, a transfer of the user's, augmentation drawn on the device."""

    group = "Data"

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + 0.01 * torch.randn_like(batch[0]), batch[1]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return tuple(part.to(device, non_blocking=True) for part in batch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        x = x * torch.empty(len(x), 1, 1, 1, device=x.device).uniform_(0.8, 1.2) + 0.1 * torch.randn_like(x)
        return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x), y

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "augmented": batch[0]}


FEATURES: dict[str, type[Feature]] = {
    "SyncBatchNorm": Synchronized,
    "skipped step under 16-mixed": Skips,
    "collectives in the step": Collectives,
    "transfer hooks": Transfer,
}
