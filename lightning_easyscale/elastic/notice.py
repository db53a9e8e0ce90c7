"""Stop signals of one process.

A signal only sets a flag; what follows from it is agreed at the next rendezvous of all ESTs. Before there is anything
to agree on (start-up), it ends the process at once. Python runs handlers on the main thread and only between two of
its instructions, and a signal that comes just before the thread sleeps does not wake it. So a thread of the listener
reads the signals a second way (`signal.set_wakeup_fd`): whichever of the two is first asks, and a second signal ends
the process even where the main thread hangs in a collective or a long kernel.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

STOPPED = os.EX_TEMPFAIL
"""Exit code (75) of a process that a stop signal ended in good order: start the same command again to go on."""

SAME_NOTICE_SECONDS = 1.0
"""Signals that come within so many seconds are one notice: a process group, its leader and an agent may all send it."""

_UNANSWERED_SECONDS = 5.0  # in start-up, for a main thread that is stuck in a native call


class StopNotice:
    """Listens to stop signals while it is entered; does nothing outside the main thread, which alone gets signals.

    Args:
        signals: what to listen to; but for SIGTERM, only what the program does not handle itself.
        end_children: ends the processes that this one has started; called before it ends at once.

    Attributes:
        requested: the first signal that came.
    """

    def __init__(self, signals: Sequence[int], *, end_children: Callable[[], None]) -> None:
        self.requested: int | None = None
        self._wanted = tuple(signals)
        self._end_children = end_children
        self._ask: Callable[[], None] | None = None
        self._previous: dict[int, Any] = {}
        self._first: float | None = None  # when a signal came that is being answered
        self._asking = threading.Lock()  # taken by the thread that asks

    def renew(self) -> None:
        """The request was answered; the next signal is a first one, and there is nobody yet to ask."""
        self.requested = self._ask = self._first = None
        self._asking = threading.Lock()

    def leave_to_parent(self) -> None:
        """Called in a forked process: what it listens to from now on is its own affair."""
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()
        signal.set_wakeup_fd(self._other_descriptor)
        # Only closed: a shutdown would reach the parent's listener too.
        self._theirs.close()
        self._mine.close()

    def ask(self, request: Callable[[], None]) -> None:
        """From now on a signal calls `request` instead of ending the process."""
        self._ask = request
        if self.requested is not None:
            request()

    def __enter__(self) -> StopNotice:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in self._wanted:
            handler = signal.getsignal(number)
            if number == signal.SIGTERM or handler in (signal.SIG_DFL, None):
                self._previous[number] = handler
        self._mine, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._theirs = theirs
        self._other_descriptor = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        for number in self._previous:
            signal.signal(number, self._handle)
        self._thread = threading.Thread(target=self._listen, name="easyscale-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._previous:
            return
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()
        signal.set_wakeup_fd(self._other_descriptor)
        # The thread reads the end of the stream, which closing alone is not: forked workers have the socket too.
        self._theirs.shutdown(socket.SHUT_RDWR)
        self._theirs.close()
        self._thread.join()
        self._mine.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._ask is None and self.requested is None:
            self.requested = number
            self._end_children()
            raise SystemExit(STOPPED)
        self._request(number)
        previous = self._previous.get(number)
        if callable(previous):
            previous(number, frame)

    def _request(self, number: int) -> None:
        ask = self._ask
        if ask is not None and self._asking.acquire(blocking=False):
            ask()
            self.requested = number  # now other threads may count on it

    def _listen(self) -> None:
        while True:
            waiting = self._first is not None and self.requested is None and self._ask is None
            if not select.select([self._mine], [], [], _UNANSWERED_SECONDS if waiting else None)[0]:
                self._leave(STOPPED)
            numbers = self._mine.recv(64)
            if not numbers:
                return
            if not any(number in self._previous for number in numbers):
                continue
            now = time.monotonic()
            self._first = now if self._first is None else self._first
            if now - self._first >= SAME_NOTICE_SECONDS:
                self._leave(128 + numbers[-1])
            self._request(numbers[0])

    def _leave(self, code: int) -> None:
        self._end_children()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
