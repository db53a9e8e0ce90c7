"""Copies of state that training goes on changing, in memory that the next copy takes again."""

from __future__ import annotations

import copy
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64
_ROOM = 1.25  # more than was asked for, where a state grows
_PLAIN = frozenset((int, float, str, bool, type(None), bytes))


class HostMemory:
    """Memory for one `HostCopy` at a time, which another process may map; it has no name.

    Attributes:
        descriptor: of the memory, -1 while there is none.
    """

    def __init__(self) -> None:
        self.descriptor = -1
        self._mapped: mmap.mmap | None = None
        self._bytes: Tensor | None = None
        self._pinned = self._registered = False

    def reserve(self, size: int, *, pinned: bool) -> None:
        """At least so many bytes; what was there before is lost.

        Args:
            size: how many.
            pinned: whether CUDA devices are to copy into it.
        """
        if self._bytes is None or self._bytes.numel() < size or pinned > self._pinned:
            larger = self._bytes is not None
            self._release()
            size = max(int(size * _ROOM) if larger else size, mmap.PAGESIZE)
            self.descriptor = _file_without_a_name()
            os.ftruncate(self.descriptor, size)
            self._mapped = mmap.mmap(self.descriptor, size)
            self._bytes = torch.frombuffer(self._mapped, dtype=torch.uint8)
            self._pinned, self._registered = pinned, pinned and _register(self._bytes)

    def part(self, place: int, size: int) -> Tensor:
        """Some bytes, as a storage of their own: `torch.save` would save all of a larger one."""
        assert self._mapped is not None
        return torch.frombuffer(self._mapped, dtype=torch.uint8, count=size, offset=place)

    @property
    def size(self) -> int:
        """Bytes that there are."""
        return 0 if self._bytes is None else self._bytes.numel()

    def offset(self, tensor: Tensor) -> int | None:
        """Where a tensor lies in it; None: elsewhere."""
        if self._bytes is None:
            return None
        offset = tensor.data_ptr() - self._bytes.data_ptr()
        return offset if 0 <= offset < self._bytes.numel() else None

    def free(self) -> None:
        """Give the memory back, once no copy in it is used any more; waits for CUDA devices that may write there."""
        if self._registered:
            with suppress(RuntimeError):  # of a device that has failed
                torch.cuda.synchronize()
        self._release()

    def _release(self) -> None:
        if self._bytes is None:
            return
        if self._registered:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
        os.close(self.descriptor)
        self.descriptor, self._bytes, self._mapped, self._pinned, self._registered = -1, None, None, False, False


def _file_without_a_name() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("easyscale-snapshot")
    with tempfile.TemporaryFile() as file:  # other systems than Linux
        return os.dup(file.fileno())


def _register(memory: Tensor) -> bool:
    """Pin memory for CUDA devices; where that cannot be done, copies wait for the device, and are the same."""
    failed = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if failed:
        with suppress(RuntimeError):
            torch.zeros(1, device="cuda")  # CUDA blames the next kernel for it
    return not failed


class HostCopy:
    """A copy of nested containers, with all tensors in host memory; other leaves are shared.

    From a CUDA device the copy runs on a stream of its own. The device's later work waits for it, this process does
    not.

    Args:
        value: containers of tensors and plain values.
        memory: takes the tensors; what was copied there before is lost.
    """

    def __init__(self, value: Any, memory: HostMemory) -> None:
        sources = list(_tensors(value))
        places, size = [], 0
        for source in sources:
            places.append(size)
            size += -(-source.numel() * source.element_size() // _ALIGNMENT) * _ALIGNMENT
        devices = list(dict.fromkeys(source.device for source in sources if source.is_cuda))
        memory.reserve(size, pinned=bool(devices))
        copies = [_like(source, memory, place) for source, place in zip(sources, places, strict=True)]
        self._done: list[torch.cuda.Event] = []
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for device in devices:
                self._copy_from(device, sources, copies)
            here = [i for i, source in enumerate(sources) if not source.is_cuda]
            if here:
                torch._foreach_copy_([copies[i] for i in here], [sources[i] for i in here])
        self._value = _replace(value, iter(copies))

    def wait(self) -> Any:
        """The copy, once it is complete."""
        for event in self._done:
            event.synchronize()
        return self._value

    def _copy_from(self, device: torch.device, sources: list[Tensor], copies: list[Tensor]) -> None:
        stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        mine = [i for i, source in enumerate(sources) if source.device == device]
        with torch.cuda.stream(stream):
            torch._foreach_copy_([copies[i] for i in mine], [sources[i] for i in mine], non_blocking=True)
            for i in mine:
                sources[i].record_stream(stream)
            self._done.append(stream.record_event())
        current.wait_event(self._done[-1])


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers, in order."""
    if isinstance(value, Tensor):
        if value.layout is torch.strided:
            yield value.detach()
    elif isinstance(value, dict):
        for item in value.values():
            if type(item) not in _PLAIN:
                yield from _tensors(item)
    elif type(value) in (list, tuple):
        for item in value:
            if type(item) not in _PLAIN:
                yield from _tensors(item)


def _replace(value: Any, tensors: Iterator[Tensor]) -> Any:
    """New containers with other tensors, in the same order."""
    if isinstance(value, Tensor):
        return next(tensors) if value.layout is torch.strided else value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # a state dict has attributes
        copied.update((k, i if type(i) in _PLAIN else _replace(i, tensors)) for k, i in value.items())
        return copied
    if type(value) in (list, tuple):
        return type(value)(i if type(i) in _PLAIN else _replace(i, tensors) for i in value)
    return value


def _like(source: Tensor, memory: HostMemory, place: int) -> Tensor:
    """Room for a tensor at a place in memory; with its strides, where they leave no gaps."""
    strides = source.stride() if source.is_contiguous() else torch.empty_like(source, device="meta").stride()
    size = source.numel() * source.element_size()
    if not size:
        return torch.empty_like(source, device="cpu")
    return memory.part(place, size).view(source.dtype).as_strided(source.shape, strides)
