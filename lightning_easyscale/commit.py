"""Files that are whole or not there.

A file is written under a temporary name, synced, and renamed; the directory is synced last. So a path either holds all
of the new content or what it held before. This module needs no torch: the process that writes snapshots has none.
"""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def commit(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Let `path` hold what `write` writes, whole or not at all.

    Raises:
        OSError: if it cannot be written; what the path held before is untouched then.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    for torn in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        torn.unlink(missing_ok=True)  # of a process that was killed while it wrote this file
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        # Rename only after the data is on disk; sync the directory only after the rename.
        os.replace(temporary, target)
        _sync_directory(target.parent)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync_directory(path: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
