"""A job as the simulator sees it: what was submitted, and how far it is.

Work is counted in global steps, a step being one mini-batch of every EST: it does not depend on the devices, so
progress is simply time divided by step time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_easyscale.planning.by_type import Counts, TypePlanner
from lightning_easyscale.planning.profile import Profile
from lightning_easyscale.planning.step_time import AffineStepTime, to_ns


@dataclass(frozen=True)
class JobSpec:
    """One submitted job.

    Args:
        name: unique in a trace.
        submit_s: submission, seconds since the trace's start, zero or more.
        workload: name in the profile.
        max_ests: P, the paper's maxP.
        steps: global steps to do, positive.
        batch_size: samples per mini-batch of one EST.
        d2: the job runs hardware-agnostic kernels and may mix device types; else it stays on one type.
        preferred: the type it asks for.
        queue: tenant or virtual cluster.

    Raises:
        ValueError: if a number is out of range.
    """

    name: str
    submit_s: float
    workload: str
    max_ests: int
    steps: float
    batch_size: int
    d2: bool
    preferred: str
    queue: str = "default"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.submit_s < float("inf"):
            raise ValueError(f"`submit_s={self.submit_s}` of job `{self.name}` is no time. HINT: zero seconds or more.")
        if self.max_ests < 1:
            raise ValueError(f"`max_ests={self.max_ests}` of job `{self.name}` is no job size. HINT: at least one EST.")
        if not 0 < self.steps < float("inf"):
            raise ValueError(f"`steps={self.steps}` of job `{self.name}` is no work. HINT: more than zero.")
        if self.batch_size < 1:
            raise ValueError(f"`batch_size={self.batch_size}` of job `{self.name}`. HINT: at least one sample.")


@dataclass(slots=True, eq=False)
class JobState:
    """A job inside a simulation; changed by the engine only, read by policies.

    Args:
        index: position in the trace; policies name jobs by it.
        spec: what was submitted.
        planner: exact step times over counts per type.
        home: index of the type it asks for.
        types: indices of the types it may run on (all for D2, one at a time otherwise).
        remaining: steps left at time `updated_s`.
        counts: devices per type it holds; None while it waits.
        step_s: seconds per step with these devices, node placement included.
        updated_s: when `remaining` was right.
        resume_s: progress stands still until then (start, rescale, restore).
        nodes: nodes it spans.
    """

    index: int
    spec: JobSpec
    planner: TypePlanner
    home: int
    types: tuple[int, ...]
    remaining: float
    counts: Counts | None = None
    step_s: float = float("inf")
    updated_s: float = 0.0
    resume_s: float = 0.0
    nodes: int = 0
    started_s: float | None = None
    finished_s: float | None = None
    device_seconds: float = 0.0
    busy_s: float = 0.0
    rescales: int = 0
    preemptions: int = 0
    version: int = 0
    lost_steps: float = 0.0
    segments: list[tuple[float, Counts | None]] = field(default_factory=list)

    def advance(self, now: float) -> None:
        """Bring `remaining` and the accounts up to `now`."""
        if self.counts is not None:
            span = now - self.updated_s
            self.device_seconds += span * sum(self.counts)
            self.busy_s += span
            begin = self.updated_s if self.updated_s > self.resume_s else self.resume_s
            if now > begin:
                left = self.remaining - (now - begin) / self.step_s
                self.remaining = left if left > 0 else 0.0
        self.updated_s = now

    def remaining_at(self, now: float) -> float:
        """Steps left at `now`, without changing the state."""
        if self.counts is None:
            return self.remaining
        begin = self.updated_s if self.updated_s > self.resume_s else self.resume_s
        if now <= begin:
            return self.remaining
        left = self.remaining - (now - begin) / self.step_s
        return left if left > 0 else 0.0

    def finish_time(self) -> float:
        """When it finishes if nothing changes."""
        begin = self.updated_s if self.updated_s > self.resume_s else self.resume_s
        return begin + self.remaining * self.step_s

    def gang(self) -> Counts:
        """One device of its home type per EST: what a non-elastic job asks for."""
        return tuple(self.spec.max_ests if i == self.home else 0 for i in range(len(self.planner.models)))


def build_jobs(
    specs: Sequence[JobSpec],
    types: Sequence[str],
    profile: Profile,
    *,
    capacity: Counts | None = None,
    oversize: str = "error",
) -> list[JobState]:
    """States for a trace on a cluster with `types`, in trace order; jobs of the same class share a planner.

    Args:
        specs: the trace.
        types: the cluster's device types.
        profile: step times; D2 jobs use the D2 kernels, others the D1 kernels.
        capacity: devices per type; needed for ``oversize="move"``.
        oversize: what to do with a job that asks for more devices of its type than there are: ``"error"`` leaves it to
            the policy's check (gangs refuse it), ``"move"`` lets it ask for the fastest type that has enough.

    Raises:
        ValueError: if two jobs share a name, a job prefers a type that the cluster does not have, or a job is larger
            than every type.
        KeyError: if the profile lacks a workload.
    """
    if oversize not in ("error", "move"):
        raise ValueError(f"`oversize={oversize!r}` is unknown. HINT: `error` or `move`.")
    planners: dict[tuple, TypePlanner] = {}
    seen: dict[str, int] = {}
    states = []
    for index, spec in enumerate(specs):
        if spec.name in seen:
            raise ValueError(
                f"job name `{spec.name}` is used twice (jobs {seen[spec.name] + 1} and {index + 1} of the trace)."
                " HINT: rename one, or read the trace with `duplicates=rename`."
            )
        seen[spec.name] = index
        if spec.preferred not in types:
            raise ValueError(
                f"`preferred={spec.preferred!r}` of job `{spec.name}` is not in the cluster (types {list(types)})."
                " HINT: add the type to the cluster or map the name."
            )
        home = list(types).index(spec.preferred)
        key = (spec.workload, spec.batch_size, spec.max_ests, spec.d2)
        if key not in planners:
            kernels = "D2" if spec.d2 else "D1"
            planners[key] = TypePlanner(
                spec.max_ests,
                [
                    AffineStepTime(
                        to_ns(profile.seconds(spec.workload, name, kernels, spec.batch_size)),
                        to_ns(profile.switch_seconds),
                        to_ns(profile.fixed_seconds(spec.workload, name, kernels, spec.batch_size)),
                    )
                    for name in types
                ],
                profile.measured_steps(spec.workload, kernels, spec.batch_size, spec.max_ests, types),
            )
        planner = planners[key]
        if oversize == "move" and capacity is not None and spec.max_ests > capacity[home]:
            large = [i for i, n in enumerate(capacity) if n >= spec.max_ests]
            if not large:
                raise ValueError(
                    f"job `{spec.name}` asks for {spec.max_ests} devices and no type has as many ({list(capacity)})."
                    " HINT: enlarge the cluster or reduce the job."
                )
            home = min(large, key=lambda i: (m.time_ns(1) if (m := planner.models[i]) else 0, i))
        usable = tuple(range(len(types))) if spec.d2 else (home,)
        state = JobState(index, spec, planner, home, usable, spec.steps)
        states.append(state)
    return states
