"""How long each EST of an executor holds the baton, on the device's own time line.

A slice goes from the moment an EST takes the baton to the moment it gives it up. The lead's holds its forward and
backward and the optimizer's step; the last EST's ends with the exchange with the other executors, which the last to
arrive does for all. On CUDA a slice is the time between two events on the stream, so no slice waits for the device.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch


class Slices:
    """Watches the contexts of an executor's ESTs.

    Args:
        contexts: by rank; their `enter` and `leave` are wrapped.
        on_device: whether to time on the current CUDA stream.
    """

    def __init__(self, contexts: Mapping[int, Any], *, on_device: bool) -> None:
        self._on_device = on_device
        self._lead = min(contexts)
        self._began: Any = None
        self._taken: list[tuple[int, Any, Any]] = []
        for rank, context in contexts.items():
            context.enter = partial(self._enter, context.enter)
            context.leave = partial(self._leave, rank, context.leave)

    def begin(self) -> None:
        """The lead begins a span."""
        self._taken.clear()
        self._began = self._mark()

    def end(self) -> None:
        """The lead ends the span."""
        self._taken.append((self._lead, self._began, self._mark()))

    def seconds(self) -> dict[int, float]:
        """Of each EST within the span."""
        if self._on_device:
            torch.cuda.synchronize()
        totals: dict[int, float] = defaultdict(float)
        for rank, began, ended in self._taken:
            totals[rank] += began.elapsed_time(ended) / 1e3 if self._on_device else ended - began
        self._taken.clear()
        return dict(totals)

    def _mark(self) -> Any:
        if not self._on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _enter(self, enter: Any) -> None:
        self._began = self._mark()
        enter()

    def _leave(self, rank: int, leave: Any) -> None:
        leave()
        self._taken.append((rank, self._began, self._mark()))
