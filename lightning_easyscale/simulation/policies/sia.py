"""After Sia (Jayaram Subramanya et al., SOSP'23): each round choose one configuration per job, all jobs at once.

A configuration is a power of two of devices of one type; a job starts with one device and at most doubles per round. A
configuration is worth ``1.1 - (r g)^(-1/2)``, g being the throughput over one device of its slowest type and r a
discount for restarting. Sia solves an integer program; with few types the same optimum comes from the exact dynamic
program, and where its state space is too large from the greedy choice, which takes the upgrade with the largest gain
per device until none is left. A round in which nothing waits, and nothing came, went or changed since the last, is not
decided again.
"""

from __future__ import annotations

import heapq
from collections import deque

from lightning_easyscale.planning.by_type import Counts, TypePlanner
from lightning_easyscale.planning.interjob import Option, choose_exactly
from lightning_easyscale.simulation.job import JobState
from lightning_easyscale.simulation.policy import Changes, ElasticPolicy, View

_EXACT_WORK = 3e6


class SiaLike(ElasticPolicy):
    """Sia at a fixed batch size, one type per job at a time (jobs may change type)."""

    name = "sia-like"
    review_s = 60.0

    def __init__(self) -> None:
        """Nothing is known of any job."""
        self._roots: dict[tuple[TypePlanner, int], list[tuple[int, float]]] = {}
        self._settled_at: list[int] | None = None

    def _rungs(self, planner: TypePlanner, kind: int) -> list[tuple[int, float]]:
        """(devices, g ** -0.5) of a job for the powers of two up to P on one type."""
        key = (planner, kind)
        if key not in self._roots:
            alone = 1e9 / (max(m.time_ns(1) for m in planner.models if m) * planner.num_ests)
            found, n = [], 1
            while n <= planner.num_ests:
                speed = planner.speed(tuple(n if i == kind else 0 for i in range(len(planner.models))))
                if speed:
                    found.append((n, (speed / alone) ** -0.5))
                n *= 2
            self._roots[key] = found
        return self._roots[key]

    def ladder(self, job: JobState, kind: int, view: View) -> list[tuple[int, float]]:
        """(devices, worth) of the configurations a job may take on a type now."""
        held = sum(job.counts or ())
        limit = min(2 * held if held else 1, view.capacity[kind])
        now = held if job.counts and job.counts[kind] else 0
        age = max(view.now - job.spec.submit_s, 1.0)
        restart = ((age + view.costs.rescale_s) / age) ** 0.5
        return [
            (n, max(0.0, 1.1 - (root if n == now else root * restart)))
            for n, root in self._rungs(job.planner, kind)
            if n <= limit
        ]

    def decide(self, view: View) -> Changes:
        """The best configurations together."""
        if view.capacity == self._settled_at and not (view.arrived or view.gone or view.evicted):
            return {}
        states, asked = 1, sum(max(1, 2 * sum(job.counts or ())) for job in view.active.values())
        for n in view.capacity:
            states *= min(n, asked) + 1
        exact = states * len(view.active) * len(view.capacity) <= _EXACT_WORK
        chosen = self._exactly(view) if exact else self.greedily(view)
        changes: Changes = {}
        for index, job in view.active.items():
            counts = chosen.get(index)
            if counts != job.counts:
                changes[index] = counts
        waiting = any(job.counts is None for job in view.active.values())
        self._settled_at = None if changes or waiting else view.capacity.copy()
        return changes

    def _exactly(self, view: View) -> dict[int, Counts]:
        width = len(view.types)
        options = [
            [
                Option(tuple(n if i == kind else 0 for i in range(width)), worth)
                for kind in range(width)
                for n, worth in self.ladder(job, kind, view)
            ]
            for job in view.active.values()
        ]
        found = choose_exactly(options, tuple(view.capacity))
        return {index: option.counts for index, option in zip(view.active, found, strict=True) if option}

    def greedily(self, view: View) -> dict[int, Counts]:
        """The greedy choice. Waiting jobs of one class differ by age only, so only the oldest of each class stands."""
        width, left = len(view.types), list(view.capacity)
        ladders: dict[tuple[int, int], list[tuple[int, float]]] = {}
        held: dict[int, tuple[int, int]] = {}
        heap: list[tuple[float, int, int, int, int, float]] = []
        queues: dict[TypePlanner, deque[JobState]] = {}

        def offer(index: int, kind: int, before: int, worth: float) -> None:
            best, taken = 0.0, None
            for n, after in ladders[index, kind]:
                if before < n <= before + left[kind] and (after - worth) / (n - before) > best:
                    best, taken = (after - worth) / (n - before), (n, after)
            if taken is not None:
                heapq.heappush(heap, (-best, index, kind, before, *taken))

        def enter(job: JobState) -> None:
            for kind in range(width):
                ladders[job.index, kind] = self.ladder(job, kind, view)
                offer(job.index, kind, 0, 0.0)

        for job in view.active.values():
            if job.counts is None:
                queues.setdefault(job.planner, deque()).append(job)
            else:
                enter(job)
        for queue in queues.values():
            enter(queue[0])
        while heap:
            _, index, kind, before, n, worth = heapq.heappop(heap)
            if held.get(index, (kind, 0)) != (kind, before):
                continue  # it has moved on since
            if n - before > left[kind]:
                offer(index, kind, before, dict(ladders[index, kind]).get(before, 0.0))
                continue
            job = view.active[index]
            if not before and job.counts is None:
                queue = queues[job.planner]
                queue.popleft()
                if queue:
                    enter(queue[0])
            held[index] = (kind, n)
            left[kind] -= n - before
            offer(index, kind, n, worth)
        return {i: tuple(n if t == kind else 0 for t in range(width)) for i, (kind, n) in held.items()}
