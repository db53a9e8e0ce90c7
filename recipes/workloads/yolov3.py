"""The YOLOv3 network and its loss (Redmon and Farhadi 2018, arXiv 1804.02767).

Darknet-53 with heads at strides 32, 16 and 8, three anchors each; 61,949,149 parameters with 80 classes. A head gives,
for every cell and anchor, four numbers of the box, one of there being an object, and one per class. No
operation here lacks a deterministic kernel on CUDA: the upsampling repeats pixels by a view, whose backward is a sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

ANCHORS = ((10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326))
"""Width and height in pixels at 416 x 416, as published for COCO; smallest first."""

STRIDES = (32, 16, 8)
_IGNORE_ABOVE = 0.5  # a prediction that overlaps an object more than this is not told that there is none
# Probability of an object at the start: nearly all cells are empty, and from 0.5 their sum would hide all else from the
# optimizer for hundreds of steps (Lin et al. 2017, arXiv 1708.02002, section 4.1).
_PRIOR = 0.01


def shares(anchors: Sequence[Sequence[float]] = ANCHORS) -> Tensor:
    """Width and height of nine anchors at 416 x 416 as shares of the image, for each stride its three: 3 x 3 x 2.

    Raises:
        ValueError: if they are not nine pairs.
    """
    if len(anchors) != 9 or any(len(pair) != 2 for pair in anchors):
        raise ValueError(f"`workload.net.anchors={anchors}` must be nine pairs of width and height, smallest first.")
    return torch.tensor(anchors).view(3, 3, 2).flip(0) / 416


class _Unit(nn.Sequential):
    """Convolution, BatchNorm, leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(0.1),
        )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_Unit(width, width // 2, 1), _Unit(width // 2, width, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class _Head(nn.Module):
    """Five convolutions, whose result the next head takes too, then the outputs."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(_Unit(inputs, width, 1), _Unit(width, 2 * width, 3), _Unit(2 * width, width, 1)),
            *(_Unit(width, 2 * width, 3), _Unit(2 * width, width, 1)),
        )
        last = nn.Conv2d(2 * width, outputs, 1)
        assert last.bias is not None
        nn.init.constant_(last.bias.view(3, -1)[:, 4], -math.log(1 / _PRIOR - 1))
        self.out = nn.Sequential(_Unit(width, 2 * width, 3), last)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        return x, self.out(x)


class YOLOv3(nn.Module):
    """The network; input batch x 3 x height x width, multiples of 32.

    Args:
        classes: number of classes.
        width: factor of the number of channels; 1 is the published network.
        depths: residual blocks after each halving; the default is Darknet-53.
        anchors: width and height in pixels at 416 x 416, smallest first: three each for strides 8, 16 and 32.
    """

    def __init__(
        self,
        classes: int,
        *,
        width: float = 1.0,
        depths: Sequence[int] = (1, 2, 8, 8, 4),
        anchors: Sequence[Sequence[float]] = ANCHORS,
    ) -> None:
        super().__init__()
        self.classes, self.anchors = classes, anchors
        c = [int(width * channels) for channels in (32, 64, 128, 256, 512, 1024)]
        self.stem = _Unit(3, c[0], 3)
        self.stages = nn.ModuleList(
            nn.Sequential(_Unit(c[i], c[i + 1], 3, 2), *(_Residual(c[i + 1]) for _ in range(depth)))
            for i, depth in enumerate(depths)
        )
        outputs = 3 * (5 + classes)
        self.heads = nn.ModuleList(
            [
                _Head(c[5], c[4], outputs),
                _Head(c[4] + c[3], c[3], outputs),
                _Head(c[3] + c[2], c[2], outputs),
            ]
        )
        self.laterals = nn.ModuleList([_Unit(c[4], c[3], 1), _Unit(c[3], c[2], 1)])

    def forward(self, images: Tensor) -> list[Tensor]:
        """For each stride of `STRIDES`: batch x 3 x rows x columns x (5 + classes), before any sigmoid."""
        x, features = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        outputs = []
        for number, head in enumerate(self.heads):
            if number:
                x = torch.cat([_doubled(self.laterals[number - 1](x)), features[-1 - number]], dim=1)
            x, out = head(x)
            batch, _, rows, columns = out.shape
            outputs.append(out.view(batch, 3, 5 + self.classes, rows, columns).permute(0, 1, 3, 4, 2))
        return outputs


def _doubled(x: Tensor) -> Tensor:
    """Every pixel twice in both directions."""
    batch, channels, rows, columns = x.shape
    wide = x[:, :, :, None, :, None].expand(batch, channels, rows, 2, columns, 2)
    return wide.reshape(batch, channels, 2 * rows, 2 * columns)


@dataclass(frozen=True)
class Loss:
    """Parts of the loss, each a sum over the batch divided by its images."""

    box: Tensor
    objectness: Tensor
    classes: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum."""
        return self.box + self.objectness + self.classes


def loss(outputs: list[Tensor], truths: Tensor, shapes: Tensor) -> Loss:
    """The three-scale detection loss.

    Every object belongs to the anchor, of all nine, whose shape overlaps it most, in the cell of its centre. There the
    box is fitted (centre by binary cross-entropy, logarithm of width and height by squared error, both weighed by
    2 minus the object's share of the image), objectness is pulled to 1, and each class has a cross-entropy of its own.
    Elsewhere objectness is pulled to 0, except where the predicted box overlaps an object by more than a half.

    Args:
        outputs: of the network.
        truths: batch x objects x 5: class, centre x, centre y, width, height as shares of the image; class -1 fills up.
        shapes: the anchors, as `shares` gives them.
    """
    batch, classes = len(truths), outputs[0].shape[-1] - 5
    shapes = shapes.to(truths.device)
    there = truths[..., 0] >= 0
    image, number = there.nonzero(as_tuple=True)
    objects = truths[image, number]
    best = _shape_overlap(objects[:, None, 3:], shapes.view(1, 9, 2)).argmax(1)
    parts = [torch.zeros((), device=truths.device) for _ in range(3)]
    for scale, out in enumerate(outputs):
        rows, columns = out.shape[2:4]
        with torch.no_grad():
            boxes = decode(out, shapes[scale])
            overlaps = overlap(boxes.view(batch, -1, 1, 4), truths[:, None, :, 1:]) * there[:, None]
            wanted = torch.zeros(out.shape[:-1], device=out.device)
            counts = (overlaps.amax(2) <= _IGNORE_ABOVE).view(out.shape[:-1]).to(wanted.dtype)
        chosen = best // 3 == scale
        mine, where = objects[chosen], image[chosen]
        anchor = best[chosen] % 3
        centre = mine[:, 1:3] * torch.tensor([columns, rows], device=mine.device)
        column, row = centre.floor().long().unbind(1)
        column, row = column.clamp(0, columns - 1), row.clamp(0, rows - 1)
        wanted[where, anchor, row, column] = 1.0
        counts[where, anchor, row, column] = 1.0
        entropy = functional.binary_cross_entropy_with_logits
        found = out[where, anchor, row, column]
        weight = (2 - mine[:, 3:4] * mine[:, 4:5]).clamp(1, 2)
        offset = (centre - torch.stack([column, row], 1)).clamp(0, 1)
        size = torch.log(mine[:, 3:5].clamp_min(1e-6) / shapes[scale][anchor])
        parts[0] = parts[0] + entropy(found[:, :2], offset, weight.expand(-1, 2), reduction="sum")
        parts[0] = parts[0] + (weight * (found[:, 2:4] - size).square()).sum() / 2
        parts[1] = parts[1] + entropy(out[..., 4], wanted, counts, reduction="sum")
        labels = functional.one_hot(mine[:, 0].long(), classes).to(out.dtype)
        parts[2] = parts[2] + entropy(found[:, 5:], labels, reduction="sum")
    return Loss(*(part / batch for part in parts))


def decode(out: Tensor, shapes: Tensor) -> Tensor:
    """Boxes of one scale: batch x 3 x rows x columns x 4, centre, width and height as shares of the image.

    Args:
        out: what the network gives for the scale.
        shapes: its anchors, 3 x 2, as shares of the image.
    """
    rows, columns = out.shape[2:4]
    x = (torch.arange(columns, device=out.device) + out[..., 0].sigmoid()) / columns
    y = (torch.arange(rows, device=out.device)[:, None] + out[..., 1].sigmoid()) / rows
    size = shapes[:, None, None] * out[..., 2:4].clamp(max=8).exp()
    return torch.cat([x[..., None], y[..., None], size], dim=-1)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes, ... x 4 as centre, width and height; leading dimensions broadcast."""
    low = torch.maximum(a[..., :2] - a[..., 2:] / 2, b[..., :2] - b[..., 2:] / 2)
    high = torch.minimum(a[..., :2] + a[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2)
    common = (high - low).clamp_min(0).prod(-1)
    return common / (a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - common).clamp_min(1e-12)


def _shape_overlap(a: Tensor, b: Tensor) -> Tensor:
    common = torch.minimum(a, b).prod(-1)
    return common / (a.prod(-1) + b.prod(-1) - common).clamp_min(1e-12)


def detect(outputs: list[Tensor], shapes: Tensor, *, above: float = 0.05, most: int = 50) -> list[Tensor]:
    """Boxes found in each image: found x 6, class, score, centre x and y, width, height; best first.

    Args:
        outputs: of the network.
        shapes: the anchors, as `shares` gives them.
        above: least score, objectness times probability of the class.
        most: boxes of an image.
    """
    shapes = shapes.to(outputs[0].device)
    boxes = torch.cat([decode(out, shapes[i]).flatten(1, 3) for i, out in enumerate(outputs)], 1).cpu()
    flat = torch.cat([out.flatten(1, 3) for out in outputs], 1).sigmoid().cpu()
    scores, labels = (flat[..., 4:5] * flat[..., 5:]).max(2)
    found = []
    for box, score, label in zip(boxes, scores, labels, strict=True):
        order = score.argsort(descending=True, stable=True)
        order = order[score[order] > above][: 8 * most]
        rows = torch.cat([label[order, None].to(box.dtype), score[order, None], box[order]], 1)
        found.append(_without_doubles(rows)[:most])
    return found


def _without_doubles(rows: Tensor, limit: float = 0.45) -> Tensor:
    """Non-maximum suppression: a box goes if it overlaps a better one of its class by more than ``limit``."""
    doubles = (overlap(rows[:, None, 2:], rows[None, :, 2:]) > limit) & (rows[:, None, 0] == rows[None, :, 0])
    kept = torch.ones(len(rows), dtype=torch.bool)
    for index in range(len(rows)):
        if kept[index]:
            kept[index + 1 :] &= ~doubles[index, index + 1 :]
    return rows[kept]
