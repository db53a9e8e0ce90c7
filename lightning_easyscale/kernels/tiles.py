"""Tile sizes of launches, which never change bits: how they are chosen."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch

from .plans import forget_plans
from .tile_cache import TileCache


class Tiles(NamedTuple):
    """Tile sizes of a launch: any choice gives the same bits.

    Args:
        m: rows of a product's tile, a power of two of at least 16.
        n: columns of a product's tile, likewise.
        k: steps of k that are loaded at once: a power of two from 16 to 256.
        warps: warps of a program.
        stages: depth of the software pipeline.
        width: elements of an elementwise program, a power of two.
    """

    m: int = 64
    n: int = 64
    k: int = 16
    warps: int = 4
    stages: int = 2
    width: int = 1024


CANDIDATES = (
    *(Tiles(64, 64, 32, 4, 3), Tiles(32, 32, 32, 2, 3), Tiles(64, 256, 16, 8, 3), Tiles(128, 128, 16, 8, 3)),
    *(Tiles(128, 64, 16, 4, 4), Tiles(64, 64, 16, 4, 3), Tiles(32, 128, 16, 4, 4), Tiles(32, 64, 16, 4, 3)),
    *(Tiles(64, 128, 16, 4, 3), Tiles(64, 64, 16, 2, 3), Tiles(128, 64, 16, 8, 3), Tiles(128, 128, 32, 8, 3)),
    *(Tiles(64, 32, 32, 2, 3), Tiles(16, 64, 32, 2, 3), Tiles(16, 128, 32, 4, 3), Tiles(256, 64, 16, 8, 3)),
)
"""What `tuning.py` tries, and all that a cache of its results may name."""

_ENOUGH = 256  # programs that keep a device busy
_SOME = 128  # with so many, a second launch that folds parts of sums costs a small product more than it gains
_SMALL = 1 << 30  # multiply-adds
_forced: Tiles | None = None


@contextmanager
def tiles(choice: Tiles) -> Iterator[None]:
    """Use these tile sizes for the time of a ``with`` block."""
    global _forced
    before, _forced = _forced, choice
    forget_plans()
    try:
        yield
    finally:
        _forced = before
        forget_plans()


def forced() -> bool:
    """Whether `tiles` is in force."""
    return _forced is not None


def pick(kind: str, m: int, n: int = 1, k: int = 1, *, batch: int = 1, taps: int = 1) -> Tiles:
    """The tiles of a launch of a kind of kernel: what was found by measuring, else what was chosen on an H100.

    Args:
        kind: of kernel.
        m: rows of the result.
        n: its columns.
        k: length of its sums.
        batch: number of such results.
        taps: positions of a convolution's kernel.
    """
    if _forced is not None:
        return _forced
    if kind == "plain":
        return Tiles()
    if kind == "rows":
        return Tiles(warps=1, stages=3)  # with more, the tree of lanes does not fit the registers
    if kind in ("matmul", "forward", "input_gradient", "weight_gradient") and torch.cuda.is_available():
        found = tile_cache().get(shape_class(kind, m, n, k, batch=batch, taps=taps))
        if found is not None:
            return Tiles(*found)
    few = blocks_of(m, 64) * blocks_of(n, 128) < _ENOUGH
    if kind == "matmul" and m > 32:
        return Tiles(64, 64, 32, 4, 3) if n > 32 else Tiles(32, 32, 32, 2, 3)
    if kind == "forward" and m > 32:
        return Tiles(64, 64, 32, 4, 3) if few else Tiles(64, 256, 16, 8, 3)
    if kind == "weight_gradient" and m > 64:
        return Tiles(128, 128, 16, 8, 3) if n > 64 else Tiles(128, 64, 16, 4, 4)
    if kind == "weight_gradient" and m > 32:
        return Tiles(64, 64, 16, 4, 3)
    if m <= 32:
        return Tiles(32, 128, 16, 4, 4) if n > 64 else Tiles(32, 64, 16, 4, 3)
    return Tiles(64, 64, 32, 4, 3) if n <= 64 or few else Tiles(64, 128, 16, 4, 3)


def few_programs(programs: int, work: int) -> bool:
    """Whether so many programs leave a device idle for longer than a second launch takes.

    Args:
        programs: of a launch.
        work: its multiply-adds.
    """
    return programs < (_SOME if work < _SMALL else _ENOUGH)


def shape_class(kind: str, m: int, n: int, k: int, *, batch: int = 1, taps: int = 1) -> str:
    """Launches that are tuned together: sizes are rounded up to powers of two."""
    return " ".join((kind, *(str(power_of_two(size)) for size in (m, n, k, batch)), str(taps)))


def tile_cache() -> TileCache:
    """What was found by measuring on the present device."""
    return _cache_of(torch.cuda.get_device_name())


@lru_cache
def _cache_of(device: str) -> TileCache:
    return TileCache.of_device(device, {tuple(t) for t in CANDIDATES}, warnings.warn)


def blocks_of(length: int, block: int) -> int:
    """How many blocks a length has."""
    return -(-length // block)


def power_of_two(size: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << max(0, size - 1).bit_length()
