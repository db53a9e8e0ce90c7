"""Pictures with boxes: digits pasted on photographs, random noise, or PASCAL VOC.

Every sample is an image, 3 x image_size x image_size, and ``most`` rows of class, centre x, centre y, width and height
as shares of the image, filled up with rows of class -1.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.utils.data import Dataset

from ._common import existing
from .images import normalised

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def photographs() -> Tensor:
    """The two photographs that scikit-learn brings, 2 x 3 x 427 x 640, normalised.

    Raises:
        ImportError: if scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise ImportError("The photographs come with scikit-learn. HINT: pip install scikit-learn.") from error
    return torch.stack([normalised(picture) for picture in load_sample_images().images])


class PastedDigits(Dataset[tuple[Tensor, Tensor]]):
    """One to four white digits, none upon another, in random sizes and places on a random part of a photograph.

    Args:
        images: uint8, n x 28 x 28.
        labels: int64, n.
        image_size: pixels along an edge.
        length: samples of an epoch.
        fixed: the same samples every time, drawn from their index; otherwise from torch's default generator.
    """

    classes = 10

    def __init__(self, images: np.ndarray, labels: np.ndarray, *, image_size: int, length: int, fixed: bool) -> None:
        self.digits = torch.from_numpy(images).float().div_(255)
        self.labels = torch.from_numpy(labels)
        self.photographs, self.white = photographs(), normalised(np.full((1, 1, 3), 255, dtype=np.uint8))
        self.image_size, self.length, self.fixed = image_size, length, fixed

    def __len__(self) -> int:
        """Samples of an epoch."""
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One picture and its boxes."""
        generator = torch.Generator().manual_seed(index) if self.fixed else None

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=generator))

        size, most = self.image_size, 4
        photograph = self.photographs[draw(0, len(self.photographs))]
        edge = draw(size, min(photograph.shape[1:]) + 1)
        top, left = (draw(0, whole - edge + 1) for whole in photograph.shape[1:])
        part = photograph[None, :, top : top + edge, left : left + edge]
        image = functional.interpolate(part, (size, size), mode="bilinear")[0]
        boxes = torch.full((most, 5), -1.0)
        free, number = torch.ones(size, size, dtype=torch.bool), 0
        for _ in range(draw(4, 12)):
            which, pixels = draw(0, len(self.labels)), draw(size // 5, size // 2)
            x, y = draw(0, size - pixels + 1), draw(0, size - pixels + 1)
            if number == most or not free[y : y + pixels, x : x + pixels].all():
                continue  # digits on top of each other cannot be read
            free[y : y + pixels, x : x + pixels] = False
            ink = functional.interpolate(self.digits[which][None, None], (pixels, pixels), mode="bilinear")[0, 0]
            place = image[:, y : y + pixels, x : x + pixels]
            place.copy_(place * (1 - ink) + self.white * ink)
            rows, columns = (ink.amax(dim) > 0.2 for dim in (1, 0))
            first, last = (int(rows.nonzero()[i]) for i in (0, -1))
            start, end = (int(columns.nonzero()[i]) for i in (0, -1))
            box = [x + (start + end + 1) / 2, y + (first + last + 1) / 2, end + 1 - start, last + 1 - first]
            boxes[number] = torch.tensor([float(self.labels[which]), *(value / size for value in box)])
            number += 1
        return image, boxes


class RandomScenes(Dataset[tuple[Tensor, Tensor]]):
    """Noise with four random boxes; a few images, repeated, so that reading one costs nothing.

    Args:
        image_size: pixels along an edge.
        classes: number of classes.
        length: images of an epoch.
    """

    def __init__(self, image_size: int, *, classes: int, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(16, 3, image_size, image_size, generator=generator)
        self.boxes = 0.1 + 0.3 * torch.rand(16, 4, 5, generator=generator)
        self.boxes[..., 0] = torch.randint(0, classes, (16, 4), generator=generator).float()
        self.classes, self.length = classes, length

    def __len__(self) -> int:
        """Images of an epoch."""
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One image and its boxes."""
        return self.images[index % 16], self.boxes[index % 16]


class VOC(Dataset[tuple[Tensor, Tensor]]):
    """PASCAL VOC as it is distributed: ``JPEGImages``, ``Annotations`` and ``ImageSets/Main``.

    Pictures are stretched to a square; objects marked difficult are left out.

    Args:
        root: the folder of a year, ``VOCdevkit/VOC2012``.
        part: a list in ``ImageSets/Main``: ``train``, ``val``, ``trainval``.
        image_size: pixels along an edge.
        augment: mirror half of the pictures.
        most: objects of a picture that are kept.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: for an object of no VOC class.
    """

    classes = len(VOC_CLASSES)

    def __init__(self, root: Path, part: str, *, image_size: int, augment: bool, most: int = 50) -> None:
        names = existing(root / "ImageSets" / "Main" / f"{part}.txt").read_text().split()
        self.files = [str(existing(root / "JPEGImages" / f"{name}.jpg")) for name in names]
        self.boxes = [_voc_boxes(existing(root / "Annotations" / f"{name}.xml"), most) for name in names]
        self.image_size, self.augment = image_size, augment

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One picture and its boxes; draws from the default generator when augmenting."""
        from PIL import Image

        with Image.open(self.files[index]) as picture:
            small = picture.convert("RGB").resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
        image, boxes = normalised(np.asarray(small)), self.boxes[index].clone()
        if self.augment and torch.rand(()) < 0.5:
            image = image.flip(2)
            boxes[boxes[:, 0] >= 0, 1] = 1 - boxes[boxes[:, 0] >= 0, 1]
        return image, boxes


def _voc_boxes(file: Path, most: int) -> Tensor:
    root = ElementTree.parse(file).getroot()
    width, height = (_number(root.find("size"), key) for key in ("width", "height"))
    rows: list[list[float]] = []
    for item in root.iter("object"):
        if item.findtext("difficult", "0").strip() == "1":
            continue
        name = item.findtext("name", "").strip()
        if name not in VOC_CLASSES:
            raise ValueError(f"{file} has an object {name!r}. HINT: the classes are {', '.join(VOC_CLASSES)}.")
        left, top, right, bottom = (_number(item.find("bndbox"), key) for key in ("xmin", "ymin", "xmax", "ymax"))
        # Pixels are counted from 1 and both ends belong to the box.
        centre = [(left - 1 + right) / 2 / width, (top - 1 + bottom) / 2 / height]
        rows.append([VOC_CLASSES.index(name), *centre, (right - left + 1) / width, (bottom - top + 1) / height])
    boxes = torch.full((most, 5), -1.0)
    if rows:
        boxes[: len(rows[:most])] = torch.tensor(rows[:most])
    return boxes


def _number(element: Any, key: str) -> float:
    text = element.findtext(key) if element is not None else None
    if text is None:
        raise ValueError(f"An annotation lacks <{key}>. HINT: give VOC's xml format.")
    return float(text)
