"""Signals as something a loop can wait for."""

from __future__ import annotations

import signal
import socket
from collections.abc import Sequence
from types import FrameType
from typing import Any


class SignalQueue:
    """Collects signals while it is entered; yields a socket that becomes readable with each.

    Args:
        wanted: the signals to collect. The end of a child process wakes the loop too.
    """

    def __init__(self, wanted: Sequence[int]) -> None:
        self._wanted = (*wanted, signal.SIGCHLD)
        self._numbers: list[int] = []
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> socket.socket:
        self._mine, self._other = socket.socketpair()
        for end in (self._mine, self._other):
            end.setblocking(False)
        self._handlers = {number: signal.getsignal(number) for number in self._wanted}
        self._before = signal.set_wakeup_fd(self._other.fileno(), warn_on_full_buffer=False)
        for number in self._wanted:
            signal.signal(number, self._note)
        return self._mine

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._before)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._mine.close()
        self._other.close()

    def take(self) -> list[int]:
        """What has come since the last call, oldest first."""
        try:
            while self._mine.recv(1024):
                pass
        except BlockingIOError:
            pass
        taken, self._numbers = self._numbers, []
        return taken

    def _note(self, number: int, _: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            self._numbers.append(number)
