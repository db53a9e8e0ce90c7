"""Host memory in which gradients wait, and the stream on which they go there and come back.

A copy that is enqueued among training's kernels holds up all that follow, for as long as the link takes. So copies, and
the additions between them, have a stream of their own, beside the training of the next EST; it does what it is given
one after the other, so a sum that comes back is whole.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

Offload = Literal["host"] | None


def copied_to_host(tensor: Tensor) -> Tensor:
    """Copy of a tensor in host memory, pinned for a CUDA device, enqueued on the current stream."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor, non_blocking=True)


class HostRoom:
    """Host memory, pinned for a CUDA device, used again from step to step for tensors of the same form.

    To get pinned memory takes long, the first time milliseconds. What one stream has enqueued comes in order, so memory
    may take the next tensor as soon as the stream that filled it has been told to read it, or waits for who was.
    """

    def __init__(self) -> None:
        self._free: dict[Hashable, list[Tensor]] = {}

    def take_in(self, flat: Tensor) -> Tensor:
        """Copy of a tensor, enqueued on the current stream."""
        free = self._free.get(_form(flat))
        if free:
            return free.pop().copy_(flat, non_blocking=True)
        # Forms change: what fits nothing any more is not kept.
        self._free.clear()
        return copied_to_host(flat)

    def give_back(self, room: Tensor) -> None:
        """What `take_in` returned has been read, as far as that stream goes."""
        self._free.setdefault(_form(room), []).append(room)


def _form(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype


class Aside:
    """The stream beside training, of one device."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._reached: torch.cuda.Event | None = None
        self._busy = False

    @staticmethod
    def serves(tensor: Tensor) -> bool:
        """Whether a tensor is of a device beside whose training there is anything to gain."""
        return tensor.is_cuda

    @staticmethod
    def spare(device: torch.device) -> int:
        """Bytes that may be taken while memory is being given back, so that its peak so far remains one."""
        if device.type != "cuda":
            return 0
        allocated = torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]
        return int(allocated["peak"] - allocated["current"]) // 2

    @contextmanager
    def after(self, *tensors: Tensor) -> Iterator[None]:
        """What is enqueued in the block comes after what the current stream has been given so far, and beside the rest.

        Args:
            tensors: of the current stream, which the block works with: nobody needs to hold them. CUDA tensors; of
                none, or of others, the block does nothing beside.
        """
        if not tensors or not tensors[0].is_cuda:
            yield
            return
        current = torch.cuda.current_stream(tensors[0].device)
        if self._stream is None or self._reached is None:
            self._stream, self._reached = torch.cuda.Stream(current.device), torch.cuda.Event()
        self._reached.record(current)
        self._stream.wait_event(self._reached)
        for tensor in tensors:
            tensor.record_stream(self._stream)
        with self._instead_of(current, self._stream):
            yield

    @contextmanager
    def before(
        self, event: torch.cuda.Event | None, done: torch.cuda.Event | None
    ) -> Iterator[torch.cuda.Event | None]:
        """What is enqueued in the block comes after an event, and not after what the current stream has been given.

        Args:
            event: None: at once.
            done: an event to be used again.

        Returns:
            An event that comes after the block; None where nothing has gone beside so far, and the block does not.
        """
        if self._stream is None:
            yield None
            return
        if event is not None:
            self._stream.wait_event(event)
        done = done or torch.cuda.Event()
        with self._instead_of(torch.cuda.current_stream(self._stream.device), self._stream):
            yield done
            done.record(self._stream)

    @contextmanager
    def _instead_of(self, current: torch.cuda.Stream, stream: torch.cuda.Stream) -> Iterator[None]:
        self._busy = True
        torch.cuda.set_stream(stream)
        try:
            yield
        finally:
            torch.cuda.set_stream(current)

    def join(self) -> None:
        """What the current stream is given from here on comes after all that was enqueued beside."""
        if self._busy and self._stream is not None:
            self._busy = False
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
