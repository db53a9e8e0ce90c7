"""Writing one EST's file of a run record while training runs.

The training thread only clones what it is given, on the device. At intervals it packs all pending tensors of a device
into one byte buffer and starts one asynchronous copy to pinned memory; a thread of the writer waits for the copy,
formats the lines and appends them. So no step waits for the device, and a killed run loses the last interval at most.

Invariants: lines reach the file in the order of the calls, each whole or torn at the very end; the file is only
rewritten at the start of a resumed run, through a temporary file and a rename, to cut what lies past the resume point;
what an earlier, unrelated run left is moved aside, never overwritten.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .digest import StateDigest, dtype_name
from .record import SCHEMA_VERSION, est_file, read_lines

_MAX_PENDING_BYTES = 16 << 20


@dataclass
class _Slot:
    """Where a tensor's bytes will be found: device buffer, offset, length."""

    dtype: str
    shape: tuple[int, ...]
    device: torch.device
    offset: int
    nbytes: int


class RecordWriter:
    """Append-only writer of one EST's record.

    Args:
        directory: the record's directory; created.
        rank: the EST's rank.
        num_ests: N of the job.
        header: further fields of the header line (plain containers only).
        resume_batch: micro-batches already done; entries from there on are cut and will be written again.
        resume_step: optimizer steps already done; digests past it are cut.
        resume_stages: stages whose metrics were recorded at the resume point. What else is there was recorded after the
            checkpoint, for instance where a run ended inside an epoch, and is cut.
        flush_every_n_steps: hand over to the writing thread after so many entries.
        flush_seconds: and at the first entry after so many seconds.
        exact_elements: a tensor with more elements is kept as the sha256 of its bytes.

    Raises:
        RecordError: if the file to be continued is damaged.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        rank: int,
        num_ests: int,
        header: Mapping[str, Any] | None = None,
        resume_batch: int = 0,
        resume_step: int = 0,
        resume_stages: Collection[str] = (),
        flush_every_n_steps: int = 32,
        flush_seconds: float = 2.0,
        exact_elements: int = 1024,
    ) -> None:
        self._path = est_file(directory, rank)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._every = flush_every_n_steps
        self._seconds = flush_seconds
        self._exact_elements = exact_elements
        self._pending: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
        self._pending_bytes = 0
        self._last_flush = time.monotonic()
        self._error: BaseException | None = None
        first = {"kind": "header", "schema": SCHEMA_VERSION, "rank": rank, "num_ests": num_ests, **(header or {})}
        self._prepare(first, resume_batch, resume_step, resume_stages)
        self._file = self._path.open("ab")
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=64)
        self._thread = threading.Thread(target=self._write_loop, name=f"run-record-{rank}", daemon=True)
        self._thread.start()

    def step(self, *, step: int, batch: int, tensors: Mapping[str, Tensor]) -> None:
        """Record one micro-batch; the tensors are cloned, so the caller may change them afterwards.

        Args:
            step: optimizer steps done before this micro-batch.
            batch: micro-batches done before this one, over the whole job.
            tensors: name -> tensor, on any device.
        """
        self._append({"kind": "step", "step": step, "batch": batch}, tensors)

    def metrics(self, *, stage: str, step: int, batch: int, tensors: Mapping[str, Tensor]) -> None:
        """Record the logged metrics of an epoch or a validation; ``step`` and ``batch`` count what is already done."""
        self._append({"kind": "metrics", "stage": stage, "step": step, "batch": batch}, tensors)

    def digest(self, *, step: int, batch: int, states: Mapping[str, StateDigest]) -> None:
        """Record digests of the state after ``step`` optimizer steps."""
        plain = {name: {"total": state.total, "tensors": dict(state.tensors)} for name, state in states.items()}
        self._append({"kind": "digest", "step": step, "batch": batch, "states": plain}, {})

    def event(self, name: str, *, step: int, batch: int, data: Mapping[str, Any] | None = None) -> None:
        """Record an event with plain data."""
        self._append({"kind": "event", "event": name, "step": step, "batch": batch, "data": dict(data or {})}, {})

    def flush(self, *, wait: bool = False) -> None:
        """Hand everything pending to the writing thread; with ``wait`` until it is in the file.

        Raises:
            OSError: what the writing thread met, for instance a full disk.
        """
        self._raise_error()
        if self._pending:
            self._queue.put(_pack(self._pending))
            self._pending, self._pending_bytes = [], 0
        self._last_flush = time.monotonic()
        if wait:
            done = threading.Event()
            self._queue.put(done)
            done.wait()
            self._raise_error()

    def close(self) -> None:
        """Write what is pending, sync the file and end the thread. Safe to call twice.

        Raises:
            OSError: what the writing thread met.
        """
        if self._file.closed:
            return
        try:
            self.flush(wait=True)
        finally:
            self._queue.put(None)
            self._thread.join()
            os.fsync(self._file.fileno())
            self._file.close()

    def _append(self, line: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        # clone: an in-place operation of the user's after this call must not reach the record
        kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._pending.append((line, kept))
        self._pending_bytes += sum(t.numel() * t.element_size() for t in kept.values())
        late = time.monotonic() - self._last_flush >= self._seconds
        if late or len(self._pending) >= self._every or self._pending_bytes >= _MAX_PENDING_BYTES:
            self.flush()

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _prepare(self, header: dict[str, Any], resume_batch: int, resume_step: int, stages: Collection[str]) -> None:
        """Leave a file that ends exactly at the resume point."""
        old: list[dict[str, Any]] = []
        if self._path.exists():
            if resume_batch > 0 or resume_step > 0:
                old = read_lines(self._path)
            elif self._path.stat().st_size:
                _move_aside(self._path)
        kept = [line for line in old[1:] if _before(line, resume_batch, resume_step, stages)]
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            for line in [old[0] if old else header, *kept]:
                file.write(_encode(line))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)

    def _write_loop(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if not isinstance(item, threading.Event) and self._error is None:
                    self._file.write(_format(*item, exact_elements=self._exact_elements))
                    self._file.flush()
            except BaseException as error:  # handed to the training thread at its next flush
                self._error = error
            if isinstance(item, threading.Event):
                item.set()


def _before(line: Mapping[str, Any], batch: int, step: int, stages: Collection[str]) -> bool:
    if line["kind"] == "step":
        return bool(line["batch"] < batch)
    if line["kind"] == "digest":
        return bool(line["step"] <= step)
    if line["kind"] == "metrics" and line["batch"] == batch:
        return line["stage"] in stages
    return bool(line["batch"] <= batch)


def _encode(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def _move_aside(path: Path) -> None:
    n = 1
    while (target := path.with_name(f"{path.name}.old-{n}")).exists():
        n += 1
    path.rename(target)


def _pack(
    entries: list[tuple[dict[str, Any], dict[str, Tensor]]],
) -> tuple[list[tuple[dict[str, Any], dict[str, _Slot]]], dict[torch.device, tuple[Tensor, torch.cuda.Event | None]]]:
    """Start one copy per device and say where each tensor will lie in it."""
    parts: dict[torch.device, list[Tensor]] = {}
    sizes: dict[torch.device, int] = {}
    lines = []
    for line, tensors in entries:
        slots = {}
        for name, tensor in tensors.items():
            if tensor.layout is not torch.strided:
                tensor = tensor.to_dense()
            raw = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
            device = tensor.device
            slots[name] = _Slot(
                dtype_name(tensor.dtype), tuple(tensor.shape), device, sizes.setdefault(device, 0), raw.numel()
            )
            sizes[device] += raw.numel()
            parts.setdefault(device, []).append(raw)
        lines.append((line, slots))
    buffers: dict[torch.device, tuple[Tensor, torch.cuda.Event | None]] = {}
    for device, raws in parts.items():
        packed = torch.cat(raws)
        if device.type == "cuda":
            host = torch.empty(packed.shape, dtype=torch.uint8, device="cpu", pin_memory=True)
            host.copy_(packed, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(device))
            buffers[device] = host, copied
        else:
            buffers[device] = packed.cpu(), None
    return lines, buffers


def _format(
    lines: list[tuple[dict[str, Any], dict[str, _Slot]]],
    buffers: dict[torch.device, tuple[Tensor, torch.cuda.Event | None]],
    *,
    exact_elements: int,
) -> bytes:
    raw: dict[torch.device, bytes] = {}
    for device, (host, copied) in buffers.items():
        if copied is not None:
            copied.synchronize()
        raw[device] = host.numpy().tobytes()
    out = bytearray()
    for line, slots in lines:
        if slots:
            tensors = {}
            for name, slot in slots.items():
                data = raw[slot.device][slot.offset : slot.offset + slot.nbytes]
                elements = 1
                for extent in slot.shape:
                    elements *= extent
                bits = data.hex() if elements <= exact_elements else f"sha256:{hashlib.sha256(data).hexdigest()}"
                tensors[name] = [slot.dtype, list(slot.shape), bits]
            line = {**line, "tensors": tensors}
        elif line["kind"] in ("step", "metrics"):
            line = {**line, "tensors": {}}
        out += _encode(line)
    return bytes(out)
