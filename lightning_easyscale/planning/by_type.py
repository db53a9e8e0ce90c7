"""The planner for schedulers: counts per device type in, step time out, answered from a cache.

A scheduler asks the same question thousands of times: how fast would this job be with (8, 2, 0) devices of three types?
Devices of one type are interchangeable, so the threshold test is ``sum n_i u_i(f) >= P`` over types. Jobs that agree in
P and step times share one `TypePlanner`, and with it the cache.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from lightning_easyscale.planning.step_time import NANOSECONDS, StepTime, to_ns

Counts = tuple[int, ...]


def useful_counts(num_ests: int) -> list[int]:
    """Device counts of one type that are worth holding, ascending.

    These are the values of ``ceil(P / k)``, at most ``2 sqrt(P)`` of them. Any other count runs at the speed of the
    next smaller useful one.
    """
    counts, n = [], 1
    while n < num_ests:
        counts.append(n)
        per_device = -(-num_ests // n)
        n = -(-num_ests // (per_device - 1))
    return [*counts, num_ests]


class TypePlanner:
    """Exact step times of a job with P ESTs over counts per device type.

    Args:
        num_ests: P, at least 1.
        models: the step-time function of each type, in the cluster's order; None: the job cannot use that type.
        measured: measured seconds per global step by counts per type, exchange included; they replace the models'.

    Raises:
        ValueError: if P is not positive or no type can be used.
    """

    def __init__(
        self,
        num_ests: int,
        models: Sequence[StepTime | None],
        measured: Mapping[Counts, float] | None = None,
    ) -> None:
        """List every step time that can occur and what fits within it."""
        if num_ests < 1:
            raise ValueError(f"`num_ests={num_ests}` leaves nothing to run. HINT: a job has at least one EST.")
        if not any(models):
            raise ValueError("`models` has no usable type. HINT: give at least one device type's step time.")
        self.num_ests = num_ests
        self.models = tuple(models)
        times = {m.time_ns(a) for m in models if m for a in range(1, 1 + min(num_ests, m.max_ests or num_ests))}
        self._limits = sorted(times)
        self._room = [tuple(self._fit(m, limit) for m in models) for limit in self._limits]
        self._steps: dict[Counts, int | None] = {}
        self.measured_ns = {counts: to_ns(seconds) for counts, seconds in (measured or {}).items()}

    def _fit(self, model: StepTime | None, limit: int) -> int:
        fit = model.capacity(limit) if model else 0
        return self.num_ests if fit is None else min(fit, self.num_ests)

    def step_ns(self, counts: Counts) -> int | None:
        """The step time in nanoseconds with `counts` devices per type; None where the ESTs do not fit."""
        measured = self.measured_ns.get(counts)
        return self.limit_ns(counts) if measured is None else measured

    def limit_ns(self, counts: Counts) -> int | None:
        """The optimal step time by the models alone."""
        if counts not in self._steps:
            held = [(i, n) for i, n in enumerate(counts) if n]
            index = bisect_left(
                self._room, self.num_ests, key=lambda room: sum(n * room[i] for i, n in held)
            )  # sums grow with the limit
            self._steps[counts] = self._limits[index] if index < len(self._limits) else None
        return self._steps[counts]

    def seconds(self, counts: Counts) -> float:
        """The optimal step time in seconds; infinite where the ESTs do not fit."""
        step = self.step_ns(counts)
        return float("inf") if step is None else step / NANOSECONDS

    def speed(self, counts: Counts) -> float:
        """Global steps per second; 0 where the ESTs do not fit."""
        step = self.step_ns(counts)
        return 0.0 if step is None else NANOSECONDS / step

    def power(self, counts: Counts) -> float:
        """EST mini-batches per second that the devices could do if nothing were wasted (one EST at a time on each)."""
        return sum(n * NANOSECONDS / m.time_ns(1) for n, m in zip(counts, self.models, strict=True) if n and m)

    def waste(self, counts: Counts) -> float:
        """Share of the devices' power that brings no progress, in 0..1; the paper's measure with exactly P ESTs."""
        power = self.power(counts)
        return 1.0 - self.num_ests * self.speed(counts) / power if power else 1.0

    def room(self, counts: Counts) -> Counts:
        """ESTs one device of each type may host at the optimal step time (0 for types not held)."""
        step = self.limit_ns(counts)
        if step is None:
            return (0,) * len(counts)
        room = self._room[bisect_left(self._limits, step)]
        return tuple(u if n else 0 for u, n in zip(room, counts, strict=True))

    def trimmed(self, counts: Counts) -> Counts:
        """`counts` without devices that are not needed for its step time, the slowest types first."""
        left, room = list(counts), self.room(counts)
        spare = sum(n * u for n, u in zip(left, room, strict=True)) - self.num_ests
        for i in sorted(range(len(left)), key=lambda i: (room[i], -i)):
            drop = min(left[i], spare // room[i]) if room[i] else left[i]
            left[i] -= drop
            spare -= drop * room[i]
        return tuple(left)
