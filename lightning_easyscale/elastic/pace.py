"""How often ESTs meet only to ask whether to stop, where nothing else makes them meet.

The stop flag travels with the rendezvous of every gradient step. Inside a long accumulation window or a validation
there may be none for minutes. So each EST counts the batches since the last rendezvous of the world, and after an
interval that all ESTs agree on they meet. The interval follows what the ESTs measured between the last two meetings:
it grows until an executor computes for about `SECONDS`, so that fast batches hardly ever meet.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

SECONDS = 1.0
"""How long an executor should compute between two such meetings."""

_GROWTH = 8


class Pace:
    """The interval of one stage, the same on every EST because it follows from what all of them know.

    Args:
        interval: batches before the first meeting.
    """

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._seen = -1
        self._batches = 0
        self._since = 0.0

    @property
    def seconds(self) -> float:
        """Since the last rendezvous was noticed."""
        return time.monotonic() - self._since

    def start(self, meetings: int) -> None:
        """Count anew.

        Args:
            meetings: how many rendezvous of the world there have been.
        """
        self._seen, self._batches, self._since = meetings, 0, time.monotonic()

    def due(self, meetings: int) -> bool:
        """Count a batch; whether the ESTs have to meet after it."""
        if meetings != self._seen:
            self.start(meetings)
        self._batches += 1
        return self._batches >= self._interval

    def adapt(self, seconds: Sequence[float], executors: Iterable[Sequence[int]]) -> None:
        """Set the next interval.

        Args:
            seconds: what each EST measured since the last rendezvous, by rank.
            executors: the ranks that each executor hosts, one after another.
        """
        longest = max(sum(seconds[rank] for rank in ranks) for ranks in executors)
        wanted = self._interval * SECONDS / max(longest, 1e-6)
        self._interval = max(1, int(min(wanted, _GROWTH * self._interval)))
