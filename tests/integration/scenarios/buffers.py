"""Buffers that rank 0's forwards and hooks change, more than travel in a header, and what a step then costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from ..models import Model, train_val_data
from ..scenario import Script


class Buffers(Model):
    """BatchNorm beside buffers of other types; the rank changes some between the end of a step and the next forward."""

    def __init__(self) -> None:
        super().__init__(width=200)
        self.register_buffer("flags", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("low", torch.zeros(5, dtype=torch.bfloat16))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net[1].running_mean.add_(0.01 * (self.global_rank + 1))
        self.low.add_(self.global_rank + batch_idx)
        self.flags[batch_idx % 3] = self.global_rank == 0

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + self.low.sum() * self.flags.sum() / 1000


class Messages(Callback):
    """Prints how many messages each step of an executor took, from one forward to the next."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        session = getattr(trainer.strategy, "session", None)
        if session is not None:
            self.seen.append(session.peers.physical_collectives)

    def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
        steps = zip(self.seen, self.seen[1:], strict=False)
        print("messages per step:", *(after - before for before, after in steps), flush=True)
        self.seen.clear()


def buffers_job(config: dict[str, Any], root: Path) -> Script:
    """Two epochs with a validation in the middle of each and one at its end."""
    trainer = {"max_epochs": 2, "val_check_interval": 0.5, "callbacks": [Messages()]}
    return Script(Buffers(), train_val_data(n=64 * config["n"]), trainer)
