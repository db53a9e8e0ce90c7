"""Policies that run a job on exactly P devices of its type, or not at all."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Mapping, Sequence

from lightning_easyscale.simulation.job import JobState
from lightning_easyscale.simulation.policy import Changes, GangPolicy, View


class SerialFifo(GangPolicy):
    """First in, first out, one job at a time: the baseline of the published simulation."""

    name = "fifo-serial"

    def decide(self, view: View) -> Changes:
        """Start the oldest job once nothing runs and its devices are there."""
        if any(j.counts for j in view.active.values()):
            return {}
        first = next(iter(view.active.values()))
        return {first.index: first.gang()} if view.free[first.home] >= first.spec.max_ests else {}


class Fifo(GangPolicy):
    """Gang FIFO: as many jobs as fit, in order of submission; the first that does not fit blocks the rest.

    Args:
        per_type: one queue per device type, so that a job waiting for one type does not block the others.
    """

    name = "fifo"

    def __init__(self, *, per_type: bool = False) -> None:
        """Empty queues."""
        self.per_type = per_type
        self._queues: dict[int, deque[JobState]] = {}

    def decide(self, view: View) -> Changes:
        """Start heads of queues while they fit."""
        for job in view.evicted:
            self._queues.setdefault(job.home if self.per_type else 0, deque()).appendleft(job)
        for job in view.arrived:
            self._queues.setdefault(job.home if self.per_type else 0, deque()).append(job)
        free = view.free.copy()
        changes: Changes = {}
        for queue in self._queues.values():
            while queue and queue[0].spec.max_ests <= free[queue[0].home]:
                job = queue.popleft()
                free[job.home] -= job.spec.max_ests
                changes[job.index] = job.gang()
        return changes

    def reclaim(self, view: View, excess: Mapping[int, int]) -> Changes:
        """Whole jobs, the youngest first; they go back to the head of their queue."""
        changes = super().reclaim(view, excess)
        view.evicted.extend(view.active[k] for k in sorted(changes, reverse=True))
        return changes


class FifoPerType(Fifo):
    """Gang FIFO with one queue per device type."""

    name = "fifo-per-type"

    def __init__(self) -> None:
        """One queue per type."""
        super().__init__(per_type=True)


class FifoBackfill(GangPolicy):
    """Gang FIFO in which any later job that fits may start (no reservations)."""

    name = "fifo-backfill"

    def __init__(self) -> None:
        """Empty queues: one per (type, size), since within these order decides."""
        self._queues: dict[tuple[int, int], deque[JobState]] = {}

    def decide(self, view: View) -> Changes:
        """Repeatedly the oldest job that fits."""
        for job in sorted(view.evicted, key=lambda j: -j.index):
            self._queues.setdefault((job.home, job.spec.max_ests), deque()).appendleft(job)
        for job in view.arrived:
            self._queues.setdefault((job.home, job.spec.max_ests), deque()).append(job)
        free = view.free.copy()
        changes: Changes = {}
        while True:
            heads = [q for (home, size), q in self._queues.items() if q and size <= free[home]]
            if not heads:
                return changes
            queue = min(heads, key=lambda q: (q[0].spec.submit_s, q[0].index))
            job = queue.popleft()
            free[job.home] -= job.spec.max_ests
            changes[job.index] = job.gang()

    def reclaim(self, view: View, excess: Mapping[int, int]) -> Changes:
        """Whole jobs, the youngest first; they queue again."""
        changes = super().reclaim(view, excess)
        view.evicted.extend(view.active[k] for k in changes)
        return changes


class YarnCapacity(GangPolicy):
    """YARN's capacity scheduler: queues with equal guarantees that may borrow what others leave idle; no preemption.

    The queue that uses the smallest share of its guarantee goes first; inside a queue, order of submission.
    """

    name = "yarn-capacity"

    def __init__(self) -> None:
        """No queue yet: tenants appear with their first job."""
        self._queues: dict[str, list[tuple[float, int]]] = {}

    def decide(self, view: View) -> Changes:
        """Start heads of the least served queues while any fits."""
        waiting = view.arrived + view.evicted
        for job in waiting:
            insort(self._queues.setdefault(job.spec.queue, []), (job.spec.submit_s, job.index))
        used = dict.fromkeys(self._queues, 0)
        for job in view.active.values():
            if job.counts:
                used[job.spec.queue] += sum(job.counts)
        free = view.free.copy()
        changes: Changes = {}
        while True:
            ready = [
                name
                for name, queue in self._queues.items()
                if queue and (job := view.active[queue[0][1]]).spec.max_ests <= free[job.home]
            ]
            if not ready:
                return changes
            name = min(ready, key=lambda n: (used[n], n))
            job = view.active[self._queues[name].pop(0)[1]]
            free[job.home] -= job.spec.max_ests
            used[name] += job.spec.max_ests
            changes[job.index] = job.gang()

    def reclaim(self, view: View, excess: Mapping[int, int]) -> Changes:
        """Whole jobs, the youngest first; they queue again."""
        changes = super().reclaim(view, excess)
        view.evicted.extend(view.active[k] for k in changes)
        return changes


def preemptive(order: Sequence[JobState], view: View) -> Changes:
    """Give devices to jobs in `order` as gangs, skipping what does not fit; everyone else gives theirs up."""
    left = view.capacity.copy()
    chosen = set()
    for job in order:
        if job.spec.max_ests <= left[job.home]:
            left[job.home] -= job.spec.max_ests
            chosen.add(job.index)
            if not any(left):
                break
    changes: Changes = {j.index: None for j in view.active.values() if j.counts and j.index not in chosen}
    changes.update({k: view.active[k].gang() for k in chosen if not view.active[k].counts})
    return changes


class Srtf(GangPolicy):
    """Shortest remaining time first, preemptive: knows how long every job still needs."""

    name = "srtf"

    def decide(self, view: View) -> Changes:
        """The jobs with the least time left, as gangs."""

        def left(job: JobState) -> tuple[float, int]:
            return job.remaining_at(view.now) * job.planner.seconds(job.gang()), job.index

        return preemptive(sorted(view.active.values(), key=left), view)


class Tiresias(GangPolicy):
    """Discretised two-dimensional least attained service (Gu et al., NSDI'19), two queues, no promotion.

    Args:
        threshold: attained device-seconds after which a job falls into the second queue.
    """

    name = "tiresias"
    review_s = 60.0

    def __init__(self, *, threshold: float = 57600.0) -> None:
        """Keep the threshold."""
        self.threshold = threshold

    def decide(self, view: View) -> Changes:
        """First queue before second, order of submission inside."""

        def rank(job: JobState) -> tuple[bool, float, int]:
            service = job.device_seconds + (view.now - job.updated_s) * sum(job.counts or ())
            return service >= self.threshold, job.spec.submit_s, job.index

        return preemptive(sorted(view.active.values(), key=rank), view)
