"""What all workloads share: the datamodule, and errors for packages and files that are missing."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader, Dataset


class Loaders(pl.LightningDataModule):
    """Shuffled training batches and validation batches in order, loaded in the main process.

    Args:
        train: training samples; Lightning puts in the distributed sampler.
        validation: the held-out ones.
        batch_size: training samples per rank and batch.
        validation_batch_size: default: ``batch_size``.
        collate: makes a batch of what the datasets give; default: torch's.
    """

    def __init__(
        self,
        train: Dataset[Any],
        validation: Dataset[Any],
        *,
        batch_size: int,
        validation_batch_size: int | None = None,
        collate: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__()
        self.train, self.validation, self.batch_size, self.collate = train, validation, batch_size, collate
        self.validation_batch_size = validation_batch_size or batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        """In a new order every epoch."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader[Any]:
        """In order."""
        return DataLoader(self.validation, batch_size=self.validation_batch_size, collate_fn=self.collate)


def package_file(package: str, name: str, *, hint: str) -> Path:
    """A data file that an installed package brings, found without importing the package.

    Raises:
        ImportError: if the package is not there.
        FileNotFoundError: if it has no such file.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"`{name}` comes with the package `{package}`, which is not installed. HINT: {hint}.")
    return existing(Path(spec.origin).parent / name)


def existing(path: Path) -> Path:
    """``path``.

    Raises:
        FileNotFoundError: if it is not there.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. HINT: `workload.path` names the folder of your data set.")
    return path
