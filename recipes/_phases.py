"""What the executors of a live job are doing right now, kept in a file that survives them and costs a step nothing.

One slot per executor: its process id and a number. The lead EST of each writes through a memory map; whoever wants to
disturb the job at a chosen moment reads.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

_SLOT = struct.Struct("<qq")
_SLOTS = 64
PHASES = ("between", "training", "accumulation", "validation")


class Phases(Callback):
    """Writes the phase of this executor.

    ``accumulation``: gradients of an unfinished window wait; ``validation``; else ``training``.

    Args:
        file: the file.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.map: mmap.mmap | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the file; only the lead of an executor reports."""
        if trainer.strategy.is_lead:  # type: ignore[attr-defined]
            with open(self.file, "a+b") as file:
                file.truncate(_SLOT.size * _SLOTS)
                self.map = mmap.mmap(file.fileno(), 0)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A window begins or goes on."""
        self._note(trainer, "accumulation" if batch_idx % trainer.accumulate_grad_batches else "training")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A window has ended or goes on."""
        self._note(trainer, "accumulation" if (batch_idx + 1) % trainer.accumulate_grad_batches else "training")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation."""
        self._note(trainer, "validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training goes on."""
        self._note(trainer, "training")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Not training any more."""
        self._note(trainer, "between")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Not training any more."""
        self._note(trainer, "between")

    def _note(self, trainer: pl.Trainer, phase: str) -> None:
        if self.map is not None:
            executor: int = trainer.strategy.executor_index  # type: ignore[attr-defined]
            _SLOT.pack_into(self.map, executor * _SLOT.size, os.getpid(), PHASES.index(phase))


def read_phases(file: str | Path) -> dict[int, str]:
    """Process id -> phase, of every executor that has ever written to its slot last."""
    try:
        raw = Path(file).read_bytes()
    except FileNotFoundError:
        return {}
    slots = _SLOT.iter_unpack(raw[: len(raw) // _SLOT.size * _SLOT.size])
    return {pid: PHASES[phase] for pid, phase in slots if pid}
