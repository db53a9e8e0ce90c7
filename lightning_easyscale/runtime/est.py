"""What an executor keeps of its ESTs: their state, what they wait for, whether they have stepped aside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from .errors import CollectiveMismatch

BACKWARD = "its backward"


class Context(Protocol):
    """Process-wide state of one EST, put in force while it holds the baton."""

    def enter(self) -> None:
        """Put this EST's state in force."""

    def leave(self) -> None:
        """Remember this EST's state."""

    def prepare(self) -> None:
        """Remember the launching thread's thread-local settings."""

    def thread(self) -> AbstractContextManager[None]:
        """Those settings, for the EST's thread."""


@dataclass
class Meeting:
    """A rendezvous that is filling up."""

    members: tuple[int, ...]
    tag: str
    deposits: dict[int, Any] = field(default_factory=dict)
    ready: Callable[[], bool] = bool  # of what is waited for without a meeting: whether it has come
    outside: bool = False  # another executor may bring it


@dataclass
class EST:
    """What an executor knows of one of its ESTs."""

    rank: int
    context: Context
    thread: int | None = None
    gate: threading.Lock = field(default_factory=threading.Lock)
    waiting_for: Meeting | None = None
    inbox: Any = None
    finished: bool = True
    holds: bool = False  # the baton; not so for an EST that gave up waiting
    may_return: threading.Event = field(default_factory=threading.Event)  # after it has stepped aside
    leaves_room: threading.Event = field(default_factory=threading.Event)  # for another's forward, while it is aside

    @property
    def can_run(self) -> bool:
        """Whether it may be given the baton."""
        return not self.finished and (self.waiting_for is None or self.waiting_for.ready())


def whereabouts(ests: Iterable[EST]) -> str:
    """What every EST waits for, for messages."""
    return "; ".join(
        f"EST {est.rank} waits in `{est.waiting_for.tag}`"
        if est.waiting_for is not None and not est.finished
        else f"EST {est.rank} has ended"
        for est in ests
    )


def mismatch(rank: int, tag: str, other: str, theirs: str) -> CollectiveMismatch:
    """The error of an EST that calls another collective than one before it."""
    return CollectiveMismatch(
        f"EST {rank} called `{tag}` where {other} called `{theirs}`."
        " HINT: every rank has to call the same collectives in the same order."
    )


def note(error: BaseException, text: str) -> None:
    """Attach `text` to an exception (`add_note` where Python has it)."""
    if hasattr(error, "add_note"):
        error.add_note(text)
