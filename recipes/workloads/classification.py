"""Image classification: ShuffleNetv2, ResNet50, VGG19, Swin, and a small convolutional net."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from ._common import Loaders
from .images import Digits, ImageFolder, RandomImages, prepare_digits, read_digits

_FUNCTIONS = {
    ("resnet50", "torchvision"): "resnet50",
    ("shufflenetv2", "torchvision"): "shufflenet_v2_x1_0",
    ("vgg19", "torchvision"): "vgg19",
    ("resnet50", "pytorchcv"): "resnet.resnet50b",
    ("shufflenetv2", "pytorchcv"): "shufflenetv2.shufflenetv2_w1",
    ("vgg19", "pytorchcv"): "vgg.vgg19",
}
_KNOWN = [("small_conv", "builtin"), ("swin", "transformers"), *_FUNCTIONS]


def prepare(directory: Path) -> None:
    """Write the digits."""
    prepare_digits(directory)


def build(workload: Mapping[str, Any], directory: Path) -> tuple[Classifier, Loaders]:
    """The classifier and its data; the number of classes is the data's."""
    data, classes = _data(workload, directory)
    net = build_net(
        workload["model"],
        workload["source"],
        classes=classes,
        channels=workload["channels"],
        image_size=workload["image_size"],
        **workload["net"],
    )
    return Classifier(net, classes=classes, lr=workload["lr"], adamw=workload["model"] == "swin"), data


def _data(workload: Mapping[str, Any], directory: Path) -> tuple[Loaders, int]:
    size, channels = workload["image_size"], workload["channels"]
    train: Any
    validation: Any
    if workload["data"] == "small":
        shape: dict[str, Any] = {"image_size": size, "channels": channels}
        train = Digits(*read_digits(directory, validation=False), augment=True, **shape)
        validation = Digits(*read_digits(directory, validation=True), augment=False, **shape)
        classes = 10
    elif workload["data"] == "synthetic":
        classes = workload["classes"]
        train = RandomImages((channels, size, size), classes=classes, length=workload["samples"])
        validation = RandomImages((channels, size, size), classes=classes, length=workload["batch_size"])
    else:
        root = Path(workload["path"])
        train = ImageFolder(root / "train", image_size=size, augment=True)
        validation = ImageFolder(root / "val", image_size=size, augment=False)
        if validation.classes != train.classes:
            raise ValueError(f"{root}: the folders in train and val differ. HINT: give both the same classes.")
        classes = len(train.classes)
    return Loaders(train, validation, batch_size=workload["batch_size"], validation_batch_size=64), classes


class Classifier(pl.LightningModule):
    """Cross-entropy; learning rate times 0.9 every epoch.

    Args:
        net: gives logits, batch x classes.
        classes: how many.
        lr: learning rate.
        adamw: train by AdamW, as transformers are (Liu et al. 2021, arXiv 2103.14030, section 4.1), instead of SGD with
            momentum.
    """

    metric = "val_accuracy"

    def __init__(self, net: nn.Module, *, classes: int, lr: float, adamw: bool = False) -> None:
        super().__init__()
        self.net, self.lr, self.chance, self.adamw = net, lr, 1 / classes, adamw
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch; logs the epoch's mean over all ranks."""
        images, labels = batch
        loss = functional.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs loss and accuracy over all ranks."""
        images, labels = batch
        logits = self.net(images)
        self.accuracy(logits, labels)
        self.log("val_loss", functional.cross_entropy(logits, labels), sync_dist=True)
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule."""
        optimizer: torch.optim.Optimizer
        if self.adamw:
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.05)
        else:
            optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)}


def build_net(
    model: str, source: str, *, classes: int, channels: int = 3, image_size: int = 224, **net: Any
) -> nn.Module:
    """A network that gives logits, batch x classes.

    Args:
        model: what to build.
        source: whose: the sources start from different weights for one seed.
        classes: number of logits.
        channels: of the images.
        image_size: pixels along an edge.
        net: for Swin, fields of transformers' `SwinConfig`, and ``attention``: ``sdpa`` or ``eager``.

    Raises:
        ValueError: for a model that ``source`` does not have.
        ImportError: if the package of ``source`` is missing.
    """
    if (model, source) not in _KNOWN:
        known = ", ".join(f"{m} from {s}" for m, s in _KNOWN)
        raise ValueError(f"`workload.model={model}` is not in `workload.source={source}`. HINT: there are {known}.")
    if model == "swin":
        return _Swin(classes, channels, image_size, **net)
    if net:
        raise ValueError(f"`workload.net={net}` does not fit {model}. HINT: leave it empty.")
    if model == "small_conv":
        return nn.Sequential(
            *(nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Dropout(0.25), nn.Linear(32 * (image_size // 4) ** 2, classes)),
        )
    return _foreign_net(model, source, classes, image_size)


def _foreign_net(model: str, source: str, classes: int, image_size: int) -> nn.Module:
    name = _FUNCTIONS[model, source]
    try:
        if source == "torchvision":
            net: nn.Module = getattr(importlib.import_module("torchvision.models"), name)(num_classes=classes)
            return net
        module, _, function = name.partition(".")
        made = getattr(importlib.import_module(f"pytorchcv.models.{module}"), function)
    except (ImportError, RuntimeError) as error:  # torchvision beside another torch build raises a RuntimeError
        raise ImportError(
            f"`workload.source={source}` cannot be imported: {error}. HINT: `make install-workloads` for pytorchcv;"
            " pip install 'lightning-easyscale[vision]' for torchvision, which may bring another torch."
        ) from error
    if model == "vgg19":
        # No pooling before its classifier: that takes what five halvings leave of the image.
        net = made(num_classes=classes, in_size=(image_size, image_size))
        edge = image_size // 32
        if edge != 7:
            net.output.fc1.fc = nn.Linear(512 * edge * edge, 4096)
        return net
    net = made(num_classes=classes)
    # Theirs is fixed to 7 x 7 positions.
    net.features.final_pool = nn.AdaptiveAvgPool2d(1)  # type: ignore[union-attr]
    return net


class _Swin(nn.Module):
    """Swin transformer v1 (Liu et al. 2021, arXiv 2103.14030), the defaults of `SwinConfig` being its tiny variant."""

    def __init__(self, classes: int, channels: int, image_size: int, *, attention: str = "sdpa", **net: Any) -> None:
        super().__init__()
        try:
            from transformers import SwinConfig, SwinForImageClassification
        except ImportError as error:
            raise ImportError(
                "`workload.source=transformers` needs transformers. HINT: pip install 'lightning-easyscale[workloads]'."
            ) from error
        config = SwinConfig(num_labels=classes, num_channels=channels, image_size=image_size, **net)
        self.model = SwinForImageClassification._from_config(config, attn_implementation=attention)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images).logits
        return logits
