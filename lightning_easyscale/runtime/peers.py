"""The physical side of a rendezvous: how executors talk to each other.

Each executor is one process. `Peers` owns the process groups between them, which are private to the runtime: user code
only ever sees the virtual world. A rendezvous that spans executors starts with `exchange`: every executor contributes
a header (what it is about to do, whether it was asked to stop, whether it failed), so that a mismatch or a failure
elsewhere is an error with a cause and never a hang. Headers have one size, whatever is exchanged; what little else an
executor has to say travels in them.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import os
import pickle
import socket
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from .errors import CollectiveMismatch, ESTHang, RemoteESTError
from .packing import as_bytes
from .world import physical_world

_connected: weakref.WeakSet[Peers] = weakref.WeakSet()

_POLL_S = 0.02
_HEADER_BYTES = 1024
_ROOM = _HEADER_BYTES - 32
_NOTHING = torch.empty(0, dtype=torch.uint8)
_FAILED, _STOP = 1, 2
_FAILURES = "easyscale/failures"


@dataclass
class Header:
    """What one executor says at the start of a rendezvous."""

    tag: bytes
    flags: int
    length: int = 0
    payload: torch.Tensor | None = None  # the first of `length` bytes

    def encode(self) -> torch.Tensor:
        """The header as a fixed-size uint8 tensor."""
        raw = self.tag + self.flags.to_bytes(8, "little") + self.length.to_bytes(8, "little")
        encoded = torch.frombuffer(bytearray(raw.ljust(_HEADER_BYTES, b"\0")), dtype=torch.uint8)
        if self.payload is not None:
            said = self.payload[:_ROOM]
            encoded[len(raw) : len(raw) + said.numel()] = said
        return encoded

    @classmethod
    def decode(cls, tensor: torch.Tensor) -> Header:
        """Inverse of `encode`."""
        raw = tensor[:32].numpy().tobytes()
        length = int.from_bytes(raw[24:32], "little")
        return cls(raw[:16], int.from_bytes(raw[16:24], "little"), length, tensor[32 : 32 + min(length, _ROOM)])


class Peers:
    """The executors of a job, seen from one of them.

    Args:
        index: this executor's position, ``0 <= index < size``.
        size: number of executors.
        control: gloo group over all executors, for headers and Python objects; None if `size` is 1.
        data: group over all executors for tensors on the job's device (NCCL or gloo); None if `size` is 1.
        store: key-value store of all executors; None if `size` is 1.

    Attributes:
        physical_collectives: how many collectives between executors were waited for.
        waited_s: seconds spent waiting for the other executors; what is left of a step is this executor's own work.
    """

    def __init__(
        self,
        index: int,
        size: int,
        control: dist.ProcessGroup | None = None,
        data: dist.ProcessGroup | None = None,
        store: dist.Store | None = None,
    ) -> None:
        self.index = index
        self.size = size
        self.control = control
        self.data = data
        self.store = store
        self.physical_collectives = 0
        self.waited_s = 0.0
        self._all_know = False  # that this run has failed
        self._failures = 0

    def begin(self) -> None:
        """A run begins, on every executor."""
        if self.store is not None:
            self._failures = self.store.add(_FAILURES, 0)

    def raise_failure(self) -> None:
        """Look, without waiting, whether another executor has failed in this run.

        Raises:
            RemoteESTError: if so, with the cause.
        """
        if self.store is not None and self.store.add(_FAILURES, 0) > self._failures:
            self.agree("failure")

    def agree(self, tag: str, *, stop: bool = False) -> bool:
        """Start a rendezvous that spans executors; see `exchange`. Returns whether any executor was asked to stop."""
        return self.exchange(tag, stop=stop)[0]

    def exchange(
        self, tag: str, *, stop: bool = False, payload: torch.Tensor | None = None
    ) -> tuple[bool, list[torch.Tensor]]:
        """Start a rendezvous that spans executors, and tell the others something.

        Args:
            tag: what this executor is about to do; must be the same everywhere.
            stop: whether this executor was asked to stop.
            payload: what it has to say, flat uint8 in host memory.

        Returns:
            Whether any executor was asked to stop; every executor's payload, in executor order, each at a multiple of
            16 bytes of its storage.

        Raises:
            CollectiveMismatch: if the tags differ.
            RemoteESTError: if another executor failed.
            ESTHang: if another executor did not arrive within the timeout, or vanished.
        """
        if self.control is None:
            return stop, [_NOTHING if payload is None else payload]
        payload = _NOTHING if payload is None else payload
        digest = hashlib.blake2b(tag.encode(), digest_size=16).digest()
        headers = self._exchange_headers(Header(digest, _STOP if stop else 0, payload.numel(), payload), tag)
        if any(h.flags & _FAILED for h in headers):
            self._all_know = True
            causes = self.all_gather_object(None)
            raise RemoteESTError(next(c for c in causes if c is not None))
        if any(h.tag != digest for h in headers):
            self._all_know = True
            tags = self.all_gather_object(tag)
            raise CollectiveMismatch(
                "the executors are not at the same collective: "
                + ", ".join(f"executor {i} is at `{t}`" for i, t in enumerate(tags))
                + ". HINT: every rank has to call the same collectives in the same order."
            )
        payloads = [_NOTHING if h.payload is None else h.payload for h in headers]
        if max(h.length for h in headers) > _ROOM:
            payloads = self._gather_bytes(payload, [h.length for h in headers])
        return any(h.flags & _STOP for h in headers), payloads

    def announce_failure(self, message: str) -> None:
        """Tell the other executors why this one ends; they learn it at their next `agree`.

        Says nothing where they know, or where one of them is lost: nobody would listen.
        """
        if self.control is None or self._all_know:
            self._all_know = False
            return
        if self.store is not None:
            self.store.add(_FAILURES, 1)
        with suppress(ESTHang, RemoteESTError):
            self._exchange_headers(Header(bytes(16), _FAILED), "failure")
            self.all_gather_object(message)

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Every executor's object (plain data and tensors), in executor order."""
        if self.control is None:
            return [obj]
        payload = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._wait(self.control.allgather([sizes], [torch.tensor([payload.numel()])]), "sizes")
        raw = self._gather_bytes(payload, [int(n.item()) for n in sizes])
        return [pickle.loads(part.numpy().tobytes()) for part in raw]

    def _gather_bytes(self, payload: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
        assert self.control is not None
        longest = max(lengths)
        padded = payload
        if payload.numel() < longest:
            padded = torch.zeros(longest, dtype=torch.uint8, device="cpu")
            padded[: payload.numel()] = payload
        outputs = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
        self._wait(self.control.allgather([outputs], [padded]), "objects")
        return [out[:n] for out, n in zip(outputs, lengths, strict=True)]

    def share(self, tag: str, tensors: Sequence[torch.Tensor], source: int) -> None:
        """Start a rendezvous in which executor `source` overwrites the others' `tensors`; see `exchange`."""
        if self.control is None:
            return
        over_host = all(self._travels_over_host(t.device) for t in tensors)
        if not over_host or sum(t.numel() * t.element_size() for t in tensors) > _ROOM:
            self.agree(tag)
            self.broadcast(tensors, source)
            return
        said = torch.cat([as_bytes(t).cpu() for t in tensors]) if self.index == source and tensors else None
        _, payloads = self.exchange(tag, payload=said)
        offset = 0
        for tensor in tensors if self.index != source else ():
            size = tensor.numel() * tensor.element_size()
            if not size:
                continue
            raw = payloads[source][offset : offset + size].clone()
            tensor.copy_(raw.view(tensor.dtype).view(tensor.shape))
            offset += size

    def broadcast(self, tensors: Sequence[torch.Tensor], source: int) -> None:
        """Overwrite `tensors` in place by those of executor `source`."""
        if self.data is None:
            return
        opts = dist.BroadcastOptions()
        opts.rootRank = source
        opts.rootTensor = 0
        for tensor in tensors:
            contiguous = tensor if tensor.is_contiguous() else tensor.contiguous()
            self._wait(self.data.broadcast([contiguous], opts), "broadcast")
            if contiguous is not tensor:
                tensor.copy_(contiguous)

    def subset(self, executors: Sequence[int]) -> Peers:
        """Groups among some executors; every executor calls this, members or not."""
        if list(executors) == list(range(self.size)):
            return self
        if len(executors) == 1:
            return Peers(0, 1)
        with physical_world():
            control = dist.new_group(list(executors), backend="gloo")
            data = dist.new_group(list(executors))
        index = executors.index(self.index) if self.index in executors else -1
        return Peers(index, len(executors), control, data)

    def _travels_over_host(self, device: torch.device) -> bool:
        """Not whether a tensor is in host memory: executors of both kinds have to come to the same answer."""
        assert self.data is not None
        return device.type == "cpu" or self.data._get_backend(device).name().lower() == "gloo"

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside the block as `waited_s`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.waited_s += time.perf_counter() - began

    def _exchange_headers(self, header: Header, tag: str) -> list[Header]:
        assert self.control is not None
        outputs = [torch.empty(_HEADER_BYTES, dtype=torch.uint8) for _ in range(self.size)]
        self._wait(self.control.allgather([outputs], [header.encode()]), tag)
        return [Header.decode(o) for o in outputs]

    def _wait(self, work: dist.Work, what: str) -> None:
        self.physical_collectives += 1
        try:
            with self.waiting():
                work.wait()
        except RuntimeError as error:
            self._all_know = True
            raise ESTHang(
                f"executor {self.index} waited for the other executors in `{what}` and lost one: {error}"
                " HINT: look at the other executors' output for the first error; if a step is legitimately that slow,"
                " raise `timeout`."
            ) from error


def connect(index: int, size: int, *, backend: str, timeout: timedelta) -> Peers:
    """Form the physical groups of `size` executors; ``MASTER_ADDR`` and ``MASTER_PORT`` name the meeting point.

    Args:
        index: this executor's position.
        size: number of executors.
        backend: `torch.distributed` backend for tensors on the job's device, ``"gloo"`` or ``"nccl"``.
        timeout: how long an executor waits for the others.

    Raises:
        RuntimeError: if a process group of another size is already there, or the others do not come.
    """
    # A strategy that lived before in this process may have left its virtual world in force.
    with physical_world():
        return _connect(index, size, backend, timeout)


def _connect(index: int, size: int, backend: str, timeout: timedelta) -> Peers:
    if dist.is_initialized():
        there = dist.get_world_size()
        if there != size:
            raise RuntimeError(
                f"a process group of {there} processes is already there, but this job runs on {size} executors."
                " HINT: let the strategy start the processes, or destroy the group first."
            )
        data = dist.group.WORLD
    elif size == 1:
        return Peers(0, 1)
    else:
        if index > 0:
            _await_listener(timeout)
        try:
            dist.init_process_group(backend, init_method="env://", rank=index, world_size=size, timeout=timeout)
        except dist.DistError as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise RuntimeError(
                f"executor {index} of {size} waited {timeout.total_seconds():.0f} s for the others at {where} in vain:"
                f" {error} HINT: look at the other executors' output; all hosts must reach that address, which"
                " MASTER_ADDR and MASTER_PORT name."
            ) from error
        atexit.register(disconnect)
        data = dist.group.WORLD
    if size == 1:
        return Peers(0, 1)
    # Of its own, so that a header never queues behind tensors and a failure can be told while others exchange data.
    control = dist.new_group(backend="gloo", timeout=timeout)
    peers = Peers(index, size, control, data, c10d._get_default_store())
    _connected.add(peers)
    return peers


def _await_listener(timeout: timedelta) -> None:
    """Wait until somebody listens at the meeting point; torch's own client tries again less and less often."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    began = time.monotonic()
    while time.monotonic() - began < timeout.total_seconds():
        with suppress(OSError), socket.create_connection(address, timeout=1.0):
            return
        time.sleep(_POLL_S)


def disconnect() -> None:
    """Let go of the groups, before the executors connect anew or the interpreter ends.

    While the interpreter is whole: later, the groups' running threads would abort the process.
    """
    atexit.unregister(disconnect)
    for peers in _connected:
        peers.control = peers.data = peers.store = None
    with physical_world():
        if dist.is_initialized():
            dist.destroy_process_group()
    gc.collect()
