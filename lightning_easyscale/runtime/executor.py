"""The executor: several ESTs in one process, one running at a time.

Protocol. Every EST runs its function in a thread of its own (the lead, the lowest rank, on the caller's thread). The
*baton* is the right to run (`baton.py`); it passes where an EST waits, as in `Executor.meet` (it reaches a collective),
and when an EST ends.

Invariants:

- An EST that waits for a message lets the others run; only when none can does the executor wait for other executors.
- After a meeting the lead runs first, then the others in rank order. So at any time the lead is at least as far as
  every other EST, which is what lets a broadcast from rank 0 be served without waiting (`Executor.publish`). Only a
  collective of some ESTs can hold the lead back; where order matters the others then wait (`Executor.in_turn`).
- The last EST to arrive at a meeting does the work for all of them, including the exchange with other executors.
- An error in one EST ends all of them; the first error is what the caller sees.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .baton import Baton
from .errors import CollectiveMismatch, ESTAborted, ESTHang, RemoteESTError
from .est import Context, Meeting, mismatch, note
from .messages import Mailbox
from .peers import Peers


class Executor(Baton):
    """Hosts a contiguous range of ESTs and runs their functions in turns.

    Args:
        contexts: the process-wide state of each hosted EST, by rank.
        peers: the executors of the job.
        timeout: seconds an EST may wait for the others before the run is given up.

    Attributes:
        meetings: how many rendezvous were completed here.
        mail: messages between ESTs.
        world_meetings: how many of them were of all ESTs of the job.
        stop_requested: whether this executor was asked to stop; `snapshot_requested` likewise.
        stop_agreed: whether all ESTs know that one was; changes only while all of them meet, so that every EST sees the
            same value between the same two meetings.
        snapshots_agreed: how many snapshots all ESTs know of; likewise.
    """

    def __init__(self, contexts: Mapping[int, Context], peers: Peers, *, timeout: float) -> None:
        super().__init__(contexts, peers, timeout=timeout)
        self.stop_requested = self.snapshot_requested = False
        self.stop_agreed = False
        self.snapshots_agreed = 0
        self.meetings = self.world_meetings = 0
        self._meetings: dict[Any, Meeting] = {}
        self._published: dict[Any, tuple[str, Any, set[int]]] = {}
        self.mail = Mailbox(self.ranks, peers.store)
        self._passed: dict[Any, int] = {}

    def run(self, functions: Mapping[int, Callable[[], Any]]) -> dict[int, Any]:
        """Run one function per hosted EST to its end.

        Args:
            functions: what each rank runs; the lead's on the calling thread.

        Returns:
            What each function returned, by rank.

        Raises:
            BaseException: the first error of any EST, as it was raised, with a note that names the rank.
        """
        self._failure = self._aside = None
        self._meetings.clear()
        self._published.clear()
        self.mail.clear()
        self._passed.clear()
        self.peers.begin()
        results: dict[int, Any] = {}
        for est in self._ests.values():
            est.finished, est.holds, est.waiting_for, est.inbox = False, False, None, None
            est.gate = threading.Lock()
            est.gate.acquire()
            est.context.prepare()

        def body(rank: int) -> None:
            self._ests[rank].thread = threading.get_ident()
            try:
                self._take_turn(rank)
                with self._ests[rank].context.thread():
                    results[rank] = functions[rank]()
            except ESTAborted:
                pass
            except BaseException as error:
                self.fail(rank, error)
            finally:
                self._end(rank)

        threads = [
            threading.Thread(
                target=contextvars.copy_context().run, args=(body, rank), name=f"easyscale-est-{rank}", daemon=True
            )
            for rank in self.ranks[1:]
        ]
        for thread in threads:
            thread.start()
        self._pass_to(self.lead)
        body(self.lead)
        for thread in threads:
            thread.join(timeout=None if self._failure is None else 10.0)
        if self._failure is not None:
            rank, error = self._failure
            self.peers.announce_failure(f"EST {rank} failed on executor {self.peers.index}: {error!r}")
            note(error, f"raised in EST {rank} (executor {self.peers.index})")
            raise error
        self.peers.settle()
        return results

    def meet(
        self,
        rank: int,
        key: Any,
        tag: str,
        deposit: Any,
        complete: Callable[[dict[int, Any]], Mapping[int, Any]],
        *,
        members: Sequence[int] | None = None,
    ) -> Any:
        """Wait until every local member has arrived; return this rank's result.

        Args:
            rank: the calling EST.
            key: identity of the meeting (group and sequence number), the same for all its members.
            tag: name and shape of the collective; a difference between members is an error.
            deposit: what this EST brings.
            complete: called once, by the last to arrive, with all local deposits; returns every local member's result.
            members: local ranks that take part; all hosted ESTs by default.

        Raises:
            CollectiveMismatch: if members call different collectives, or one has ended.
            ESTHang: if the others do not arrive in time.
            ESTAborted: if another EST failed.
        """
        self._check_may_act()
        est = self._ests[rank]
        meeting = self._meetings.get(key)
        if meeting is None:
            meeting = self._meetings[key] = Meeting(tuple(members or self.ranks), tag)
        if meeting.tag != tag:
            first = next(iter(meeting.deposits))
            raise mismatch(rank, tag, f"EST {first}", meeting.tag)
        meeting.deposits[rank] = deposit
        if len(meeting.deposits) == len(meeting.members):
            del self._meetings[key]
            self.meetings += 1
            results = complete(meeting.deposits)
            for member in meeting.members:
                self._ests[member].inbox = results[member]
                self._ests[member].waiting_for = None
            following = meeting.members[0]
        else:
            est.waiting_for = meeting
            following = self._next_runnable(rank)
        if following != rank:
            self._pass_to(following, leaving=rank)
            self._take_turn(rank)
        result, est.inbox = est.inbox, None
        return result

    def publish(self, rank: int, key: Any, tag: str, value: Callable[[], Any]) -> Any:
        """Serve a value that the first local EST to ask produces, without a rendezvous.

        Args:
            rank: the calling EST.
            key: identity of the exchange, the same for all ESTs.
            tag: name and shape; a difference between ESTs is an error.
            value: called by the first to arrive; must not depend on which EST calls.
        """
        self.in_turn(rank, ("publish", key), tag)
        if key not in self._published:
            self._published[key] = (tag, value(), set(self.ranks))
        published_tag, result, outstanding = self._published[key]
        if published_tag != tag:
            raise mismatch(rank, tag, "an earlier EST", published_tag)
        outstanding.discard(rank)
        if not outstanding:
            del self._published[key]
        return result

    def in_turn(self, rank: int, key: Any, tag: str) -> None:
        """Let the ESTs of this executor pass in rank order, each once.

        A collective of some ESTs only, or a message, lets others overtake one that waits for it; where order matters
        (who produces a published value, the order in which gradients are deposited) they wait here for the lower ranks.

        Args:
            rank: the calling EST.
            key: what the ESTs pass, the same for all of them.
            tag: its name, for messages.
        """
        self._check_may_act()
        place = self.ranks.index(rank)
        self.wait_until(rank, f"its turn in {tag}", lambda: self._passed.get(key, 0) >= place)
        if place + 1 < len(self.ranks):
            self._passed[key] = place + 1
        else:
            self._passed.pop(key, None)

    def _end(self, rank: int) -> None:
        """This EST is done: hand the baton on; the lead waits for all others."""
        est = self._ests[rank]
        est.finished, est.waiting_for = True, None
        if not est.holds:
            # It gave up waiting for an EST that still runs, which will find out when it comes back.
            return
        others = [e for e in self._ests.values() if not e.finished]
        if not others:
            est.context.leave()
            if rank != self.lead:
                self._pass_to(self.lead)
            return
        following = others[0]
        if self._failure is None:
            try:
                following = self._ests[self._next_runnable(rank)]
            except (CollectiveMismatch, ESTHang, RemoteESTError) as error:
                self.fail(rank, error)
        following.waiting_for = None
        self._pass_to(following.rank, leaving=rank)
        if rank == self.lead:
            self._await_others()

    def _await_others(self) -> None:
        lead = self._ests[self.lead]
        if not self._wait_for_baton(lead):
            self.fail(self.lead, ESTHang(f"EST {self.holder} did not end within {self.timeout:.0f} s."))
        lead.context.enter()
