"""The published trace simulation, slips included, so that its figures can be checked.

This mode exists for comparison with EasyScale's Figs. 14 and 15 only; nothing else builds on it. It differs from the
honest simulator in these points, each of them a property of the published results:

- time runs in ticks of `interval`; a job's devices come free at the tick after it finishes;
- `fifo-serial` runs one job at a time on P devices of its preferred type, whatever else is free;
- a job pays the rescale cost once, however often its devices change;
- a placement keeps the ESTs per type of the proposal it came from, so the step time counts types the job does not hold;
- one type alone counts as free of waste, and its speed-up as the number of devices;
- of several candidates for a placement the slowest is kept; among equally slow ones the order decides in which the
  candidates left a CPython set of integer tuples (stable since Python 3.8; other orders of the same ties move
  EasyScale-heter's average JCT between 780 and 1000 s);
- a placement that grew by a type keeps the devices of the other types even where the proposal had fewer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from lightning_easyscale.planning.by_type import Counts
from lightning_easyscale.planning.heuristic import HeuristicProposal, candidates, fillings
from lightning_easyscale.planning.profile import Profile
from lightning_easyscale.planning.proposals import MAX_GROWTH, MAX_WASTE
from lightning_easyscale.simulation.job import JobSpec
from lightning_easyscale.simulation.result import JobRecord, Result

POLICIES = ("fifo-serial", "easyscale-homo", "easyscale-heter")
PUBLISHED_RESCALE_S = 20.0
"""What a rescale costs in the published simulation."""


@dataclass(eq=False)
class _Job:
    spec: JobSpec
    est_seconds: tuple[float, ...]
    proposals: list[HeuristicProposal]
    home: int
    remaining: float
    cost_left: float
    held: HeuristicProposal | None = None
    finish_s: float | None = None
    segments: list[tuple[float, Counts | None]] | None = None
    rescales: int = -1

    def step_seconds(self) -> float:
        return max(t * a for t, a in zip(self.est_seconds, self.held.ests, strict=True)) if self.held else float("inf")


def _added(values: Iterable[float]) -> float:
    """Plain left-to-right addition: `sum` compensates since Python 3.12, and here the last bit breaks ties."""
    total = 0.0
    for value in values:
        total += value
    return total


def _measured(num_ests: int, power: Sequence[float], m: int, ests: Counts, counts: Counts) -> HeuristicProposal:
    """Waste and speed-up with the published order of operations."""
    held = [i for i, n in enumerate(counts) if n]
    if len(held) == 1:
        ests = tuple(-(-num_ests // n) if n else 0 for n in counts)
        return HeuristicProposal(counts, ests, 0.0, _added(c * n for c, n in zip(power, counts, strict=True)))
    scale = max(ests[i] / (power[i] * m) for i in held)
    devices = [i for i in sorted(held, key=lambda i: -ests[i]) for _ in range(counts[i])]
    waste = _added(power[i] * m - ests[i] / scale for i in devices)
    waste += (sum(ests[i] for i in devices) - num_ests) / scale
    waste /= _added(power[i] * m for i in devices)
    speedup = _added(c * n for c, n in zip(power, counts, strict=True)) * (1.0 - waste)
    return HeuristicProposal(counts, ests, waste, speedup)


def published_proposals(num_ests: int, est_seconds: Sequence[float], limits: Counts) -> list[HeuristicProposal]:
    """One proposal per placement, best first, as the published simulation had them."""
    power = [est_seconds[-1] / t for t in est_seconds]
    unordered = list(set(candidates(num_ests, power)))
    found = [
        _measured(num_ests, power, m, ests, counts)
        for ests, m in sorted(unordered, key=lambda candidate: candidate[0][0])
        for counts in sorted(fillings(num_ests, ests, limits), key=sum)
    ]
    found.sort(key=lambda p: p.waste)
    found.sort(key=lambda p: (-p.speedup, -p.counts[0]))
    kept: dict[Counts, HeuristicProposal] = {}
    for p in found:
        # A later (slower) candidate replaces an earlier one whenever its speed-up exceeds the earlier one's waste.
        if p.counts not in kept or p.speedup > kept[p.counts].waste:
            kept[p.counts] = p
    return list(kept.values())


def _offers(job: _Job) -> list[tuple[float, int, int, HeuristicProposal]]:
    """The best increment of each type: (gain, type, added, placement after)."""
    now = job.held
    assert now is not None
    best: dict[int, tuple[float, int, int, HeuristicProposal]] = {}
    size = sum(now.counts)
    for p in sorted(job.proposals, key=lambda p: -p.speedup):
        if p.speedup < now.speedup or p.waste > MAX_WASTE or sum(p.counts) > MAX_GROWTH * size:
            continue
        grown = [i for i, (a, b) in enumerate(zip(p.counts, now.counts, strict=True)) if a > b]
        if len(grown) != 1:
            continue
        i = grown[0]
        added = p.counts[i] - now.counts[i]
        if size + added > MAX_GROWTH * size:
            continue
        gain = (p.speedup / now.speedup - 1.0) / added + 1.0
        if i not in best or gain > best[i][0]:
            counts = tuple(n + added if j == i else n for j, n in enumerate(now.counts))
            best[i] = (gain, i, added, replace(p, counts=counts))
    return [best[i] for i in sorted(best)]


def _fits(need: Counts, free: Sequence[int]) -> bool:
    return all(a <= b for a, b in zip(need, free, strict=True))


def _serial(active: list[_Job], capacity: Counts) -> None:
    first = active[0]
    if first.held is None:
        first.held = next(p for p in first.proposals if p.counts[first.home] == first.spec.max_ests)


def _grow(active: list[_Job], capacity: Counts) -> None:
    free = list(capacity)
    offers: list[tuple[float, int, int, HeuristicProposal, _Job]] = []
    for job in active:
        if job.held is not None:
            free = [a - b for a, b in zip(free, job.held.counts, strict=True)]
            offers += [(*offer, job) for offer in _offers(job)]
    for job in active:
        if job.held is None and _fits(job.proposals[-1].counts, free):
            job.held = job.proposals[-1]
            free = [a - b for a, b in zip(free, job.held.counts, strict=True)]
    served: set[str] = set()
    for _, i, added, after, job in sorted(offers, key=lambda o: -o[0]):
        if added <= free[i] and job.spec.name not in served:
            served.add(job.spec.name)
            job.held = after
            free[i] -= added


def simulate_published(
    specs: Sequence[JobSpec],
    types: Sequence[str],
    capacity: Counts,
    profile: Profile,
    *,
    policy: str,
    interval_s: float = 60.0,
    rescale_s: float = PUBLISHED_RESCALE_S,
    on_progress: Callable[[int], None] | None = None,
) -> Result:
    """Run the published simulation.

    Args:
        specs: the trace, file order, names unique (read it with ``duplicates="last"``).
        types: device types; the last one is the reference.
        capacity: devices per type.
        profile: step times; all jobs use the D2 kernels.
        policy: one of `POLICIES`.
        interval_s: tick.
        rescale_s: cost, once per job.
        on_progress: called with the number of finished jobs.

    Raises:
        ValueError: if the policy is unknown, the trace is empty, or a job can never run.
    """
    if policy not in POLICIES:
        raise ValueError(
            f"`policy={policy!r}` has no published form. HINT: one of {', '.join(POLICIES)}, or `compat=false`."
        )
    if not specs:
        raise ValueError("the trace is empty. HINT: give at least one job.")
    begun = time.perf_counter()
    decide = _serial if policy == "fifo-serial" else _grow
    cache: dict[tuple, list[HeuristicProposal]] = {}
    jobs = []
    for spec in specs:
        times = tuple(profile.seconds(spec.workload, t, "D2", spec.batch_size) for t in types)
        home = list(types).index(spec.preferred)
        key = (times, spec.max_ests)
        if key not in cache:
            cache[key] = published_proposals(spec.max_ests, times, capacity)
        proposals = cache[key]
        if policy != "easyscale-heter" or not spec.d2:
            proposals = [p for p in proposals if sum(p.counts) == p.counts[home]]
        if policy == "fifo-serial" and spec.max_ests > capacity[home]:
            raise ValueError(
                f"job `{spec.name}` asks for {spec.max_ests} of {capacity[home]} {spec.preferred} devices and can never"
                " run. HINT: correct its row; the published file hides this one behind a duplicate name."
            )
        jobs.append(_Job(spec, times, proposals, home, spec.steps, rescale_s, segments=[]))
    now = 0.0
    decisions = 0
    done = 0
    while done < len(jobs):
        for job in jobs:
            if job.held is None or job.finish_s is not None:
                continue
            delay = min(job.cost_left, interval_s)
            job.cost_left -= delay
            needed = job.remaining * job.step_seconds()
            if needed <= interval_s - delay:
                job.finish_s = now + delay + needed
                assert job.segments is not None
                job.segments.append((job.finish_s, None))
                job.held = None
                done += 1
                if on_progress:
                    on_progress(done)
            else:
                job.remaining -= (interval_s - delay) / job.step_seconds()
        now += interval_s
        active = [j for j in jobs if j.finish_s is None and j.spec.submit_s <= now]
        before = [j.held for j in active]
        if active:
            decide(active, capacity)
            decisions += 1
        for job, old in zip(active, before, strict=True):
            if job.held is not old:
                assert job.segments is not None
                assert job.held is not None
                job.rescales += 1
                job.segments.append((now, job.held.counts))
    records = [_record(job) for job in jobs]
    # The published post-processing takes one tick off the last one.
    result = Result(policy, tuple(types), capacity, records, now - interval_s, decisions=decisions)
    result.notes.append("compatibility mode: reproduces the published simulation, its slips included")
    result.wall_s = time.perf_counter() - begun
    return result


def _record(job: _Job) -> JobRecord:
    segments = job.segments or []
    held = sum(
        sum(counts or ()) * (after - time) for (time, counts), (after, _) in zip(segments, segments[1:], strict=False)
    )
    assert job.finish_s is not None
    spec = job.spec
    return JobRecord(
        spec.name,
        spec.workload,
        spec.max_ests,
        spec.submit_s,
        segments[0][0],
        job.finish_s,
        spec.steps * job.est_seconds[job.home],
        held,
        job.rescales,
        0,
        tuple(segments),
    )
