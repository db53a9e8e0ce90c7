"""Copies of state that training goes on changing."""

from __future__ import annotations

import copy
from typing import Any

import torch


class HostCopy:
    """A copy of nested containers, with all tensors in host memory; other leaves are shared.

    From a CUDA device the copy runs on a stream of its own, into pinned memory. The device's later work waits for it,
    this process does not.

    Args:
        value: containers of tensors and plain values.
    """

    def __init__(self, value: Any) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._value = self._copy(value)
        self._done = []
        for device, stream in self._streams.items():
            self._done.append(stream.record_event())
            torch.cuda.current_stream(device).wait_event(self._done[-1])

    def wait(self) -> Any:
        """The copy, once it is complete."""
        for event in self._done:
            event.synchronize()
        return self._value

    def _copy(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._copy_tensor(value.detach())
        if isinstance(value, dict):
            copied = copy.copy(value)  # a state dict has attributes
            copied.update((key, self._copy(item)) for key, item in value.items())
            return copied
        if type(value) in (list, tuple):
            return type(value)(self._copy(item) for item in value)
        return value

    def _copy_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_cuda:
            return tensor.to("cpu", copy=True)
        stream = self._streams.get(tensor.device)
        if stream is None:
            stream = self._streams[tensor.device] = torch.cuda.Stream(tensor.device)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            copied = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
        return copied
