"""Elastic policies that hand out devices one increment at a time by marginal gain, each job on its own type.

They share one skeleton: every job first gets one device (in order of submission), then the increment with the largest
gain per device is taken until nothing is left to gain. They differ in what a gain is. A running job whose growth would
not save more time than a rescale costs keeps what it has.
"""

from __future__ import annotations

import heapq

from lightning_easyscale.planning.allocation import worth_moving
from lightning_easyscale.planning.by_type import useful_counts
from lightning_easyscale.simulation.job import JobState
from lightning_easyscale.simulation.policy import Changes, ElasticPolicy, View


class GreedyElastic(ElasticPolicy):
    """The skeleton; subclasses say what a job with step time `now` gains by step time `after`."""

    def gain(self, job: JobState, view: View, alone: float, now: float, after: float) -> float:
        """Worth of an increment.

        Args:
            job: the job.
            view: the cluster.
            alone: seconds per step on one device.
            now: seconds per step with what it has so far.
            after: seconds per step with the increment.
        """
        raise NotImplementedError

    def decide(self, view: View) -> Changes:
        """Share every type among the jobs that ask for it."""
        changes: Changes = {}
        for kind in range(len(view.types)):
            jobs = [j for j in view.active.values() if j.home == kind]
            if jobs:
                self._share(jobs, kind, view, changes)
        return changes

    def _share(self, jobs: list[JobState], kind: int, view: View, changes: Changes) -> None:
        left = view.capacity[kind]
        width = len(view.types)

        def counts(n: int) -> tuple[int, ...]:
            return tuple(n if i == kind else 0 for i in range(width))

        granted = {j.index: 1 for j in jobs[:left]}
        left -= len(granted)
        heap: list[tuple[float, int, int, int]] = []

        def offer(job: JobState) -> None:
            held = granted[job.index]
            now, alone = job.planner.seconds(counts(held)), job.planner.seconds(counts(1))
            for n in useful_counts(job.spec.max_ests):
                if n > held:
                    worth = self.gain(job, view, alone, now, job.planner.seconds(counts(n))) / (n - held)
                    heapq.heappush(heap, (-worth, job.index, held, n))
                    return

        for job in jobs[: len(granted)]:
            offer(job)
        while heap and left:
            worth, index, held, n = heapq.heappop(heap)
            if worth >= 0 or n - held > left:
                continue
            granted[index] = n
            left -= n - held
            offer(view.active[index])
        for job in jobs:
            n = granted.get(job.index, 0)
            old = job.counts[kind] if job.counts else 0
            if old and n > old:
                now, after = job.planner.seconds(counts(old)), job.planner.seconds(counts(n))
                if not worth_moving(now, after, job.remaining_at(view.now), view.costs.rescale_s):
                    continue
            if n != old:
                changes[job.index] = counts(n) if n else None


class Optimus(GreedyElastic):
    """Optimus (Peng et al., EuroSys'18): the increment that shortens a job's remaining time most."""

    name = "optimus"

    def gain(self, job: JobState, view: View, alone: float, now: float, after: float) -> float:
        """Seconds of remaining time saved."""
        return (now - after) * job.remaining_at(view.now)


class PolluxLike(GreedyElastic):
    """After Pollux and AdaptDL (Qiao et al., OSDI'21) at a fixed batch size: a power mean (p = -1) of speed-ups.

    Pollux also adapts batch size and learning rate; here a job's samples and batch are fixed, so goodput is throughput.
    """

    name = "pollux-like"

    def gain(self, job: JobState, view: View, alone: float, now: float, after: float) -> float:
        """Growth of minus one over the speed-up."""
        return (now - after) / alone
