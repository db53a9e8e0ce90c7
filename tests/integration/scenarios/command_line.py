"""LightningCLI and plugins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from ..models import Model, loader, train_data, train_val_data
from ..scenario import Script, feature, note

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


class Own(CheckpointIO):
    """A user's own, which writes beside the checkpoint how often it was called."""

    def __init__(self) -> None:
        self.saved = 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.saved += 1
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, path)
        Path(f"{path}.txt").write_text(str(self.saved))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        return torch.load(path, map_location, weights_only=False)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink()


def _fit_and_go_on(trainer: Any, script: Script, make_trainer: Any) -> None:
    trainer.fit(script.module, **script.data)
    trainer.test(ckpt_path="best", dataloaders=loader(24, shuffle=False))


KINDS = {
    "AsyncCheckpointIO": AsyncCheckpointIO,
    "AsyncCheckpointIO around another": lambda: AsyncCheckpointIO(TorchCheckpointIO()),
    "TorchCheckpointIO": TorchCheckpointIO,
    "a CheckpointIO of the user's": Own,
}


def checkpoint_io(config: dict[str, Any], root: Path) -> Script:
    saver = ModelCheckpoint(dirpath=root / "ckpt", monitor="val_loss", save_top_k=2)
    trainer = {"max_epochs": 2, "callbacks": [saver], "plugins": [KINDS[config["kind"]]()]}
    return Script(Model(), train_val_data(), trainer, main=_fit_and_go_on)


for _kind in KINDS:
    feature(_kind, GROUP, kind=_kind)(checkpoint_io)


class Cluster(LightningEnvironment):
    """A cluster environment of the user's, who starts the processes."""

    @property
    def creates_processes_externally(self) -> bool:
        return True


class TellsRanks(Model):
    def on_train_start(self) -> None:
        note(self.global_rank, "ranks", [self.local_rank, self.trainer.world_size, self.trainer.node_rank])


@feature("a cluster environment of the user's", GROUP)
def cluster(config: dict[str, Any], root: Path) -> Script:
    return Script(TellsRanks(), train_data(), {"max_epochs": 1, "plugins": [Cluster()]})
