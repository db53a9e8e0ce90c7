"""EasyScale's inter-job rule on the exact planner: jobs start on one device and grow by their own proposals.

Running jobs are never shrunk. A waiting job starts as soon as its start device is free; then running jobs' proposals
(the best growth of each type: at most doubling, waste at most 0.30) are accepted in the order of speed gained per
device. With a scheduling interval a job grows once per round, as published; without one, proposals are accepted until
none fits, which is where the rounds would end, and one rescale is charged.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from lightning_easyscale.planning.by_type import Counts, TypePlanner
from lightning_easyscale.planning.proposals import Proposal, propose
from lightning_easyscale.simulation.job import JobState
from lightning_easyscale.simulation.policy import Changes, ElasticPolicy, View


class EasyScaleHomo(ElasticPolicy):
    """EasyScale on one device type per job."""

    name = "easyscale-homo"
    heterogeneous = False

    def __init__(self) -> None:
        """Nothing waits, nothing is offered."""
        self._waiting: dict[int, list[tuple[int, JobState]]] = {}
        self._offers: list[list[tuple[float, int, Counts, Proposal]]] = []
        self._cache: dict[tuple[TypePlanner, Counts, tuple[int, ...]], list[Proposal]] = {}
        self._limits: Counts = ()

    def _types(self, job: JobState) -> tuple[int, ...]:
        return job.types if self.heterogeneous else (job.home,)

    def _start_type(self, job: JobState, view: View) -> int:
        """The slowest type the job may use (its own, where it may use one only)."""
        models = job.planner.models
        return max(self._types(job), key=lambda i: (m.time_ns(1) if (m := models[i]) else 0, i))

    def _proposals(self, job: JobState, counts: Counts) -> list[Proposal]:
        key = (job.planner, counts, self._types(job))
        if key not in self._cache:
            self._cache[key] = propose(job.planner, counts, self._limits, types=key[2])
        return self._cache[key]

    def _offer(self, job: JobState, counts: Counts) -> None:
        for p in self._proposals(job, counts):
            heapq.heappush(self._offers[p.device_type], (-p.gain, job.index, counts, p))

    def decide(self, view: View) -> Changes:
        """Start what can start, then grow."""
        if not self._limits:
            self._limits = view.total
            self._offers = [[] for _ in view.types]
        width = len(view.types)
        for job in view.arrived + view.evicted:
            heapq.heappush(self._waiting.setdefault(self._start_type(job, view), []), (job.index, job))
        free = view.free.copy()
        changes: Changes = {}
        for kind, queue in self._waiting.items():
            while queue and free[kind] > 0:
                job = heapq.heappop(queue)[1]
                free[kind] -= 1
                changes[job.index] = tuple(int(i == kind) for i in range(width))
        started = list(changes)
        if not view.interval_s:
            self._offer_all(started, changes, view)
        grown = self._grow(free, changes, view)
        if view.interval_s:
            self._offer_all([*started, *grown], changes, view)
        return changes

    def _offer_all(self, indices: list[int], changes: Changes, view: View) -> None:
        for index in indices:
            counts = changes[index]
            assert counts is not None
            self._offer(view.active[index], counts)

    def _grow(self, free: list[int], changes: Changes, view: View) -> list[int]:
        """Accept offers, best first, while they fit; offers that are too big stay for later."""
        aside: list[tuple[int, tuple[float, int, Counts, Proposal]]] = []
        grown: dict[int, None] = {}
        while True:
            kinds = [k for k, heap in enumerate(self._offers) if heap and free[k] > 0]
            if not kinds:
                break
            kind = min(kinds, key=lambda k: self._offers[k][0][:2])
            entry = heapq.heappop(self._offers[kind])
            _, index, counts, proposal = entry
            job = view.active.get(index)
            if job is None or changes.get(index, job.counts) != counts:
                continue
            if proposal.added > free[kind]:
                aside.append((kind, entry))
                continue
            free[kind] -= proposal.added
            changes[index] = proposal.counts
            grown[index] = None
            if not view.interval_s:
                self._offer(job, proposal.counts)
        for kind, entry in aside:
            heapq.heappush(self._offers[kind], entry)
        return list(grown)

    def reclaim(self, view: View, excess: Mapping[int, int]) -> Changes:
        """Single devices where the loss is smallest; jobs left without one wait again."""
        changes = super().reclaim(view, excess)
        for index, counts in changes.items():
            job = view.active[index]
            if counts is None:
                view.evicted.append(job)
            else:
                self._offer(job, counts)
        return changes


class EasyScaleHeter(EasyScaleHomo):
    """EasyScale with D2: jobs that allow it mix device types."""

    name = "easyscale-heter"
    heterogeneous = True
