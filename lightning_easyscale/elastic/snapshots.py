"""Snapshots that a thread commits while training goes on.

The training thread only copies (`HostCopy`). A snapshot that comes while the one before is still being written is left
out, so that a slow disk costs snapshots and not steps. A snapshot that cannot be written is warned of, and training
goes on: the older ones are still there.
"""

from __future__ import annotations

import os
import threading
import warnings
from typing import Any

from .host_copy import HostCopy
from .replication import ReplicaError, Replication

_NICE = 10  # the thread yields the CPU to training


class SnapshotWriter:
    """Writes one snapshot at a time.

    Attributes:
        written: snapshots that were committed.
        left_out: snapshots that came too early.
    """

    def __init__(self) -> None:
        self.written = 0
        self.left_out = 0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def submit(self, copies: Replication, checkpoint: dict[str, Any], *, step: int, batch: int) -> None:
        """Copy a checkpoint and have it committed.

        Args:
            copies: commit it.
            checkpoint: as for `Replication.commit`; its tensors may change after the call.
            step: optimizer steps done.
            batch: micro-batches done per EST.
        """
        if self._thread is not None and self._thread.is_alive():
            self.left_out += 1
            return
        self.wait()
        copied = HostCopy(checkpoint)

        def write() -> None:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
            try:
                copies.commit(copied.wait(), step=step, batch=batch)
                self.written += 1
            except Exception as error:  # noqa: BLE001 - told by the training thread
                self._error = error

        self._thread = threading.Thread(target=write, name="easyscale-snapshot", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Let the snapshot that is being written be committed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if isinstance(error, ReplicaError):
            warn_of_copies(error)
        elif error is not None:
            warnings.warn(
                f"a snapshot could not be written: {error}. Training goes on; the older snapshots are still there."
                " HINT: make room in the elastic folder, or choose another one",
                stacklevel=2,
            )


def warn_of_copies(error: ReplicaError) -> None:
    """Say what a host's loss would cost now."""
    warnings.warn(
        f"{error.strerror}. Training goes on; if this host is lost, so is the checkpoint. HINT: look after those hosts,"
        " their folders and the network between them",
        stacklevel=3,
    )
