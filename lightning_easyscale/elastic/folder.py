"""The folder of checkpoints from which an elastic job goes on.

Names hold the position: ``step=00000012-batch=00000048.ckpt``. A new checkpoint is committed (`checkpoint.save`) before
older ones are removed, and the newest is chosen by reading and verifying it, so a process that is killed at any moment
leaves a good one behind, if there was one. When training has ended by itself the folder is emptied: the next run with
it is a new one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import checkpoint as ckpt

_NAME = re.compile(r"step=(\d+)-batch=(\d+)\.ckpt")


class CheckpointFolder:
    """Checkpoints of one job.

    Args:
        path: the folder; made with the first checkpoint.
        keep: how many of the newest checkpoints stay.
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
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for torn in self.path.glob(f".{self._prefix}step=*.tmp"):
                torn.unlink(missing_ok=True)
            probe = self.path / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise type(error)(
                error.errno,
                f"checkpoints cannot be written to `{self.path}` ({error.strerror})."
                " HINT: choose a folder that can be written and has room",
            ) from error

    def commit(self, checkpoint: dict[str, Any], *, step: int, batch: int) -> Path:
        """Write a checkpoint whole, then remove all but the newest.

        Args:
            checkpoint: with an ``easyscale`` entry, which gets its digest here.
            step: optimizer steps done.
            batch: micro-batches done per EST.

        Raises:
            OSError: if it cannot be written; the older ones are still there then.
        """
        ckpt.seal(checkpoint)
        path = self.path / f"{self._prefix}step={step:08d}-batch={batch:08d}.ckpt"
        ckpt.save(checkpoint, path)
        for old in list(self._newest_first())[self._keep :]:
            old.unlink(missing_ok=True)
        return path

    def newest_good(self, report: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is what was written, and its ``easyscale`` entry.

        Args:
            report: told of each one that cannot be used.
        """
        for path in self._newest_first():
            try:
                entry = ckpt.load(path, weights_only=False).get(ckpt.KEY)
            except (ckpt.CheckpointError, OSError) as error:
                report(f"`{path}` cannot be used: {error}")
                continue
            if entry is not None:
                return path, entry
            report(f"`{path}` was not written by an elastic job and is left alone")
        return None

    def clear(self) -> None:
        """Training has ended by itself: there is nothing left to go on from."""
        for path in self._newest_first():
            path.unlink(missing_ok=True)

    def _newest_first(self) -> Iterator[Path]:
        found: list[tuple[int, int, Path]] = []
        with suppress(FileNotFoundError):
            for path in self.path.iterdir():
                match = _NAME.fullmatch(path.name.removeprefix(self._prefix))
                if match and path.name.startswith(self._prefix):
                    found.append((int(match[1]), int(match[2]), path))
        return (path for *_, path in sorted(found, reverse=True))
