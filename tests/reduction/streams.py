"""CUDA streams without a GPU: what may run at the same time, and whether it touches the same memory.

Tensors are a CPU's and operations run at once, so values are right whatever the order. What is checked is the order
that a GPU would have to keep: every operation belongs to the stream that is current, streams wait for events, and two
operations of which one writes to a piece of memory must not be free to overlap. Memory is handed out as torch's
caching allocator does it: what was freed serves the next allocation of its stream at once, but for tensors of which
another stream was recorded.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from lightning_easyscale.reduction import host

Clock = dict[int, int]


class RaceError(AssertionError):
    """Two operations on one piece of memory, of which one writes, are in no order."""


class Stream:
    """Stands for `torch.cuda.Stream`."""

    def __init__(self, device: Any = None) -> None:
        self.device = torch.device("cpu")
        self.clock: Clock = defaultdict(int)

    def wait_event(self, event: Event) -> None:
        for stream, count in event.clock.items():
            self.clock[stream] = max(self.clock[stream], count)

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)


class Event:
    """Stands for `torch.cuda.Event`."""

    current: Stream

    def __init__(self) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict((stream or self.current).clock)


class _Block:
    """A piece of memory and who has used it: stream and the count of its operation, of writers and readers."""

    def __init__(self, home: Stream | None) -> None:
        self.home = home
        self.writes: Clock = {}
        self.reads: Clock = {}
        self.recorded = False


class Streams(TorchDispatchMode):
    """Inside, operations are noted and checked.

    Args:
        monkeypatch: of the test; replaces what `torch.cuda` has of streams.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.main = self.current = Event.current = Stream()
        self._blocks: dict[int, tuple[StorageWeakRef, _Block]] = {}
        self._free: dict[int, list[_Block]] = defaultdict(list)
        for name, value in {
            "Stream": Stream,
            "Event": Event,
            "current_stream": lambda device=None: self.current,
            "set_stream": self._set,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self._record(tensor, stream))
        monkeypatch.setattr(host, "copied_to_host", self._copied_to_host)
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            self._give_back(storage)
            out = resize(storage, size)
            if size:
                self._hand_out(storage)
            return out

        monkeypatch.setattr(torch.UntypedStorage, "resize_", resized)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        out = func(*args, **(kwargs or {}))
        values = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | (kwargs or {})
        written = tree_leaves(
            [
                values[argument.name]
                for argument in func._schema.arguments
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
        )
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        known = {_key(tensor) for tensor in given}
        views = any(result.alias_info is not None for result in func._schema.returns) and not written
        if not views:
            for tensor in made:
                if _key(tensor) not in known:
                    self._hand_out(tensor.untyped_storage())
            if "empty" not in func._schema.name:
                self._use(func, reads=given, writes=[*written, *(t for t in made if _key(t) not in known)])
        return out

    def _use(self, func: Any, reads: list[Tensor], writes: list[Tensor]) -> None:
        stream, number = self.current, id(self.current)
        stream.clock[number] += 1
        for tensor in writes:
            block = self._block(tensor)
            for other, count in [*block.writes.items(), *block.reads.items()]:
                self._ordered(func, other, count)
            block.writes, block.reads = {number: stream.clock[number]}, {}
        for tensor in reads:
            block = self._block(tensor)
            for other, count in block.writes.items():
                self._ordered(func, other, count)
            block.reads[number] = stream.clock[number]

    def _ordered(self, func: Any, other: int, count: int) -> None:
        if self.current.clock[other] < count:
            raise RaceError(f"{func} may run beside another stream's use of the same memory.")

    def _block(self, tensor: Tensor) -> _Block:
        storage = tensor.untyped_storage()
        found = self._blocks.get(storage._cdata)
        if found is None or found[0].expired():
            # Made before the simulation began.
            return self._hand_out(storage)
        return found[1]

    def _hand_out(self, storage: torch.UntypedStorage) -> _Block:
        for key, (alive, block) in list(self._blocks.items()):
            if alive.expired():
                del self._blocks[key]
                self._return(block)
        pool = self._free[id(self.current)]
        block = pool.pop() if pool else _Block(self.current)
        self._blocks[storage._cdata] = (StorageWeakRef(storage), block)
        return block

    def _give_back(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._blocks:
            self._return(self._blocks.pop(storage._cdata)[1])

    def _return(self, block: _Block) -> None:
        # A recorded stream is waited for by the allocator; the host's memory is not the device's.
        if block.home is not None and not block.recorded:
            self._free[id(block.home)].append(block)

    def _set(self, stream: Stream) -> None:
        self.current = Event.current = stream

    def _record(self, tensor: Tensor, stream: Stream) -> None:
        self._block(tensor).recorded = True

    def _copied_to_host(self, tensor: Tensor) -> Tensor:
        with _disable_current_modes():
            made = torch.empty_like(tensor)
        self._blocks[_key(made)] = (StorageWeakRef(made.untyped_storage()), _Block(None))
        return made.copy_(tensor)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
