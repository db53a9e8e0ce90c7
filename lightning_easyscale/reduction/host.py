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


def to_host(flat: Tensor) -> Tensor:
    """Copy of a device tensor in host memory; a CPU tensor as it is."""
    return flat if flat.device.type == "cpu" else copied_to_host(flat)


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
        self._busy = False

    @staticmethod
    def serves(tensor: Tensor) -> bool:
        """Whether a tensor is of a device beside whose training there is anything to gain."""
        return tensor.is_cuda

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
        device = tensors[0].device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        for tensor in tensors:
            tensor.record_stream(self._stream)
        self._busy = True
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What the current stream is given from here on comes after all that was enqueued beside."""
        if self._busy and self._stream is not None:
            self._busy = False
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
