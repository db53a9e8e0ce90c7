"""How a run ends that fails in one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from ..models import Model, Points, train_data, train_val_data
from ..scenario import Script, feature

GROUP = "Errors"


class Fails(Model):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.rank is not None and batch_idx == 2 and self.global_rank == self.rank % self.trainer.world_size:
            raise ValueError(f"broken on rank {self.rank}")
        return super().training_step(batch, batch_idx)


class FailsInCallback(Callback):
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 2 and trainer.global_rank == 1:
            raise KeyError("broken callback")


class Interrupts(Model):
    """Ctrl-C, as Python delivers it, in one rank; what the callbacks of that rank see is noted."""

    def __init__(self, rank: int, stage: str) -> None:
        super().__init__()
        self.rank = rank
        self.stage = stage

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.stage == "train" and batch_idx == 2 and self.global_rank == self.rank % self.trainer.world_size:
            raise KeyboardInterrupt
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        if self.stage == "validate" and batch_idx == 1 and self.global_rank == self.rank % self.trainer.world_size:
            raise KeyboardInterrupt
        return super().validation_step(batch, batch_idx)


@feature("Ctrl-C in the first rank", GROUP, rank=0, stage="train", same_error="SystemExit", worlds=(2,))
@feature("Ctrl-C in a rank that does not lead", GROUP, rank=1, stage="train", same_error="SystemExit", worlds=(3,))
@feature("Ctrl-C in the last rank's validation", GROUP, rank=-1, stage="validate", same_error="SystemExit", worlds=(4,))
def interrupts(config: dict[str, Any], root: Path) -> Script:
    return Script(Interrupts(config["rank"], config["stage"]), train_val_data(), {"max_epochs": 1})


class FailsAt(Model):
    """Every rank fails at the same place."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def _here(self, where: str) -> None:
        if self.where == where:
            raise ValueError(f"broken in {where}")

    def setup(self, stage: str) -> None:
        self._here("setup")

    def configure_optimizers(self) -> Any:
        self._here("configure_optimizers")
        return super().configure_optimizers()

    def on_train_epoch_end(self) -> None:
        self._here("on_train_epoch_end")

    def backward(self, loss: Tensor) -> None:
        self._here("backward")
        loss.backward()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self._here("validation_step")
        return super().validation_step(batch, batch_idx)


class Breaks(Points):
    def __getitem__(self, index: int) -> Any:
        if index == 30:
            raise IndexError("broken sample")
        return super().__getitem__(index)


@feature("exception in setup", GROUP, where="setup", same_error="ValueError", worlds=(2,))
@feature("exception in configure_optimizers", GROUP, where="configure_optimizers", same_error="ValueError", worlds=(3,))
@feature("exception in backward", GROUP, where="backward", same_error="ValueError", worlds=(4,))
@feature("exception in validation", GROUP, where="validation_step", same_error="ValueError", worlds=(2,))
@feature("exception at the end of an epoch", GROUP, where="on_train_epoch_end", same_error="ValueError", worlds=(3,))
@feature("exception in a dataset", GROUP, where="dataset", same_error="IndexError", worlds=(3,))
def fails_everywhere(config: dict[str, Any], root: Path) -> Script:
    data = train_val_data()
    if config["where"] == "dataset":
        data = {"train_dataloaders": DataLoader(Breaks(48), batch_size=4)}
    return Script(FailsAt(config["where"]), data, {"max_epochs": 1})


@feature("exception in an EST that does not lead", GROUP, rank=1, where="step", same_error="ValueError", worlds=(2, 3))
@feature("exception in the last EST", GROUP, rank=-1, where="step", same_error="ValueError", worlds=(3,))
@feature("exception in a callback", GROUP, rank=None, where="callback", same_error="KeyError", worlds=(2, 3))
def fails(config: dict[str, Any], root: Path) -> Script:
    callbacks = [FailsInCallback()] if config["where"] == "callback" else []
    return Script(Fails(config["rank"]), train_data(), {"max_epochs": 1, "callbacks": callbacks})
