"""After Sia (Jayaram Subramanya et al., SOSP'23): each round choose one configuration per job, all jobs at once.

A configuration is a power of two of devices of one type; a job starts with one device and at most doubles per round. A
configuration is worth ``1.1 - (r g)^(-1/2)``, g being the throughput over one device of its slowest type and r a
discount for restarting. Sia solves an integer program; with few types the same optimum comes from the exact dynamic
program, and where its state space is too large from the greedy choice.
"""

from __future__ import annotations

from lightning_easyscale.planning.interjob import Option, choose_exactly, choose_greedily
from lightning_easyscale.simulation.job import JobState
from lightning_easyscale.simulation.policy import Changes, ElasticPolicy, View

_EXACT_WORK = 3e7


class SiaLike(ElasticPolicy):
    """Sia at a fixed batch size, one type per job at a time (jobs may change type)."""

    name = "sia-like"
    review_s = 60.0

    def _options(self, job: JobState, view: View) -> list[Option]:
        width = len(view.types)
        now = sum(job.counts or ())
        limit = min(job.spec.max_ests, 2 * now if now else 1)
        times = [m.time_ns(1) for m in job.planner.models if m]
        alone = 1e9 / (max(times) * job.spec.max_ests)
        age = max(view.now - job.spec.submit_s, 1.0)
        discount = age / (age + view.costs.rescale_s)
        options = []
        for kind in range(width):
            n = 1
            while n <= min(limit, view.capacity[kind]):
                counts = tuple(n if i == kind else 0 for i in range(width))
                restart = 1.0 if counts == job.counts else discount
                goodput = restart * job.planner.speed(counts) / alone
                options.append(Option(counts, max(0.0, 1.1 - goodput**-0.5) if goodput else 0.0))
                n *= 2
        return options

    def decide(self, view: View) -> Changes:
        """The best configurations together."""
        jobs = list(view.active.values())
        options = [self._options(job, view) for job in jobs]
        states = 1
        for n in view.capacity:
            states *= n + 1
        exact = states * sum(map(len, options)) <= _EXACT_WORK
        chosen = (choose_exactly if exact else choose_greedily)(options, tuple(view.capacity))
        changes: Changes = {}
        for job, option in zip(jobs, chosen, strict=True):
            counts = option.counts if option else None
            if counts != job.counts:
                changes[job.index] = counts
        return changes
