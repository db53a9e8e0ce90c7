"""LightningCLI and plugins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from ..models import Model, loader, train_val_data
from ..scenario import Script, feature

GROUP = "Command line and plugins"


def _cli(trainer: Any, script: Script, make_trainer: Any) -> None:
    from lightning.pytorch import LightningDataModule
    from lightning.pytorch.cli import LightningCLI

    class Digits(LightningDataModule):
        def __init__(self, n: int = 40) -> None:
            super().__init__()
            self.n = n

        def train_dataloader(self) -> Any:
            return loader(self.n)

    class FromCommandLine(LightningCLI):
        def instantiate_trainer(self, **kwargs: Any) -> Any:
            return trainer

    FromCommandLine(Model, Digits, args=["fit", "--model.lr=0.05", "--data.n=36"], save_config_callback=None)


@feature("LightningCLI", GROUP, files=False, skip_without="jsonargparse")
def command_line(config: dict[str, Any], root: Path) -> Script:
    return Script(Model(), {}, {"max_epochs": 1}, main=_cli)


@feature("AsyncCheckpointIO", GROUP)
def async_checkpoints(config: dict[str, Any], root: Path) -> Script:
    saver = ModelCheckpoint(dirpath=root / "ckpt", monitor="val_loss", save_top_k=2)
    trainer = {"max_epochs": 2, "callbacks": [saver], "plugins": [AsyncCheckpointIO()]}
    return Script(Model(), train_val_data(), trainer)
