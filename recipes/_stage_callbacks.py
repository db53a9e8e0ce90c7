"""Callbacks of a stage: where it ends, how fast its emulated devices are, what it reports meanwhile."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Checkpoint


class SaveAtEnd(Checkpoint):
    """Ends the stage and takes the on-demand checkpoint there; as a `Checkpoint`, it comes after every other callback.

    Args:
        save: the checkpoint to write.
        end_step: optimizer steps after which it is written, at most the Trainer's ``max_steps``.
        control: file whose appearance ends the stage earlier; rank 0 looks for it after every step.
    """

    def __init__(self, save: str, *, end_step: int, control: str | None) -> None:
        super().__init__()
        self.save, self.end_step, self.control = save, end_step, control

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after the last step, or after the one at which the stage was told to end."""
        ends = trainer.global_step == self.end_step
        if not ends and self.control is not None:
            ends = trainer.strategy.broadcast(trainer.is_global_zero and Path(self.control).exists())
        if ends:
            trainer.fit_loop.epoch_loop.max_steps = trainer.global_step
            trainer.save_checkpoint(self.save)


class Pace(Callback):
    """Makes every EST sleep in its mini-batch, so that an emulated device takes the time it is meant to.

    Between forward and backward, where a slow device would be slow: all devices begin a forward together, because its
    first act is to take over the buffers of EST 0.

    Args:
        pace: ``(first step, seconds per executor)``, ascending.
    """

    def __init__(self, pace: Sequence[tuple[int, Sequence[float]]]) -> None:
        self.pace = pace

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        """Sleep; the other ESTs of the executor wait for their turn meanwhile, as for any computation."""
        self._sleep(trainer)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Sleep in validation too."""
        self._sleep(trainer)

    def _sleep(self, trainer: pl.Trainer) -> None:
        executor = getattr(trainer.strategy, "executor_index", trainer.global_rank)
        seconds = [row[executor] for first, row in self.pace if first <= trainer.global_step]
        if seconds:
            time.sleep(seconds[-1])


class StepReport(Callback):
    """Appends a line per step, ``step time waited``, to a file per executor.

    ``time`` is `time.monotonic` where the step starts on the lead, ``waited`` the seconds spent waiting for other
    executors so far. The last line is the end of the last step.

    Args:
        file: name without the executor's number.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.open: TextIO | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the file; only the lead of an executor reports."""
        strategy: Any = trainer.strategy
        if strategy.is_lead:
            path = Path(f"{self.file}.{strategy.executor_index}")
            path.parent.mkdir(parents=True, exist_ok=True)
            self.open = path.open("a", buffering=1)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A step starts."""
        self._line(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last step has ended."""
        self._line(trainer)
        if self.open is not None:
            self.open.close()
            self.open = None

    def _line(self, trainer: pl.Trainer) -> None:
        if self.open is not None:
            strategy: Any = trainer.strategy
            print(trainer.global_step, time.monotonic(), strategy.session.peers.waited_s, file=self.open)


def read_report(file: str | Path, executor: int) -> list[tuple[int, float, float]]:
    """What a `StepReport` wrote, complete lines only; empty while there is none."""
    path = Path(f"{file}.{executor}")
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [(int(step), float(at), float(waited)) for step, at, waited in map(str.split, lines)]
