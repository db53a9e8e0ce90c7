"""The physical side of a rendezvous: how executors talk to each other.

Each executor is one process. `Peers` owns the process groups between them, which are private to the runtime: user code
only ever sees the virtual world. A rendezvous that spans executors starts with `exchange`: every executor contributes
a header (what it is about to do, what it was asked for, whether it failed), so that a mismatch or a failure
elsewhere is an error with a cause and never a hang. Headers have one size, whatever is exchanged; what little else an
executor has to say travels in them. Only a transfer that an earlier header has agreed on goes without (`ahead`).
"""

from __future__ import annotations

import atexit
import gc
import os
import pickle
import socket
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import reduce
from operator import or_
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from .ahead import Habit, Transfer
from .errors import CollectiveMismatch, ESTHang, RemoteESTError
from .header import FAILED, HEADER_BYTES, ROOM, Header, digest
from .packing import as_bytes
from .world import physical_world

_connected: weakref.WeakSet[Peers] = weakref.WeakSet()

_POLL_S = 0.02
_NOTHING = torch.empty(0, dtype=torch.uint8)
_FAILURES = "easyscale/failures"


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
        self._habit = Habit()
        self._owed: Transfer | None = None  # agreed on ahead, not yet made
        self._skipped: Transfer | None = None  # made with blank tensors since the last header

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

    def agree(self, tag: str, *, asked: int = 0, ahead: bool = False) -> int:
        """Start a rendezvous that spans executors; see `exchange`. Returns what any executor was asked for."""
        return self.exchange(tag, asked=asked, ahead=ahead)[0]

    def exchange(
        self, tag: str, *, asked: int = 0, payload: torch.Tensor | None = None, ahead: bool = False
    ) -> tuple[int, list[torch.Tensor]]:
        """Start a rendezvous that spans executors, and tell the others something.

        Args:
            tag: what this executor is about to do; must be the same everywhere.
            asked: what this executor was asked for, `header.STOP` and `header.SNAPSHOT`.
            payload: what it has to say, flat uint8 in host memory.
            ahead: whether to agree on the transfer that usually follows, too.

        Returns:
            What any executor was asked for; every executor's payload, in executor order, each at a multiple of
            16 bytes of its storage.

        Raises:
            CollectiveMismatch: if the tags differ.
            RemoteESTError: if another executor failed.
            ESTHang: if another executor did not arrive within the timeout, or vanished.
        """
        if self.control is None:
            return asked, [_NOTHING if payload is None else payload]
        payload = _NOTHING if payload is None else payload
        self.settle()
        skipped, self._skipped = self._skipped, None
        if skipped is not None:
            tag = f"{tag}` without `{skipped.tag}"
        proposed = self._habit.header(ahead)
        mine = Header(digest(tag), asked, payload.numel(), payload)
        if proposed is not None:
            mine.ahead = proposed.digest
        headers = self._exchange_headers(mine, tag)
        if any(h.flags & FAILED for h in headers):
            self._all_know = True
            causes = self.all_gather_object(None)
            raise RemoteESTError(next(c for c in causes if c is not None))
        if any(h.tag != mine.tag for h in headers):
            self._all_know = True
            tags = self.all_gather_object(tag)
            raise CollectiveMismatch(
                "the executors are not at the same collective: "
                + ", ".join(f"executor {i} is at `{t}`" for i, t in enumerate(tags))
                + ". HINT: every rank has to call the same collectives in the same order."
            )
        if all(h.ahead == mine.ahead for h in headers):
            self._owed = proposed
        payloads = [_NOTHING if h.payload is None else h.payload for h in headers]
        if max(h.length for h in headers) > ROOM:
            payloads = self._gather_bytes(payload, [h.length for h in headers])
        return reduce(or_, (h.flags for h in headers)), payloads

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
            try:
                self.settle()
            except ESTHang:
                raise
            except RuntimeError:
                pass  # of the device, which may be what has failed
            self._skipped = None
            self._exchange_headers(Header(bytes(16), FAILED), "failure")
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
        """Overwrite `tensors` by those of executor `source`, after a header (see `exchange`) if not agreed on ahead."""
        if self.control is None:
            return
        if all(self._by_gloo(t.device) for t in tensors):
            transfer = Transfer.of(tag, tensors, source)
            self._habit.transfer(transfer)
            if self._owed is not None and self._owed.digest == transfer.digest:
                self._owed = None
                self._broadcast(tag, tensors, source)
                return
        over_host = all(self._travels_over_host(t.device) for t in tensors)
        if not over_host or sum(t.numel() * t.element_size() for t in tensors) > ROOM:
            self.agree(tag)
            self._broadcast(tag, tensors, source)
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

    def settle(self) -> None:
        """Make the transfer that was agreed on ahead, if it is not made yet, for whoever waits for it.

        Called before anything else goes over `data`, and before a header.
        """
        if self._owed is not None:
            self._skipped, self._owed = self._owed, None
            self._broadcast(self._skipped.tag, self._skipped.blanks(), self._skipped.source)

    def _broadcast(self, tag: str, tensors: Sequence[torch.Tensor], source: int) -> None:
        """Overwrite `tensors` by those of executor `source`, one by one: many small ones are a parcel already."""
        assert self.data is not None
        opts = dist.BroadcastOptions()
        opts.rootRank = source
        opts.rootTensor = 0
        for tensor in tensors:
            dense = tensor.contiguous()
            self._wait(self.data.broadcast([as_bytes(dense)], opts), tag)
            if dense is not tensor and self.index != source:
                tensor.copy_(dense)

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
        return device.type == "cpu" or self._by_gloo(device)

    def _by_gloo(self, device: torch.device) -> bool:
        """Whether `data` takes tensors on `device` over gloo."""
        assert self.data is not None
        try:
            return self.data._get_backend(device).name().lower() == "gloo"
        except RuntimeError:
            return False

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
        outputs = [torch.empty(HEADER_BYTES, dtype=torch.uint8) for _ in range(self.size)]
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
