"""What an EST does with checkpoints, and with the loaders whose positions they hold.

The work is `checkpointing`'s; here it is hung into what Lightning calls of a strategy.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO

from . import _lightning as pl
from .checkpoint import seal
from .checkpointing import Checkpointing, EasyScaleCheckpointIO
from .model_strategy import ModelStrategy
from .snapshot import ESTState
from .stopping import shield_workers


class CheckpointStrategy(ModelStrategy):
    """The part of `EasyScaleStrategy` that saves and restores."""

    checkpointing: Checkpointing

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """Ours, which commits atomically and verifies, unless the user gave another."""
        if self._checkpoint_io is None:
            self._checkpoint_io = EasyScaleCheckpointIO()
        elif isinstance(self._checkpoint_io, AsyncCheckpointIO) and self._checkpoint_io.checkpoint_io is None:
            self._checkpoint_io.checkpoint_io = EasyScaleCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO | None) -> None:
        self._checkpoint_io = io

    def est_state(self) -> ESTState:
        """What this EST saves and restores beyond a Lightning checkpoint."""
        assert self.session is not None
        assert self.lightning_module is not None
        generators = self.session.contexts[self.global_rank].generators
        return ESTState(self.lightning_module.trainer, generators, self.checkpointing.follower)

    def process_dataloader(self, dataloader: Any) -> Any:
        """Follow the position of training loaders; let all loaders share workers, which outlive stop signals."""
        shield_workers(dataloader, self.global_rank)
        module, follower = self.lightning_module, self.checkpointing.follower
        if module is not None and module.trainer.training:
            follower.attach(dataloader)
        else:
            follower.share(dataloader)
        return dataloader

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a Lightning checkpoint with every EST's state in its ``easyscale`` entry."""
        # Without a session the ESTs lived in processes that have ended (`start_method="spawn"`).
        stopped = self.session is not None and self.global_rank in self.session.leaving
        if "optimizer_states" in checkpoint and self.session is not None and not stopped:
            self.checkpointing.note_written(filepath)
            self.checkpointing.complete(checkpoint)
            if self.is_global_zero:
                seal(checkpoint)
        if self.is_global_zero and isinstance(self.checkpoint_io, AsyncCheckpointIO):
            checkpoint = pl.copied_for_later(checkpoint)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; a `fit` that resumes it must be the same job."""
        return self.checkpointing.load(checkpoint_path, weights_only)

    def on_train_start(self) -> None:
        """Restore what is the EST's own."""
        super().on_train_start()
        self.checkpointing.resume()
