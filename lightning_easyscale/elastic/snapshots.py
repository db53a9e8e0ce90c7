"""Snapshots that are committed while training goes on.

The training thread only copies (`HostCopy`). A thread waits for the copy and describes it, and a process of its own
digests, writes and syncs it (`snapshot_process.py`): what takes long shares no interpreter with training. A snapshot
that comes while the one before is still being written is left out, so that a slow disk costs snapshots and not steps. A
snapshot that cannot be written is warned of, and training goes on: the older ones are still there.
"""

from __future__ import annotations

import io
import pickle
import threading
import uuid
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint as ckpt
from .host_copy import HostCopy, HostMemory
from .replication import ReplicaError, Replication
from .snapshot_process import Order, Piece, SnapshotProcess


class SnapshotWriter:
    """Writes one snapshot at a time.

    Attributes:
        written: snapshots that were committed.
        left_out: snapshots that came too early.
    """

    def __init__(self) -> None:
        self.written = 0
        self.left_out = 0
        self._memory = HostMemory()
        self._process: SnapshotProcess | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def busy(self) -> bool:
        """Whether a snapshot is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the process that writes ahead of the first snapshot, which it would keep waiting."""
        self._process = self._process or SnapshotProcess()

    def submit(self, copies: Replication, checkpoint: dict[str, Any], *, step: int, batch: int) -> None:
        """Copy a checkpoint and have it committed.

        Args:
            copies: commit it.
            checkpoint: as for `Replication.commit`; its tensors may change after the call.
            step: optimizer steps done.
            batch: micro-batches done per EST.
        """
        if self.busy:
            self.left_out += 1
            return
        self.wait()
        copied = HostCopy(checkpoint, self._memory)

        def write() -> None:
            try:
                copies.commit(copied.wait(), step=step, batch=batch, save=self._save)
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

    def close(self) -> None:
        """Let the snapshot that is being written be committed; give back the memory and the process."""
        self.wait()
        self._memory.free()
        if self._process is not None:
            self._process.close()
            self._process = None

    def _save(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Commit a copy in this writer's memory, sealed, to a path."""
        self.start()
        process = self._process
        assert process is not None
        try:
            process.commit(_order(checkpoint, path, self._memory), self._memory.descriptor)
        except ChildProcessError:
            process.close()
            self._process = None  # the next snapshot has another
            raise


def warn_of_copies(error: ReplicaError) -> None:
    """Say what a host's loss would cost now."""
    warnings.warn(
        f"{error.strerror}. Training goes on; if this host is lost, so is the checkpoint. HINT: look after those hosts,"
        " their folders and the network between them",
        stacklevel=3,
    )


def _order(checkpoint: dict[str, Any], path: Path, memory: HostMemory) -> Order:
    """What another process needs to write a checkpoint whose tensors lie in `memory`."""
    blank = uuid.uuid4().hex[: 2 * ckpt.DIGEST_BYTES]
    checkpoint[ckpt.KEY]["digest"] = blank
    pickled = io.BytesIO()
    pickler = _Pickler(pickled, memory)
    pickler.dump(checkpoint)
    parts = [_piece(p, memory) if isinstance(p, Tensor) else p for p in ckpt.content_parts(checkpoint)]
    return Order(
        path=str(path),
        size=memory.size,
        pickled=pickled.getvalue(),
        blank=blank.encode(),
        records=pickler.records,
        digested=parts,
        digest_bytes=ckpt.DIGEST_BYTES,
    )


def _piece(tensor: Tensor, memory: HostMemory) -> Piece | bytes:
    """A tensor's bytes in row-major order."""
    offset, item = memory.offset(tensor), tensor.element_size()
    if offset is None or not tensor.numel():
        return bytes(ckpt.row_major_bytes(tensor))
    strides = tuple(item * stride for stride in tensor.stride())
    strided = None if tensor.is_contiguous() else (tuple(tensor.shape), strides, item)
    return Piece(offset, tensor.numel() * item, strided)


class _Storage:
    """Stands for a tensor's bytes while it is pickled."""

    def __init__(self, key: int, size: int) -> None:
        self.key, self.size = key, size


class _Pickler(pickle.Pickler):
    """Pickles as `torch.save` does.

    Args:
        file: takes the pickle.
        memory: where most tensors lie.

    Attributes:
        records: the tensors' bytes as they lie in memory, by their keys.
    """

    def __init__(self, file: io.BytesIO, memory: HostMemory) -> None:
        super().__init__(file, protocol=2)
        self.records: list[Piece | bytes] = []
        self._memory = memory

    def persistent_id(self, obj: Any) -> Any:
        """How torch names the bytes of a tensor."""
        if type(obj) is _Storage:
            return ("storage", torch.UntypedStorage, str(obj.key), "cpu", obj.size)
        return None

    def reducer_override(self, obj: Any) -> Any:
        """Tensors by their bytes, without torch's Python objects for storages."""
        if not isinstance(obj, Tensor) or obj.layout is not torch.strided:
            return NotImplemented
        size, strides = obj.numel() * obj.element_size(), obj.stride()
        if self._memory.offset(obj) is None:
            obj = obj.detach().cpu().contiguous()
            strides = obj.stride()
            self.records.append(_piece(obj, self._memory))
        else:
            self.records.append(Piece(self._memory.offset(obj) or 0, size))
        storage = _Storage(len(self.records) - 1, size)
        arguments: Any = (storage, 0, tuple(obj.shape), strides, False, OrderedDict(), obj.dtype)
        return torch._utils._rebuild_tensor_v3, arguments
