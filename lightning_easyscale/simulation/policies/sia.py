"""After Sia (Jayaram Subramanya et al., SOSP'23): each round choose one configuration per job, all jobs at once.

A configuration is a power of two of devices of one type; a job starts with one device and at most doubles per round. A
configuration is worth ``1.1 - (r g)^(-1/2)``, g being the throughput over one device of its slowest type and r a
discount for restarting. Sia solves an integer program; with few types the same optimum comes from the exact dynamic
program, and where its state space is too large from the greedy choice, which takes the upgrade with the largest gain
per device until none is left. A round in which nothing waits, and nothing came, went or changed since the last, is not
decided again.

Waiting jobs of one class (same step times, so same configurations) differ by their age only: the oldest is worth most,
so a round looks at the running jobs and at one waiting job per class and start, not at the whole queue.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Mapping

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
        """Nothing runs, nothing waits."""
        self._roots: dict[TypePlanner, list[tuple[int, int, float]]] = {}
        self._running: dict[int, JobState] = {}
        self._waiting: dict[TypePlanner, list[tuple[float, int]]] = {}
        self._settled_at: list[int] | None = None

    def _rungs(self, planner: TypePlanner) -> list[tuple[int, int, float]]:
        """(type, devices, g ** -0.5) of a job's configurations: the powers of two up to P, type by type."""
        if planner not in self._roots:
            alone = 1e9 / (max(m.time_ns(1) for m in planner.models if m) * planner.num_ests)
            width, found = len(planner.models), []
            for kind in range(width):
                n = 1
                while n <= planner.num_ests:
                    speed = planner.speed(tuple(n if i == kind else 0 for i in range(width)))
                    if speed:
                        found.append((kind, n, (speed / alone) ** -0.5))
                    n *= 2
            self._roots[planner] = found
        return self._roots[planner]

    def configurations(self, job: JobState, view: View) -> list[tuple[int, int, float]]:
        """(type, devices, worth) of what a job may hold now, type by type."""
        held = job.counts
        limit = 2 * sum(held) if held else 1
        age = max(view.now - job.spec.submit_s, 1.0)
        restart = ((age + view.costs.rescale_s) / age) ** 0.5
        return [
            (kind, n, worth)
            for kind, n, root in self._rungs(job.planner)
            if n <= limit
            and n <= view.capacity[kind]
            and (worth := 1.1 - (root if held and held[kind] == n else root * restart)) > 0.0
        ]

    def decide(self, view: View) -> Changes:
        """The best configurations together."""
        for job in view.arrived + view.evicted:
            self._wait(job)
        for job in view.gone + view.evicted:
            self._running.pop(job.index, None)
        if view.capacity == self._settled_at and not (view.arrived or view.gone or view.evicted):
            return {}
        waiting = sum(map(len, self._waiting.values()))
        states, asked = 1, waiting + sum(2 * sum(job.counts or ()) for job in self._running.values())
        for n in view.capacity:
            states *= min(n, asked) + 1
        exact = states * len(view.active) * len(view.capacity) <= _EXACT_WORK
        chosen = self.exactly(view) if exact else self.greedily(view)
        changes: Changes = {k: chosen.get(k) for k, job in self._running.items() if chosen.get(k) != job.counts}
        changes.update({k: counts for k, counts in chosen.items() if k not in self._running})
        for index, counts in changes.items():
            job = view.active[index]
            if counts is None:
                del self._running[index]
                self._wait(job)
            elif index not in self._running:
                queue = self._waiting[job.planner]
                del queue[bisect_left(queue, (job.spec.submit_s, index))]
                self._running[index] = job
        self._settled_at = None if changes or any(self._waiting.values()) else view.capacity.copy()
        return changes

    def _wait(self, job: JobState) -> None:
        insort(self._waiting.setdefault(job.planner, []), (job.spec.submit_s, job.index))

    def exactly(self, view: View) -> dict[int, Counts]:
        """The optimum of Sia's program."""
        width = len(view.types)
        options = [
            [Option(tuple(n if i == kind else 0 for i in range(width)), w) for kind, n, w in found]
            for found in (self.configurations(job, view) for job in view.active.values())
        ]
        found = choose_exactly(options, tuple(view.capacity))
        return {index: option.counts for index, option in zip(view.active, found, strict=True) if option}

    def greedily(self, view: View) -> dict[int, Counts]:
        """The greedy choice."""
        width, left = len(view.types), list(view.capacity)
        offered: dict[int, list[tuple[int, int, float]]] = {}
        held: dict[int, tuple[int, int]] = {}
        heap: list[tuple[float, int, int, int, float]] = []
        places = dict.fromkeys(self._waiting, 0)

        def offer(index: int, before: int, worth: float, only: int | None) -> None:
            """File a job's best upgrade that fits; one entry per job is enough, as what is left only falls."""
            best, taken = 0.0, None
            for kind, n, after in offered[index]:
                if only is None or kind == only:
                    added = n - before
                    if 0 < added <= left[kind] and (after - worth) / added > best:
                        best, taken = (after - worth) / added, (kind, n, after)
            if taken is not None:
                heapq.heappush(heap, (-best, index, *taken))

        def enter(job: JobState) -> None:
            offered[job.index] = self.configurations(job, view)
            offer(job.index, 0, 0.0, None)

        def enter_next(planner: TypePlanner) -> None:
            queue, place = self._waiting[planner], places[planner]
            if place < len(queue):
                places[planner] += 1
                enter(view.active[queue[place][1]])

        for job in self._running.values():
            enter(job)
        for planner in self._waiting:
            enter_next(planner)
        while heap:
            _, index, kind, n, worth = heapq.heappop(heap)
            only, before = held.get(index, (None, 0))
            if n - before > left[kind]:
                now = next((w for k, m, w in offered[index] if (k, m) == (only, before)), 0.0)
                offer(index, before, now, only)
                continue
            held[index] = (kind, n)
            left[kind] -= n - before
            if not before and index not in self._running:
                enter_next(view.active[index].planner)
            offer(index, n, worth, kind)
        return {i: tuple(n if t == kind else 0 for t in range(width)) for i, (kind, n) in held.items()}

    def reclaim(self, view: View, excess: Mapping[int, int]) -> Changes:
        """Single devices where the loss is smallest; jobs left without one wait again."""
        changes = super().reclaim(view, excess)
        self._settled_at = None
        view.evicted.extend(view.active[index] for index, counts in changes.items() if counts is None)
        return changes
