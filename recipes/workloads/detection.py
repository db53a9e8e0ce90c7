"""Object detection with YOLOv3."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from . import yolov3
from ._common import Loaders
from .images import prepare_digits, read_digits
from .scenes import VOC, PastedDigits, RandomScenes


def prepare(directory: Path) -> None:
    """Write the digits."""
    prepare_digits(directory)


def build(workload: Mapping[str, Any], directory: Path) -> tuple[Detector, Loaders]:
    """The detector and its data; the number of classes is the data's."""
    size, length, batch_size = workload["image_size"], workload["samples"], workload["batch_size"]
    train: Any
    validation: Any
    if size % 32:
        raise ValueError(f"`workload.image_size={size}` is no multiple of 32, the largest stride of YOLOv3.")
    if workload["data"] == "small":
        train = PastedDigits(*read_digits(directory, validation=False), image_size=size, length=length, fixed=False)
        held_out = read_digits(directory, validation=True)
        validation = PastedDigits(*held_out, image_size=size, length=max(length // 10, 1), fixed=True)
    elif workload["data"] == "synthetic":
        train = RandomScenes(size, classes=workload["classes"], length=length)
        validation = RandomScenes(size, classes=workload["classes"], length=batch_size)
    else:
        root = Path(workload["path"])
        train = VOC(root, "train", image_size=size, augment=True)
        validation = VOC(root, "val", image_size=size, augment=False)
    net = yolov3.YOLOv3(train.classes, **workload["net"])
    return Detector(net, lr=workload["lr"]), Loaders(train, validation, batch_size=batch_size)


class Detector(pl.LightningModule):
    """YOLOv3's loss and Adam; mean average precision at an overlap of one half.

    Args:
        net: the network.
        lr: learning rate.
    """

    metric = "val_average_precision"
    chance = 0.0

    def __init__(self, net: yolov3.YOLOv3, *, lr: float) -> None:
        super().__init__()
        self.net, self.lr, self.shapes = net, lr, yolov3.shares(net.anchors)
        self.average_precision = AveragePrecision(net.classes)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        images, truths = batch
        return yolov3.loss(self.net(images), truths, self.shapes).total

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs loss and mean average precision over all ranks."""
        images, truths = batch
        outputs = self.net(images)
        self.log("val_loss", yolov3.loss(outputs, truths, self.shapes).total, sync_dist=True)
        self.average_precision.update(yolov3.detect(outputs, self.shapes), truths)
        self.log("val_average_precision", self.average_precision)

    def configure_optimizers(self) -> Any:
        """Adam, at a tenth of the learning rate for the last tenth of the run."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        steps = self.trainer.max_steps
        late = 10**9 if steps < 1 else max(int(0.9 * steps), 1)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [late])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class AveragePrecision(Metric):
    """Mean over classes of the area under precision by recall, a hit overlapping by at least one half.

    The area is that of PASCAL VOC since 2010: precision made to fall, over all points. `torchmetrics` has its own in
    `detection`, which needs torchvision.

    Args:
        classes: number of classes; those without an object do not count.
    """

    full_state_update = False

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.found: list[Tensor]
        self.objects: Tensor
        self.add_state("found", default=[], dist_reduce_fx="cat")
        self.add_state("objects", default=torch.zeros(classes), dist_reduce_fx="sum")

    def update(self, found: list[Tensor], truths: Tensor) -> None:
        """Add images.

        Args:
            found: for each image, rows of class, score and box, best first.
            truths: batch x objects x 5, class and box; class -1 fills up.
        """
        for rows, all_objects in zip(found, truths.cpu(), strict=True):
            objects = all_objects[all_objects[:, 0] >= 0]
            counts = torch.bincount(objects[:, 0].long(), minlength=self.classes)
            self.objects += counts.to(self.objects)
            hits, taken = torch.zeros(len(rows)), torch.zeros(len(objects), dtype=torch.bool)
            overlaps = yolov3.overlap(rows[:, None, 2:], objects[None, :, 1:])
            overlaps = overlaps * (rows[:, None, 0] == objects[None, :, 0])
            for number in range(len(rows)):
                if len(objects) and overlaps[number].max() >= 0.5:
                    best = overlaps[number].argmax()
                    hits[number] = float(~taken[best])  # a second box on an object is a miss
                    taken[best] = True
            self.found.append(torch.cat([rows[:, :2], hits[:, None]], 1).to(self.device))

    def compute(self) -> Tensor:
        """The mean average precision; 0 without an object."""
        found = dim_zero_cat(self.found).cpu() if len(self.found) else torch.zeros(0, 3)
        areas = []
        for number in self.objects.nonzero()[:, 0].tolist():
            rows = found[found[:, 0] == number]
            # As whole numbers, whose sums have no order: D2's `portable` policy vouches for no other `cumsum`.
            hits = rows[rows[:, 1].argsort(descending=True, stable=True), 2].long().cumsum(0).to(found)
            precision = hits / torch.arange(1, len(hits) + 1)
            recall = hits / self.objects[number].cpu()
            falling = precision.flip(0).cummax(0).values.flip(0)
            areas.append((falling * recall.diff(prepend=torch.zeros(1))).sum())
        return torch.stack(areas).mean() if areas else torch.zeros(())
