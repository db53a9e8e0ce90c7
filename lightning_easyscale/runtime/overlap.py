"""The backward of one EST beside the forward of the next.

Forward is driven by Python, backward by autograd's C++ code, which needs Python only for hooks. So while an EST's
backward runs, the next EST of the executor may have the process (`Executor.step_aside`): its forward is made ready for
the device at the same time. Both work on one stream, so the device does what it would have done in another order, and
every EST computes the same bits.

This holds as long as a backward runs no Python but the runtime's, which would find the process in another EST's state.
So the first backward of an EST is watched before any is overlapped, and each one that is, is listened to
(`engine_calls`): one that calls into Python (an `autograd.Function`, a user's hook, a forward that is computed again)
gets the process back first, and from then on the EST's backwards are left alone. A collective that is not found in time
is an error.

The cost is memory: the activations of two ESTs at a time. With ``"tail"`` it is not: what comes before the next EST's
forward (loading its data, hooks) runs beside the whole backward, the forward from the gradient on at which half of what
the backward gives back has been given back. Which one that is, every `MEASURED_EVERY`-th backward tells.

There is nothing to gain where Python is ahead of the device. ``"auto"`` is ``"tail"`` if the device has ended a forward
by the time at which its backward has been enqueued, in two of three backwards.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .baton import Baton
from .engine_calls import EngineCalls

MEASURED_EVERY = 50
_PLACES = (4, 5, 6, 7)  # eighths of the gradients, at which a forward may begin
_VOTES = 3

Overlap = bool | Literal["auto", "tail"]


class Listener(Protocol):
    """Hears of gradients: `reduction.hooks.GradientHooks`."""

    def listen(self, indices: Collection[int]) -> None:
        """Hear of these, and of no other."""


def bytes_in_use(device: torch.device) -> int:
    """What is allocated on a device; 0 where nobody counts it."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def reached(device: torch.device) -> Callable[[], bool]:
    """Tells whether a CUDA device has come to what its current stream has been given so far."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event.query


class BackwardOverlap:
    """Lets the other ESTs of an executor run during the backwards of one.

    Args:
        executor: hosts the EST.
        rank: of the EST.
        alone: called at the start of each backward, when nobody computes.
        before: called before another EST runs.
        tell: called once with what is found: why the EST's backwards are left alone, or that the device waits.
        allocated: how many bytes are in use; None: there is room for the forwards of others from the start.
        reached: called with a forward enqueued, returns what tells whether the device has ended it; None: backwards are
            overlapped whether the device waits for Python or not.
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
        reached: Callable[[], Callable[[], bool]] | None = None,
    ) -> None:
        self._executor = executor
        self._rank = rank
        self._alone = alone
        self._before = before
        self._tell = tell
        self._allocated = allocated
        self._reached = reached
        self._has_reached: Callable[[], bool] | None = None
        self._votes: list[bool] = []
        self._listener: Listener | None = None
        self._places: list[int] = []
        self._levels: list[tuple[int, int]] = []
        self._since_measured = 0
        self._suits: bool | None = None
        self._calls = EngineCalls(self._calls_python)
        self._listens = False
        self._handle: RemovableHandle | None = None
        self._aside = False

    def begin(self, loss: Tensor) -> None:
        """The backward of `loss` is about to run and to be reduced."""
        if loss.grad_fn is not None:
            self._handle = loss.grad_fn.register_prehook(self._engine_starts)

    def await_room(self) -> None:
        """A forward is about to run."""
        self._executor.await_room()

    def know_order(self, order: Sequence[int], make: Callable[[Callable[[int], None]], Listener]) -> None:
        """Gradients come in this order; `make` makes what calls a function with those that it listens to."""
        if self._allocated is not None:
            self._places = [order[len(order) * eighths // 8] for eighths in _PLACES]
            self._listener, self._since_measured = make(self.came), MEASURED_EVERY

    def came(self, index: int) -> None:
        """A gradient that was listened to is there."""
        if self._aside:
            self._executor.leave_room(self._rank)
        elif self._levels and self._allocated is not None:
            self._levels.append((index, self._allocated()))

    def _engine_starts(self, grads: Any) -> None:
        # Also where this EST stays alone: another one's graph may be of the other kind.
        self._executor.await_aside(self._rank)
        self._alone()
        if self._suits is False:
            return
        self._listens = self._calls.begin(sys._getframe(1))
        if not self._listens:
            return
        self._since_measured += 1
        if self._suits is None:
            return
        if self._reached is not None:
            self._has_reached = self._reached()
        if self._listener is not None and self._allocated is not None and self._since_measured > MEASURED_EVERY:
            self._listener.listen(self._places)
            self._levels = [(-1, self._allocated())]
        elif self._reached is None:
            self._before()
            self._aside = self._executor.step_aside(self._rank, leaves_room=self._allocated is None)

    def _calls_python(self, name: str) -> None:
        """The backward is about to call a function of others, which needs the process."""
        self._listens = False
        self._leave_alone()
        self._return()
        self._tell(f"`overlap_backward` is left out: backward calls `{name}`")

    def _leave_alone(self) -> None:
        self._suits = False
        if self._listener is not None:
            self._listener.listen(())

    def _return(self) -> None:
        if self._aside:
            self._aside = False
            self._executor.come_back(self._rank)

    def _measure(self) -> None:
        """Find the gradient from which on there is room, if this backward was measured."""
        if self._listener is None or self._allocated is None or not self._levels:
            return
        (_, start), *levels = self._levels
        half = (start + self._allocated()) / 2
        self._listener.listen([index for index, level in levels if level <= half][:1])
        self._since_measured, self._levels = 0, []

    def _vote(self) -> None:
        """Whether the device waits for Python, after a backward that ran alone."""
        if self._has_reached is None:
            return
        self._votes.append(self._has_reached())
        self._has_reached = None
        if len(self._votes) == _VOTES:
            self._reached = None
            if sum(self._votes) > _VOTES // 2:
                self._tell("the device waits for Python, so backwards run beside the next EST (`overlap_backward`)")
            else:
                self._leave_alone()

    def come_back(self) -> None:
        """The backward needs the process again, or has ended."""
        if self._listens:
            self._calls.end()
            self._listens = False
            if self._suits is None:
                self._suits = True
            self._measure()
            self._vote()
        self._return()

    def end(self) -> None:
        """The backward has ended, or failed."""
        self.come_back()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
