"""Our own policy: shortest remaining work first, elastic, on the exact planner.

With nearly linear speed-ups up to P devices, finishing the shortest job first with all the devices it can use minimises
mean completion time (the malleable form of SRPT). Jobs are ranked by what they still need: device-seconds on their
fastest type. At each decision

1. an arriving job takes free devices, then devices of running jobs that need more than it does, the longest first;
those
   shrink, and wait only when they lose their last device;
2. what is free goes, in rank order, to waiting jobs and to running jobs that could be faster, if that pays for a
rescale.

Devices that add no speed (the planner's trimming) are never held. Every step works on sorted queues and heaps, so that
a decision costs the logarithm of the number of jobs. A heap's entries may be old: a running job's need only falls, so
an old entry is an upper bound, and the largest one is re-checked until it is current.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Mapping, Sequence

from lightning_easyscale.planning.by_type import Counts, TypePlanner
from lightning_easyscale.simulation.job import JobState
from lightning_easyscale.simulation.policy import Changes, ElasticPolicy, View

_Entry = tuple[float, int]


class EasyScaleBest(ElasticPolicy):
    """Elastic shortest-remaining-work-first over mixed device types."""

    name = "easyscale-best"

    def __init__(self) -> None:
        """Nothing runs and nothing waits."""
        self._waiting: dict[tuple[int, ...], list[_Entry]] = {}
        self._holders: list[list[tuple[float, int]]] = []
        self._hungry: dict[int, JobState] = {}
        self._fits: dict[tuple[TypePlanner, tuple[int, ...], Counts], Counts] = {}
        self._capacity: Counts = ()

    @staticmethod
    def _need(job: JobState, now: float) -> float:
        """Device-nanoseconds left on the fastest usable type."""
        times = [m.time_ns(1) for i in job.types if (m := job.planner.models[i])]
        return job.remaining_at(now) * min(times) * job.spec.max_ests

    def _fit(self, job: JobState, left: Sequence[int]) -> Counts:
        """The devices among `left` that make the job fastest, without those that add no speed."""
        p = job.spec.max_ests
        seen = tuple(min(n, p) if i in job.types else 0 for i, n in enumerate(left))
        key = (job.planner, job.types, seen)
        if key not in self._fits:
            models = job.planner.models
            room, taken = p, [0] * len(left)
            for i in sorted(job.types, key=lambda i: (m.time_ns(1) if (m := models[i]) else 0, i)):
                taken[i] = min(seen[i], room)
                room -= taken[i]
            self._fits[key] = job.planner.trimmed(tuple(taken)) if room < p else tuple(taken)
        return self._fits[key]

    def decide(self, view: View) -> Changes:
        """Place arrivals, then serve those that wait or could be faster."""
        if not self._capacity:
            self._capacity = view.total
            self._holders = [[] for _ in view.types]
        for job in view.gone + view.evicted:
            self._hungry.pop(job.index, None)
        plan: Changes = {}
        free = view.free.copy()
        for job in view.evicted:
            self._wait(job, view.now)
        for need, index in sorted((self._need(job, view.now), job.index) for job in view.arrived):
            self._place(view.active[index], need, free, plan, view)
        while self._serve(free, plan, view):
            pass  # a job that moved to better devices left some behind
        for index, counts in plan.items():
            job = view.active[index]
            if counts is None:
                self._hungry.pop(index, None)
            else:
                self._note(job, counts, view.now)
        return plan

    def _held(self, job: JobState, plan: Changes) -> Counts | None:
        return plan.get(job.index, job.counts)

    def _wait(self, job: JobState, now: float) -> None:
        insort(self._waiting.setdefault(job.types, []), (self._need(job, now), job.index))

    def _note(self, job: JobState, counts: Counts, now: float) -> None:
        """File a job's new devices."""
        entry = (-self._need(job, now), job.index)
        for i, n in enumerate(counts):
            if n:
                heapq.heappush(self._holders[i], entry)
        if counts == self._fit(job, self._capacity):
            self._hungry.pop(job.index, None)
        else:
            self._hungry[job.index] = job

    def _place(self, job: JobState, need: float, free: list[int], plan: Changes, view: View) -> None:
        """Give an arriving job free devices and, for the rest, those of longer jobs."""
        ideal = self._fit(job, self._capacity)
        got = list(self._fit(job, free))
        missing = sum(ideal) - sum(got)
        for i in sorted(job.types, key=lambda i: -ideal[i]):
            while missing > 0 and ideal[i] and (victim := self._longest(i, need, plan, view)) is not None:
                held = list(self._held(victim, plan) or ())
                part = min(missing, held[i])
                held[i] -= part
                got[i] += part
                missing -= part
                if sum(held):
                    plan[victim.index] = tuple(held)
                    self._note(victim, tuple(held), view.now)
                else:
                    plan[victim.index] = None
                    self._hungry.pop(victim.index, None)
                    self._wait(victim, view.now)
                free[i] += part
        if not sum(got):
            self._wait(job, view.now)
            return
        counts = self._fit(job, got)
        for i, n in enumerate(counts):
            free[i] -= n
        plan[job.index] = counts

    def _longest(self, kind: int, need: float, plan: Changes, view: View) -> JobState | None:
        """The holder of devices of a type that needs most, if it needs more than `need` and a rescale's worth."""
        heap = self._holders[kind]
        while heap:
            stale, index = heap[0]
            if -stale <= need:
                return None
            job = view.active.get(index)
            held = self._held(job, plan) if job else None
            if job is None or not held or not held[kind]:
                heapq.heappop(heap)
                continue
            now = self._need(job, view.now)
            if now < -stale:
                heapq.heapreplace(heap, (-now, index))
                continue
            return job
        return None

    def _serve(self, free: list[int], plan: Changes, view: View) -> bool:
        """Hand out what is free in rank order; True if a job gave devices back on the way."""
        now = view.now
        returned = False
        hungry = [(self._need(job, now), k) for k, job in self._hungry.items() if self._held(job, plan)]
        heapq.heapify(hungry)
        places = dict.fromkeys(self._waiting, 0)
        while any(free):
            heads = [
                (queue[places[types]], types)
                for types, queue in self._waiting.items()
                if places[types] < len(queue) and any(free[i] for i in types)
            ]
            best = min(heads) if heads else None
            if hungry and (best is None or hungry[0] <= best[0]):
                returned |= self._grow(view.active[heapq.heappop(hungry)[1]], free, plan, view)
            elif best is not None:
                (_, index), types = best
                job = view.active[index]
                counts = self._fit(job, free)
                for i, n in enumerate(counts):
                    free[i] -= n
                plan[index] = counts
                places[types] += 1
            else:
                break
        for types, place in places.items():
            del self._waiting[types][:place]
        return returned

    def _grow(self, job: JobState, free: list[int], plan: Changes, view: View) -> bool:
        """Give a running job more or better devices where that pays; True if it gave others back."""
        held = self._held(job, plan)
        assert held is not None
        wanted = self._fit(job, [a + b for a, b in zip(free, held, strict=True)])
        saved = (job.planner.seconds(held) - job.planner.seconds(wanted)) * job.remaining_at(view.now)
        # A job that is being rescaled anyway pays no second time.
        if saved <= (0.0 if job.index in plan else view.costs.rescale_s):
            return False
        for i, (a, b) in enumerate(zip(held, wanted, strict=True)):
            free[i] += a - b
        plan[job.index] = wanted
        return any(a > b for a, b in zip(held, wanted, strict=True))

    def reclaim(self, view: View, excess: Mapping[int, int]) -> Changes:
        """Single devices where the loss is smallest; jobs left without one wait again."""
        changes = super().reclaim(view, excess)
        for index, counts in changes.items():
            job = view.active[index]
            if counts is None:
                view.evicted.append(job)
            else:
                self._note(job, counts, view.now)
        return changes
