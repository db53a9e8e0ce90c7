"""The baton: which EST of an executor runs.

Exactly one EST holds it at any time, and process-wide state is that EST's (`context.py`). It goes to another where its
holder waits (`wait_until`, a meeting of `Executor`), or steps aside: then the holder goes on without it, in code that
needs no process-wide state, until it comes back. One EST at most is aside.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from .errors import CollectiveMismatch, ESTAborted, ESTHang
from .est import BACKWARD, EST, Context, Meeting, whereabouts
from .peers import Peers


class Baton:
    """The ESTs of an executor and their turns.

    Args:
        contexts: the process-wide state of each hosted EST, by rank.
        peers: the executors of the job.
        timeout: seconds an EST may wait for the others before the run is given up.

    Attributes:
        holder: the EST that runs.
        switches: how often the baton went from one EST to another.
    """

    def __init__(self, contexts: Mapping[int, Context], peers: Peers, *, timeout: float) -> None:
        self.ranks = tuple(sorted(contexts))
        self.lead = self.ranks[0]
        self.peers = peers
        self.timeout = timeout
        self.switches = 0
        self.holder: int | None = None
        self._ests = {rank: EST(rank, context) for rank, context in contexts.items()}
        self._aside: EST | None = None
        self._failure: tuple[int, BaseException] | None = None

    @property
    def failed(self) -> bool:
        """Whether an EST of this executor has failed; all others are then on their way out."""
        return self._failure is not None

    def fail(self, rank: int, error: BaseException) -> None:
        """An EST has failed; from here on all others are on their way out."""
        if self._failure is None:
            self._failure = (rank, error)

    def wait_until(self, rank: int, tag: str, ready: Callable[[], bool], *, outside: bool = False) -> None:
        """Let the other ESTs run until something has come.

        Args:
            rank: the calling EST.
            tag: what it waits for, for messages.
            ready: whether it has come.
            outside: whether another executor may bring it.
        """
        self._check_may_act()
        if not ready():
            self._wait(rank, Meeting((rank,), tag, ready=ready, outside=outside))

    def let_others_run(self, rank: int, tag: str) -> None:
        """Let every other EST of this executor that can run go on to where it waits.

        Args:
            rank: the calling EST.
            tag: what it does, for messages.
        """
        self._check_may_act()
        self._wait(rank, Meeting((rank,), tag, ready=lambda: True))

    def await_aside(self, rank: int) -> None:
        """Let an EST that has stepped aside end its backward: two that deposit gradients never run at a time."""
        self._check_alive()
        while (before := self._aside) is not None:
            self._await(before, before.may_return)
            self._wait(rank, Meeting((rank,), BACKWARD, ready=lambda: True), following=before.rank)

    def step_aside(self, rank: int, *, leaves_room: bool = True) -> bool:
        """Let another EST run beside this one's backward, after `await_aside`.

        If there is no room for its forward yet, that waits for `leave_room`. Until `come_back` EST `rank` may only do
        what needs neither process-wide state nor the other ESTs. Returns whether another EST runs now; if none can,
        this one keeps the baton.
        """
        self.await_aside(rank)
        est = self._ests[rank]
        if not any(other.can_run for other in self._ests.values() if other is not est):
            return False
        est.may_return.clear()
        (est.leaves_room.set if leaves_room else est.leaves_room.clear)()
        est.waiting_for = Meeting((rank,), BACKWARD, ready=est.may_return.is_set)
        self._aside = est
        self._pass_to(self._next_runnable(rank), leaving=rank)
        return True

    def come_back(self, rank: int) -> None:
        """Wait for the baton after `step_aside` has given it away."""
        est = self._ests[rank]
        est.leaves_room.set()
        est.may_return.set()
        try:
            self._take_turn(rank)
        finally:
            est.waiting_for = self._aside = None

    def leave_room(self, rank: int) -> None:
        """From here on, what EST `rank` does aside leaves room for another's forward."""
        self._ests[rank].leaves_room.set()

    def await_room(self) -> None:
        """Wait until an EST that is aside leaves room for a forward."""
        if (before := self._aside) is not None:
            self._await(before, before.leaves_room)

    def _await(self, est: EST, event: threading.Event) -> None:
        if not event.wait(self.timeout):
            raise ESTHang(
                f"EST {est.rank} was in {BACKWARD} for {self.timeout:.0f} s, and the others wait for it. HINT: look for"
                " a blocking call there; if it is legitimately that slow, raise `timeout`."
            )

    def _wait(self, rank: int, meeting: Meeting, following: int | None = None) -> None:
        est = self._ests[rank]
        est.waiting_for = meeting
        if following is None:
            following = self._next_runnable(rank)
        if following != rank:
            self._pass_to(following, leaving=rank)
            self._take_turn(rank)
        est.waiting_for = None

    def _check_may_act(self) -> None:
        if self._aside is not None and self._aside.thread == threading.get_ident():
            raise RuntimeError(
                f"The backward of EST {self._aside.rank} calls a collective while another EST runs. HINT: its graph was"
                " without one in the first step; set `overlap_backward=False`."
            )
        self._check_alive()

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise ESTAborted(f"EST {self._failure[0]} failed")

    def _next_runnable(self, rank: int) -> int:
        start = self.ranks.index(rank) + 1
        order = self.ranks[start:] + self.ranks[:start]
        began, pause = time.monotonic(), 1e-4
        while True:
            for candidate in order:
                if self._ests[candidate].can_run:
                    return candidate
            if self._aside is not None:
                self._await(self._aside, self._aside.may_return)
                continue
            waits = [est.waiting_for for est in self._ests.values() if not est.finished]
            if not any(wait is not None and wait.outside for wait in waits):
                raise CollectiveMismatch(
                    f"no EST can go on: {whereabouts(self._ests.values())}."
                    " HINT: every rank has to call the same collectives the same number of times."
                )
            self.peers.raise_failure()
            if time.monotonic() - began > self.timeout:
                states = whereabouts(self._ests.values())
                raise ESTHang(f"nothing came from the other executors in {self.timeout:.0f} s: {states}.")
            time.sleep(pause)
            pause = min(2 * pause, 0.01)

    def _pass_to(self, rank: int, leaving: int | None = None) -> None:
        if leaving is not None:
            self._ests[leaving].context.leave()
            self._ests[leaving].holds = False
            self.switches += 1
        self.holder = rank
        self._ests[rank].gate.release()

    def _take_turn(self, rank: int) -> None:
        """Wait for the baton, then put this EST's state in force."""
        est = self._ests[rank]
        if not self._wait_for_baton(est):
            wanted = est.waiting_for.tag if est.waiting_for is not None else "its turn"
            raise ESTHang(
                f"EST {rank} waited {self.timeout:.0f} s in `{wanted}`; EST {self.holder} holds the baton and did not"
                " arrive. HINT: look for an endless loop or a blocking call there; if a step is legitimately that"
                " slow, raise `timeout`."
            )
        est.holds = True
        est.context.enter()
        self._check_alive()

    def _wait_for_baton(self, est: EST) -> bool:
        """Whether the baton has come in time."""
        while True:
            try:
                return est.gate.acquire(timeout=self.timeout)
            except BaseException as error:
                # A signal handler raised on the waiting main thread: end everyone, but only once we hold the baton.
                if self._failure is not None:
                    raise
                self._failure = (est.rank, error)
                if self.holder == est.rank:
                    # It raised between the arrival of the baton and the return of `acquire`.
                    est.gate.acquire(blocking=False)
                    return True
