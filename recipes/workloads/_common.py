"""What all workloads share: the datamodule, and errors for packages and files that are missing."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader, Dataset


class Loaders(pl.LightningDataModule):
    """Shuffled training batches and validation batches in order.

    Args:
        train: training samples; Lightning puts in the distributed sampler.
        validation: the held-out ones.
        batch_size: training samples per rank and batch.
        validation_batch_size: default: ``batch_size``.
        collate: makes a batch of what the datasets give; default: torch's.

    Attributes:
        workers: processes that load, for each loader of a rank.
        persistent_workers: whether they live from epoch to epoch.
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
        self.workers, self.persistent_workers = 0, False

    def train_dataloader(self) -> DataLoader[Any]:
        """In a new order every epoch."""
        return self._loader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """In order."""
        return self._loader(self.validation, self.validation_batch_size, shuffle=False)

    def _loader(self, dataset: Dataset[Any], batch_size: int, *, shuffle: bool) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            collate_fn=self.collate,
            num_workers=self.workers,
            persistent_workers=self.persistent_workers,
        )


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
