"""The interface between the engine and a scheduling policy.

At every decision the engine shows a `View` and takes back the changes the policy wants, job by job: devices per type,
or None to take all devices away. What is not named stays. The engine refuses changes that over-commit the cluster,
exceed a job's ESTs, or mix types for a job without D2; a policy needs to know nothing of costs, nodes or events.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_easyscale.planning.by_type import Counts
from lightning_easyscale.simulation.job import JobState

Changes = dict[int, "Counts | None"]


@dataclass
class Costs:
    """Seconds during which a job holds devices but makes no progress.

    The defaults are the median pause of five relaunches that ``python -m recipes.rescale`` measured on two cores
    (``recipes/results/rescale_cpu.json``: 13 s to 20 s; a start differs by the 0.2 s of a save). The published
    simulation assumes 20 s; a rescale in place paused 2.1 s in the same run.

    Args:
        start_s: first start.
        rescale_s: change of devices while running.
        resume_s: start after all devices were taken away.

    Raises:
        ValueError: if a cost is negative.
    """

    start_s: float = 16.2
    rescale_s: float = 16.2
    resume_s: float = 16.2

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("start_s", "rescale_s", "resume_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}={getattr(self, name)}` is no cost. HINT: zero seconds or more.")


@dataclass
class View:
    """What a policy may look at; it changes nothing in it.

    Args:
        now: simulated seconds.
        types: device types.
        total: devices per type in the whole cluster.
        capacity: devices per type that training may use now (failures and serving taken off).
        free: of these, not held by a job.
        active: submitted and unfinished jobs by index, in order of submission.
        costs: what changes cost.
        interval_s: scheduling interval; 0: a decision at every event.
        arrived: jobs that came since the last decision.
        gone: jobs that finished since.
        evicted: jobs that lost all devices to a failure since.
    """

    now: float
    types: tuple[str, ...]
    total: Counts
    capacity: list[int]
    free: list[int]
    active: dict[int, JobState]
    costs: Costs
    interval_s: float = 0.0
    arrived: list[JobState] = field(default_factory=list)
    gone: list[JobState] = field(default_factory=list)
    evicted: list[JobState] = field(default_factory=list)


class Policy:
    """Base class: a name, a decision, and how devices are given up when serving needs them."""

    name = "policy"
    review_s = 0.0
    """Decisions are also taken this often while jobs are active; 0: only where something happened."""

    def check(self, jobs: Sequence[JobState], capacity: Sequence[int], types: Sequence[str]) -> None:
        """Refuse a trace with a job that could never run.

        Raises:
            ValueError: naming the job.
        """
        for job in jobs:
            if not any(capacity[i] for i in job.types):
                raise ValueError(
                    f"job `{job.spec.name}` can never run: the cluster has no {types[job.home]} device."
                    " HINT: change `preferred`, allow D2, or add devices."
                )

    def decide(self, view: View) -> Changes:
        """The changes wanted now."""
        raise NotImplementedError

    def reclaim(self, view: View, excess: Mapping[int, int]) -> Changes:
        """Free at least `excess` devices of each type: by default whole jobs, the youngest first."""
        left = dict(excess)
        changes: Changes = {}
        for job in sorted(view.active.values(), key=lambda j: (-(j.started_s or 0.0), -j.index)):
            if job.counts and any(left.get(i, 0) > 0 and n for i, n in enumerate(job.counts)):
                changes[job.index] = None
                for i, n in enumerate(job.counts):
                    left[i] = left.get(i, 0) - n
            if all(n <= 0 for n in left.values()):
                break
        return changes


class GangPolicy(Policy):
    """Base of the policies that run a job on P devices of its type, one EST each, or not at all."""

    def check(self, jobs: Sequence[JobState], capacity: Sequence[int], types: Sequence[str]) -> None:
        """Refuse jobs that ask for more devices of their type than there are."""
        super().check(jobs, capacity, types)
        for job in jobs:
            if job.spec.max_ests > capacity[job.home]:
                raise ValueError(
                    f"job `{job.spec.name}` asks for {job.spec.max_ests} of {capacity[job.home]} {types[job.home]}"
                    f" devices and can never run under `{self.name}`. HINT: correct the trace, or set"
                    " `oversize=move` to let such jobs ask for the fastest type that has enough devices."
                )


class ElasticPolicy(Policy):
    """Base of the policies that change a running job's devices: it gives up single devices before whole jobs."""

    def reclaim(self, view: View, excess: Mapping[int, int]) -> Changes:
        """Take devices where the loss of speed is smallest, one at a time; a job's last device goes last."""
        changes: Changes = {}
        for i, wanted in excess.items():
            holders = {j.index: list(changes.get(j.index) or j.counts) for j in view.active.values() if j.counts}
            holders = {k: c for k, c in holders.items() if c[i] and changes.get(k, ()) is not None}
            for _ in range(wanted):

                def loss(k: int, held: Mapping[int, list[int]] = holders, i: int = i) -> tuple[bool, float, int]:
                    job, counts = view.active[k], held[k]
                    less = tuple(n - (g == i) for g, n in enumerate(counts))
                    last = sum(less) == 0
                    ratio = 1.0 if last else 1.0 - job.planner.speed(less) / job.planner.speed(tuple(counts))
                    return last, ratio, -k

                k = min(holders, key=loss)
                holders[k][i] -= 1
                changes[k] = tuple(holders[k]) if sum(holders[k]) else None
                if not holders[k][i]:
                    del holders[k]
        return changes
