"""The folder of checkpoints from which an elastic job goes on.

Names hold the position: ``step=00000012-batch=00000048.ckpt``. A new checkpoint is committed (`commit.py`) before
older ones are removed, and the newest is chosen by reading and verifying it, so a process that is killed at any moment
leaves a good one behind, if there was one. When training has ended by itself the folder is emptied: the next run with
it is a new one.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .. import checkpoint as ckpt
from ..commit import commit

_NAME = re.compile(r"step=(\d+)-batch=(\d+)\.ckpt")
_MARK = ".identity"
_MARKING_SECONDS = 5.0


Save = Callable[[dict[str, Any], Path], None]


def save_sealed(checkpoint: dict[str, Any], path: Path) -> None:
    """Commit a checkpoint, with its digest, to a path.

    Raises:
        OSError: if it cannot be written; what the path held before is untouched then.
    """
    ckpt.seal(checkpoint)
    ckpt.save(checkpoint, path)


class CheckpointFolder:
    """Checkpoints of one job.

    Args:
        path: the folder; made with the first checkpoint.
        keep: how many checkpoints stay, at least 1.
        prefix: of all names, for jobs that share a folder.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep: int = 2, prefix: str = "") -> None:
        self.path = Path(path)
        self._keep = keep
        self._prefix = prefix

    def prepare(self) -> None:
        """Make the folder and see that checkpoints can be written.

        Raises:
            OSError: if they cannot.
        """
        with _named("checkpoints cannot be written", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for torn in self.path.glob(f".{self._prefix}step=*.tmp"):
                torn.unlink(missing_ok=True)
            probe = self.path / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()

    def commit(self, checkpoint: dict[str, Any], *, step: int, batch: int, save: Save = save_sealed) -> Path:
        """Write a checkpoint whole, then remove older ones but for the newest of them.

        Args:
            checkpoint: with an ``easyscale`` entry, which gets its digest here.
            step: optimizer steps done.
            batch: micro-batches done per EST.
            save: commits it to a path, with its digest.

        Raises:
            OSError: if it cannot be written; the older ones are still there then.
        """
        path = self.path / f"{self._prefix}step={step:08d}-batch={batch:08d}.ckpt"
        save(checkpoint, path)
        self._remove_older(path.name)
        return path

    def take(self, name: str, write: Callable[[BinaryIO], None]) -> None:
        """Commit a checkpoint of another host's folder; see `commit`.

        Args:
            name: its name there.
            write: writes its content.

        Raises:
            ValueError: if no checkpoint has such a name.
            OSError: if it cannot be written.
        """
        if self._position(name) is None:
            raise ValueError(f"`{name}` is not the name of a checkpoint of this job")
        commit(self.path / name, write)
        self._remove_older(name)

    def entry(self, name: str) -> dict[str, Any]:
        """The ``easyscale`` entry of a checkpoint that is what was written.

        Raises:
            CheckpointError: if it is not, or no elastic job has written it.
            OSError: if it cannot be read.
        """
        loaded = ckpt.load(self.path / name, weights_only=False)
        found: dict[str, Any] | None = loaded.get(ckpt.KEY) if isinstance(loaded, dict) else None
        if found is None:
            raise ckpt.CheckpointError("it was not written by an elastic job, and is left alone.")
        return found

    def identity(self) -> str:
        """The same in all processes that see this folder, on whatever host; other folders have others.

        Raises:
            OSError: if the folder cannot be written.
        """
        with _named("the elastic folder cannot be used", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            mark = self.path / _MARK
            try:
                descriptor = os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                pass
            else:
                os.write(descriptor, uuid.uuid4().hex.encode())
                os.close(descriptor)
            # A copy of the folder on another host has the same content and is another file.
            return f"{_first_words(mark)} {mark.stat().st_ino}"

    def clear(self) -> None:
        """Training has ended by itself: there is nothing left to go on from."""
        for name in self.names():
            (self.path / name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """The checkpoints, newest first, as far as their names tell."""
        with suppress(FileNotFoundError):
            found = [path.name for path in self.path.iterdir() if self._position(path.name) is not None]
            return sorted(found, key=self.order, reverse=True)
        return []

    def order(self, name: str) -> tuple[int, int]:
        """Steps and batches of a checkpoint's name; the larger, the newer."""
        position = self._position(name)
        assert position is not None
        return position

    def _position(self, name: str) -> tuple[int, int] | None:
        match = _NAME.fullmatch(name.removeprefix(self._prefix)) if name.startswith(self._prefix) else None
        return (int(match[1]), int(match[2])) if match else None

    def _remove_older(self, name: str) -> None:
        # What looks newer cannot be used, or the job would have gone on from there: it must not crowd out this one.
        older = [other for other in self.names() if self.order(other) < self.order(name)]
        for other in older[self._keep - 1 :]:
            (self.path / other).unlink(missing_ok=True)


@contextmanager
def _named(what: str, path: Path) -> Iterator[None]:
    """Errors inside the block say what cannot be done, where, and the cure."""
    try:
        yield
    except OSError as error:
        raise type(error)(
            error.errno,
            f"{what}: `{path}` ({error.strerror}). HINT: choose a folder that can be written and has room",
        ) from error


def _first_words(mark: Path) -> str:
    """What is in a file that another process may have made just now."""
    deadline = time.monotonic() + _MARKING_SECONDS
    while not (found := mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found
