"""Tile sizes that were found by measuring, on disk: one JSON file for each device name and version of what runs there.

The files lie in ``lightning_easyscale`` under ``$XDG_CACHE_HOME`` (default ``~/.cache``). What cannot be read or is not
of this device is ignored with a warning, and what cannot be written is kept for this process.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .build import cache_folder

Sizes = tuple[int, ...]


def made_for(device: str) -> dict[str, str]:
    """What a measurement depends on."""
    from . import FORMAT_VERSION

    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {"device": device, "triton": triton, "torch": torch.__version__, "format": str(FORMAT_VERSION)}


class TileCache:
    """Sizes by class of shapes.

    Args:
        path: of the file.
        made_for: what the file's measurements must have been made for.
        allowed: the sizes that it may name; others could change bits.
        warn: told why a file is ignored or cannot be written.
    """

    def __init__(
        self, path: Path, made_for: dict[str, str], allowed: Collection[Sizes], warn: Callable[[str], None]
    ) -> None:
        self._path, self._made_for, self._allowed, self._warn = path, made_for, allowed, warn
        self._known = self._read()

    @classmethod
    def of_device(cls, device: str, allowed: Collection[Sizes], warn: Callable[[str], None]) -> TileCache:
        """The cache of a device's name and the present versions."""
        made = made_for(device)
        key = hashlib.blake2b(json.dumps(made, sort_keys=True).encode(), digest_size=12).hexdigest()
        return cls(cache_folder() / f"tiles-{key}.json", made, allowed, warn)

    def get(self, shapes: str) -> Sizes | None:
        """The sizes found for a class of shapes."""
        return self._known.get(shapes)

    def put(self, shapes: str, sizes: Sizes) -> None:
        """Keep sizes, on disk beside those that other processes have put there in the meantime."""
        self._known[shapes] = sizes
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with _alone(self._path.with_suffix(".lock")):
                self._known = {**self._read(), **self._known}
                self._write()
        except OSError as error:
            self._warn(f"tile sizes found by measuring are not kept in {self._path}: {error}")

    def _read(self) -> dict[str, Sizes]:
        try:
            found = json.loads(self._path.read_text())
            if found["made_for"] != self._made_for:
                raise ValueError(f"made for {found['made_for']}")
            tiles = {str(shapes): tuple(sizes) for shapes, sizes in found["tiles"].items()}
            if strange := [sizes for sizes in tiles.values() if sizes not in self._allowed]:
                raise ValueError(f"it names the sizes {strange[0]}")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._warn(f"tile sizes in {self._path} are ignored: {error!r}. HINT: delete the file.")
            return {}
        return tiles

    def _write(self) -> None:
        text = json.dumps({"made_for": self._made_for, "tiles": self._known}, indent=1, sort_keys=True)
        file, name = tempfile.mkstemp(dir=self._path.parent, prefix=self._path.name)
        try:
            with os.fdopen(file, "w") as stream:
                stream.write(text)
            os.replace(name, self._path)
        except BaseException:
            os.unlink(name)
            raise


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process is here at the same time, if the file system knows locks."""
    with open(path, "w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
