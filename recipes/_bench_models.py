"""What the benchmarks train: a ResNet-18, a tiny network and a module that does nothing, on synthetic data.

Their data is made once and held in memory, so that a step's time is the loop's and the model's.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

MODELS = ("resnet18", "tiny", "empty")
_BATCHES = 2


class _Block(nn.Module):
    """Two 3x3 convolutions with a short cut (He et al. 2015, arXiv 1512.03385, figure 5 left)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)),
            *(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18(classes: int = 1000) -> nn.Module:
    """The published ResNet-18, 11,689,512 parameters with 1000 classes; input ``[batch, 3, height, width]``."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    width = 64
    for outputs in (64, 128, 256, 512):
        layers += [_Block(width, outputs, 1 if outputs == width else 2), _Block(outputs, outputs, 1)]
        width = outputs
    # A mean instead of `AdaptiveAvgPool2d`, whose backward has no deterministic CUDA kernel.
    return nn.Sequential(*layers, _Mean(), nn.Linear(512, classes))


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def tiny() -> nn.Module:
    """A few thousand parameters with BatchNorm; input ``[batch, 3, height, width]``."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))


class BenchModule(pl.LightningModule):
    """Classifies synthetic images; the model ``empty`` computes nothing but the gradient of one number.

    Args:
        model: one of `MODELS`.
        image_size: pixels along an edge.
    """

    def __init__(self, model: str, image_size: int) -> None:
        super().__init__()
        self.empty = model == "empty"
        if self.empty:
            self.weight = nn.Parameter(torch.zeros(1))
            return
        self.net = resnet18() if model == "resnet18" else tiny()
        self.net.eval()
        with torch.no_grad():
            self.net(torch.zeros(1, 3, image_size, image_size))  # lazy shapes
        self.net.train()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss."""
        return self.weight.sum() if self.empty else nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class _Batches(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, image_size: int, batch_size: int, length: int, *, pin: bool) -> None:
        options: Any = {"generator": torch.Generator().manual_seed(0), "pin_memory": pin}
        images = torch.randn(_BATCHES, batch_size, 3, image_size, image_size, **options)
        labels = torch.randint(0, 10, (_BATCHES, batch_size), **options)
        self.batches = list(zip(images, labels, strict=True))
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.batches[index % _BATCHES]


def loader(model: str, image_size: int, batch_size: int, batches: int, *, pin: bool) -> DataLoader[Any]:
    """`batches` batches in all, over all ranks, from a few that were made at the start; loading them costs nothing.

    Args:
        model: one of `MODELS`.
        image_size: pixels along an edge.
        batch_size: samples per batch.
        batches: over all ranks.
        pin: keep them in pinned memory.
    """
    size = 1 if model == "empty" else image_size
    return DataLoader(_Batches(size, batch_size, batches, pin=pin), batch_size=None)


class _Repeated(Dataset[Any]):
    def __init__(self, batch: Any, length: int) -> None:
        self.batch, self.length = batch, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.batch


def repeated(data: pl.LightningDataModule, batches: int, *, pin: bool) -> DataLoader[Any]:
    """The first training batch of `data` again and again, `batches` times over all ranks; loading it costs nothing.

    Args:
        data: of a workload.
        batches: over all ranks.
        pin: keep it in pinned memory.
    """
    batch = next(iter(data.train_dataloader()))
    if pin:
        batch = apply_to_collection(batch, Tensor, Tensor.pin_memory)
    return DataLoader(_Repeated(batch, batches), batch_size=None)
