"""What a simulation leaves behind, and the numbers people compare.

Every figure and table is computed from the records alone, so a stored result can be summarised again without running.
"""

from __future__ import annotations

import csv
import io
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate

from lightning_easyscale.planning.by_type import Counts


@dataclass(frozen=True)
class JobRecord:
    """One finished job.

    Args:
        name: its name.
        workload: its workload.
        max_ests: P.
        submit_s: submission.
        start_s: first devices.
        finish_s: end.
        isolated_s: its time alone on P devices of the type it asked for.
        device_seconds: devices held, integrated over time.
        rescales: changes of devices after the start.
        preemptions: times it lost all devices.
        segments: (time, devices per type or None) at every change, the last one at the finish.
    """

    name: str
    workload: str
    max_ests: int
    submit_s: float
    start_s: float
    finish_s: float
    isolated_s: float
    device_seconds: float
    rescales: int
    preemptions: int
    segments: tuple[tuple[float, Counts | None], ...]

    @property
    def jct_s(self) -> float:
        """Job completion time: from submission to finish."""
        return self.finish_s - self.submit_s


def percentile(values: Sequence[float], share: float) -> float:
    """The `share` quantile (0..1) by linear interpolation."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass
class Result:
    """One policy on one trace.

    Args:
        policy: its name.
        types: device types of the cluster.
        capacity: devices per type.
        records: the jobs, in trace order.
        makespan_s: when the last job was done (compatibility mode: by the published reckoning).
        serving: (time, devices per type taken by serving) at every change.
        decisions: calls of the policy.
        wall_s: seconds the simulation took.
        notes: what a reader must know (assumptions, moved jobs, ...).
    """

    policy: str
    types: tuple[str, ...]
    capacity: Counts
    records: list[JobRecord]
    makespan_s: float
    serving: list[tuple[float, Counts]] = field(default_factory=list)
    decisions: int = 0
    wall_s: float = 0.0
    notes: list[str] = field(default_factory=list)

    def usage(self) -> tuple[list[float], list[Counts]]:
        """Times and devices per type that jobs hold from each on."""
        changes: dict[float, list[int]] = {}
        for record in self.records:
            before: Counts = (0,) * len(self.types)
            for time, counts in record.segments:
                now = counts or (0,) * len(self.types)
                delta = changes.setdefault(time, [0] * len(self.types))
                for i, (a, b) in enumerate(zip(now, before, strict=True)):
                    delta[i] += a - b
                before = now
        times = sorted(changes)
        running, levels = [0] * len(self.types), []
        for time in times:
            running = [a + b for a, b in zip(running, changes[time], strict=True)]
            levels.append(tuple(running))
        return times, levels

    def _training_share(self, end: float) -> float:
        times, levels = self.usage()
        area = sum(
            sum(counts) * (min(after, end) - time)
            for time, after, counts in zip(times, [*times[1:], end], levels, strict=True)
            if time < end
        )
        return area / (sum(self.capacity) * end) if end else 0.0

    def _serving_share(self, end: float) -> float:
        points = [*self.serving, (end, self.capacity)]
        area = sum(
            sum(counts) * (min(after, end) - time)
            for (time, counts), (after, _) in zip(points, points[1:], strict=False)
            if time < end
        )
        return area / (sum(self.capacity) * end) if end else 0.0

    def rho(self) -> list[float]:
        """Finish-time fairness of each job: JCT over its time on a fair share of the cluster.

        A job's fair share shrinks with demand: its isolated time is stretched by the mean of (devices asked for by all
        active jobs) / (devices there are) over its life, at least 1. Above 1 it did worse than its share.
        """
        changes: dict[float, int] = {}
        for r in self.records:
            changes[r.submit_s] = changes.get(r.submit_s, 0) + r.max_ests
            changes[r.finish_s] = changes.get(r.finish_s, 0) - r.max_ests
        times = sorted(changes)
        demand = list(accumulate(changes[t] for t in times))
        area = [0.0, *accumulate(d * (b - a) for d, a, b in zip(demand, times, times[1:], strict=False))]
        where = {t: i for i, t in enumerate(times)}
        total = sum(self.capacity)
        shares = []
        for r in self.records:
            crowd = (area[where[r.finish_s]] - area[where[r.submit_s]]) / (r.jct_s * total) if r.jct_s else 1.0
            shares.append(r.jct_s / (r.isolated_s * max(1.0, crowd)))
        return shares

    def summary(self) -> dict[str, float | int | str]:
        """The numbers of the summary table; times in seconds, shares in 0..1."""
        jcts = [r.jct_s for r in self.records]
        queueing = [r.start_s - r.submit_s for r in self.records]
        rho = self.rho()
        used = sum(r.device_seconds for r in self.records)
        serving = self._serving_share(self.makespan_s)
        training = used / (sum(self.capacity) * self.makespan_s)
        last = max(r.submit_s for r in self.records)
        return {
            "policy": self.policy,
            "jobs": len(jcts),
            "avg_jct_s": sum(jcts) / len(jcts),
            "median_jct_s": percentile(jcts, 0.5),
            "p95_jct_s": percentile(jcts, 0.95),
            "makespan_s": self.makespan_s,
            "avg_queueing_s": sum(queueing) / len(queueing),
            "utilisation": training,
            "serving_share": serving,
            "total_utilisation": training + serving,
            "total_utilisation_until_last_submission": self._training_share(last) + self._serving_share(last),
            "avg_rho": sum(rho) / len(rho),
            "median_rho": percentile(rho, 0.5),
            "max_rho": max(rho),
            "rescales": sum(r.rescales for r in self.records),
            "preemptions": sum(r.preemptions for r in self.records),
            "decisions": self.decisions,
            "wall_s": self.wall_s,
        }

    def used_at(self, times: Sequence[float]) -> list[Counts]:
        """Devices per type held at each of `times`."""
        points, levels = self.usage()
        nothing: Counts = (0,) * len(self.types)
        found = [bisect_right(points, t) - 1 for t in times]
        return [levels[i] if i >= 0 else nothing for i in found]

    def to_json(self) -> str:
        """Everything, as text."""
        body = {
            "format": "easyscale-simulation/1",
            "policy": self.policy,
            "types": self.types,
            "capacity": self.capacity,
            "summary": self.summary(),
            "notes": self.notes,
            "serving": self.serving,
            "jobs": [asdict(r) for r in self.records],
        }
        return json.dumps(body)

    def to_csv(self) -> str:
        """One row per job; `devices` is a list of `seconds:count/count/...`."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        head = "name workload max_ests submit_s start_s finish_s jct_s device_seconds rescales preemptions devices"
        writer.writerow(head.split())
        for r in self.records:
            devices = " ".join(f"{t:.3f}:{'/'.join(map(str, c)) if c else '-'}" for t, c in r.segments)
            times = (f"{t:.3f}" for t in (r.submit_s, r.start_s, r.finish_s, r.jct_s, r.device_seconds))
            writer.writerow([r.name, r.workload, r.max_ests, *times, r.rescales, r.preemptions, devices])
        return out.getvalue()
