"""The backward of one EST beside the forward of the next.

Forward is driven by Python, backward by autograd's C++ code, which needs Python only for hooks. So while an EST's
backward runs, the next EST of the executor may have the process (`Executor.step_aside`): its forward is made ready for
the device at the same time. Both work on one stream, so the device does what it would have done in another order, and
every EST computes the same bits.

This holds as long as a backward runs no Python but the runtime's, which would find the process in another EST's state.
So the first backward of an EST is not overlapped but watched: one that calls into Python (an `autograd.Function`, a
user's hook, a forward that is computed again) is never overlapped. Later every `WATCHED`-th is watched too: if it has
begun to call into Python, it may have done so in another EST's state. That is an error, as is a collective in any.

The cost is memory: the activations of two ESTs at a time. With ``"tail"`` it is not: what comes before the next EST's
forward (loading its data, hooks) runs beside the whole backward, the forward from the gradient on at which half of what
the backward gives back has been given back. Which one that is, backwards that are watched tell.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from types import FrameType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .baton import Baton

_OURS = __name__.partition(".")[0]
WATCHED = 50
_PLACES = (4, 5, 6, 7)  # eighths of the gradients, at which a forward may begin

Overlap = bool | Literal["tail"]


class Listener(Protocol):
    """Hears of gradients: `reduction.hooks.GradientHooks`."""

    def listen(self, indices: Collection[int]) -> None:
        """Hear of these, and of no other."""


def bytes_in_use(device: torch.device) -> int:
    """What is allocated on a device; 0 where nobody counts it."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


class BackwardOverlap:
    """Lets the other ESTs of an executor run during the backwards of one.

    Args:
        executor: hosts the EST.
        rank: of the EST.
        alone: called at the start of each backward, when nobody computes.
        before: called before another EST runs.
        tell: called once with the reason if the EST's backwards cannot be overlapped.
        allocated: how many bytes are in use; None: there is room for the forwards of others from the start.
    """

    def __init__(
        self,
        executor: Baton,
        rank: int,
        *,
        alone: Callable[[], None] = lambda: None,
        before: Callable[[], None] = lambda: None,
        tell: Callable[[str], None],
        allocated: Callable[[], int] | None = None,
    ) -> None:
        self._executor = executor
        self._rank = rank
        self._alone = alone
        self._before = before
        self._tell = tell
        self._allocated = allocated
        self._listener: Listener | None = None
        self._places: list[int] = []
        self._measured = True
        self._levels: list[tuple[int, int]] = []
        self._suits: bool | None = None
        self._since_watched = 0
        self._watch: _Watch | None = None
        self._handle: RemovableHandle | None = None
        self._aside = False

    def begin(self, loss: Tensor) -> None:
        """The backward of `loss` is about to run and to be reduced."""
        if loss.grad_fn is not None:
            self._handle = loss.grad_fn.register_prehook(self._engine_starts)

    def await_room(self) -> None:
        """A forward is about to run."""
        self._executor.await_room()

    def know_order(self, order: Sequence[int], listener: Listener) -> None:
        """Gradients come in this order; `listener` tells `came` of them."""
        if self._allocated is not None:
            self._places = [order[len(order) * eighths // 8] for eighths in _PLACES]
            self._listener, self._measured = listener, False

    def came(self, index: int) -> None:
        """A gradient that was listened to is there."""
        if self._watch is not None and self._allocated is not None:
            self._levels.append((index, self._allocated()))
        elif self._aside:
            self._executor.leave_room(self._rank)

    def _engine_starts(self, grads: Any) -> None:
        # Also where this EST stays alone: another one's graph may be of the other kind.
        self._executor.await_aside(self._rank)
        self._alone()
        self._since_watched += 1
        if self._suits is False:
            return
        if self._suits and self._measured and self._since_watched < WATCHED:
            self._before()
            self._aside = self._executor.step_aside(self._rank, leaves_room=self._allocated is None)
        elif sys.getprofile() is None:
            self._watch = _Watch(sys._getframe(1))
            sys.setprofile(self._watch)
            if self._listener is not None and self._allocated is not None:
                self._listener.listen(self._places)
                self._levels = [(-1, self._allocated())]

    def _measure(self) -> None:
        """A backward that was watched has ended: find the gradient from which on there is room."""
        if self._listener is None or self._allocated is None or not self._levels:
            return
        (_, start), *levels = self._levels
        half = (start + self._allocated()) / 2
        self._listener.listen([index for index, level in levels if level <= half][:1])
        self._measured, self._levels = True, []

    def come_back(self) -> None:
        """The backward needs the process again, or has ended.

        Raises:
            RuntimeError: if it has begun to call into Python.
        """
        if self._aside:
            self._aside = False
            self._executor.come_back(self._rank)
        if self._watch is not None:
            sys.setprofile(None)
            called, self._watch = self._watch.called, None
            self._measure()
            since, self._since_watched = self._since_watched, 0
            if called is not None and self._suits:
                raise RuntimeError(
                    f"The backward of EST {self._rank} calls `{called}`, which it did not at first: in the last"
                    f" {since} steps it may have done so in another EST's state, and with other bits. HINT: set"
                    " `overlap_backward=False`, and go on from a checkpoint from before."
                )
            self._suits = called is None
            if called is not None:
                self._tell(f"backward calls `{called}`")

    def end(self) -> None:
        """The backward has ended, or failed."""
        self.come_back()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class _Watch:
    """A profile function that finds what a backward calls in Python, apart from the runtime's own hooks.

    Args:
        engine: the frame that called autograd's engine.
    """

    def __init__(self, engine: FrameType) -> None:
        self._engine = engine
        self.called: str | None = None

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_back is self._engine and self.called is None:
            module = str(frame.f_globals.get("__name__"))
            if module.partition(".")[0] != _OURS:
                self.called = f"{module}.{frame.f_code.co_name}"
