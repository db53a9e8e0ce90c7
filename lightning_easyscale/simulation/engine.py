"""The event loop: exact between events, nothing in between.

Between two events every job runs at a constant speed, so the only times that matter are submissions, finishes,
failures, repairs, changes of the serving load and, if asked for, the ticks of a scheduling interval. All events of one
instant are applied before the policy decides once. With ``interval_s=0`` it decides at every event; with an interval
only at its multiples, and only where something happened or the last decision changed something.

Invariants, checked at every change: devices are conserved per type, no job holds more devices than it has ESTs, a job
without D2 holds one type.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections.abc import Callable, Sequence

from lightning_easyscale.planning.by_type import Counts
from lightning_easyscale.planning.communication import Communication
from lightning_easyscale.simulation.cluster import ClusterSpec, NodePool
from lightning_easyscale.simulation.disturbances import Failures, Serving
from lightning_easyscale.simulation.job import JobState
from lightning_easyscale.simulation.policy import Changes, Costs, Policy, View
from lightning_easyscale.simulation.result import JobRecord, Result

_PATIENCE_S = 30 * 86400.0
"""With waiting jobs and nothing running for so long, nothing ever will."""

_FINISH, _REPAIR, _FAIL, _SERVE, _ARRIVE, _TICK = range(6)


class Engine:
    """One simulation.

    Args:
        cluster: devices.
        jobs: states from `build_jobs`; used up by the run.
        policy: who decides.
        costs: of starts and rescales.
        interval_s: scheduling interval, 0: at every event.
        failures: node failures.
        serving: load that takes devices away.
        communication: gradient exchange per workload; None: none.
        on_progress: called with the number of finished jobs.

    Raises:
        ValueError: if the trace is empty, the interval negative, or a job can never run.
    """

    def __init__(
        self,
        cluster: ClusterSpec,
        jobs: Sequence[JobState],
        policy: Policy,
        *,
        costs: Costs | None = None,
        interval_s: float = 0.0,
        failures: Failures | None = None,
        serving: Serving | None = None,
        communication: Callable[[str], Communication | None] | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """Check the input and queue the first events."""
        if not jobs:
            raise ValueError("the trace is empty. HINT: give at least one job.")
        if not 0 <= interval_s < math.inf:
            raise ValueError(f"`interval_s={interval_s}` is no interval. HINT: 0 for every event, or positive seconds.")
        policy.check(jobs, cluster.capacity, cluster.types)
        self.cluster = cluster
        self.jobs = list(jobs)
        self.policy = policy
        self.costs = costs or Costs()
        self.interval_s = interval_s
        self.failures = failures or Failures()
        self.serving = serving or Serving()
        self._communication = communication
        self._on_progress = on_progress
        self.pool = NodePool(cluster)
        self.held: dict[int, dict[int, int]] = {}
        capacity = list(cluster.capacity)
        self.view = View(0.0, cluster.types, cluster.capacity, capacity, capacity.copy(), {}, self.costs, interval_s)
        self.serving_log: list[tuple[float, Counts]] = []
        self._serving_held: list[dict[int, int]] = [{} for _ in capacity]
        self._events: list[tuple[float, int, int, int]] = []
        self._next_tick = math.inf
        self._moved_s = 0.0
        self._done = 0
        self._decisions = 0
        for job in self.jobs:
            heapq.heappush(self._events, (job.spec.submit_s, _ARRIVE, job.index, 0))
        self._generators: list[random.Random] = []
        if self.failures.mtbf_s:
            first, self._generators = self.failures.first(len(self.pool.type_of))
            for node, at in enumerate(first):
                heapq.heappush(self._events, (at, _FAIL, node, 0))
        if self.serving.peak:
            heapq.heappush(self._events, (0.0, _SERVE, 0, 0))

    def run(self) -> Result:
        """Run to the end of the last job.

        Raises:
            ValueError: if jobs wait and nothing can ever happen again.
        """
        begun = time.perf_counter()
        events = self._events
        view = self.view
        while self._done < len(self.jobs):
            if not events or (view.active and not self.held and events[0][0] > self._moved_s + _PATIENCE_S):
                waiting = [j.spec.name for j in view.active.values()]
                raise ValueError(
                    f"{len(waiting)} jobs wait for ever under `{self.policy.name}`, the first is `{waiting[0]}`:"
                    " nothing runs and nothing frees devices. HINT: it needs devices that serving holds, that are down"
                    " or that the cluster does not have."
                )
            now = events[0][0]
            view.now = now
            happened = False
            while events and events[0][0] == now:
                _, kind, subject, version = heapq.heappop(events)
                happened |= self._happen(kind, subject, version)
            if happened and view.active:
                self._plan_decision(now)
        result = self._result()
        result.wall_s = time.perf_counter() - begun
        return result

    def _happen(self, kind: int, subject: int, version: int) -> bool:
        view = self.view
        if kind == _FINISH:
            job = self.jobs[subject]
            if job.version != version:
                return False
            self._finish(job)
        elif kind == _ARRIVE:
            job = self.jobs[subject]
            self._moved_s = view.now
            view.active[subject] = job
            view.arrived.append(job)
        elif kind == _TICK:
            if view.now != self._next_tick:
                return False
            self._next_tick = math.inf
        elif kind == _FAIL:
            self._fail(subject)
        elif kind == _REPAIR:
            self._repair(subject)
        else:
            self._serve(subject)
        return True

    def _plan_decision(self, now: float) -> None:
        """Decide now, or set the tick at which to."""
        if self.interval_s:
            tick = math.ceil(now / self.interval_s) * self.interval_s
            if tick > now:
                self._tick_at(tick)
                return
        view = self.view
        changes = self.policy.decide(view)
        self._decisions += 1
        view.arrived, view.gone, view.evicted = [], [], []
        changed = self._apply(changes)
        if self.interval_s and changed:
            self._tick_at(now + self.interval_s)
        if self.policy.review_s:
            self._tick_at(now + max(self.policy.review_s, self.interval_s))

    def _tick_at(self, at: float) -> None:
        if at < self._next_tick:
            self._next_tick = at
            heapq.heappush(self._events, (at, _TICK, 0, 0))

    def _apply(self, changes: Changes) -> bool:
        """Releases before grants, so that devices can change hands; True if anything changed."""
        grants = []
        changed = False
        for index, counts in changes.items():
            job = self.jobs[index]
            if counts == job.counts:
                continue
            changed = True
            if counts is None:
                self._release(job)
                job.preemptions += 1
                job.segments.append((self.view.now, None))
            else:
                self._admissible(job, counts)
                grants.append((job, counts))
        for job, counts in grants:
            self._shrink(job, counts)
        for job, counts in grants:
            self._grant(job, counts)
        return changed

    def _admissible(self, job: JobState, counts: Counts) -> None:
        types = sum(1 for n in counts if n)
        if min(counts) < 0 or not 0 < sum(counts) <= job.spec.max_ests or (types > 1 and not job.spec.d2):
            raise RuntimeError(
                f"policy `{self.policy.name}` gave job `{job.spec.name}` (P={job.spec.max_ests}, d2={job.spec.d2})"
                f" the devices {counts}."
            )

    def _release(self, job: JobState) -> None:
        """Take all devices from a job."""
        job.advance(self.view.now)
        self._moved_s = self.view.now
        self.pool.give(self.held.pop(job.index))
        assert job.counts is not None
        for i, n in enumerate(job.counts):
            self.view.free[i] += n
        job.counts = None
        job.version += 1
        job.nodes = 0

    def _shrink(self, job: JobState, counts: Counts) -> None:
        """Give back what a changed job no longer needs, emptying its least used nodes first."""
        job.advance(self.view.now)
        if job.counts is None:
            return
        held = self.held[job.index]
        for i, (old, new) in enumerate(zip(job.counts, counts, strict=True)):
            drop = old - new
            if drop <= 0:
                continue
            self.view.free[i] += drop
            for node in sorted((n for n in held if self.pool.type_of[n] == i), key=lambda n: held[n]):
                part = min(drop, held[node])
                self.pool.give({node: part})
                held[node] -= part
                if not held[node]:
                    del held[node]
                drop -= part
                if not drop:
                    break

    def _grant(self, job: JobState, counts: Counts) -> None:
        """Bring a job to `counts`, charge the cost, and predict its finish."""
        now, free = self.view.now, self.view.free
        held = self.held.setdefault(job.index, {})
        for i, (old, new) in enumerate(zip(job.counts or (0,) * len(counts), counts, strict=True)):
            if new > old:
                if new - old > free[i]:
                    raise RuntimeError(
                        f"policy `{self.policy.name}` over-committed {self.view.types[i]}: {new - old} more for job"
                        f" `{job.spec.name}`, {free[i]} free."
                    )
                free[i] -= new - old
                for node, part in self.pool.take(i, new - old).items():
                    held[node] = held.get(node, 0) + part
        if job.counts is not None:
            cost, job.rescales = self.costs.rescale_s, job.rescales + 1
        elif job.started_s is None:
            cost, job.started_s = self.costs.start_s, now
        else:
            cost, job.rescales = self.costs.resume_s, job.rescales + 1
        job.counts = counts
        job.nodes = len(held)
        job.step_s = job.planner.seconds(counts)
        if self._communication is not None and counts not in job.planner.measured_ns:
            exchange = self._communication(job.spec.workload)
            if exchange is not None:
                job.step_s += exchange.seconds(sum(counts), job.nodes)
        job.resume_s = now + cost
        job.version += 1
        job.segments.append((now, counts))
        heapq.heappush(self._events, (job.finish_time(), _FINISH, job.index, job.version))

    def _finish(self, job: JobState) -> None:
        self._release(job)
        job.remaining = 0.0
        job.finished_s = self.view.now
        job.segments.append((self.view.now, None))
        del self.view.active[job.index]
        self.view.gone.append(job)
        self._done += 1
        if self._on_progress:
            self._on_progress(self._done)

    def _fail(self, node: int) -> None:
        """A node goes down: its jobs lose their devices and the work since their last checkpoint."""
        view = self.view
        kind, size = self.pool.type_of[node], self.pool.size_of[node]
        for index in [k for k, held in self.held.items() if node in held]:
            job = self.jobs[index]
            ran = max(0.0, view.now - job.resume_s)
            lost = (ran % self.failures.checkpoint_s) / job.step_s
            self._release(job)
            job.remaining = min(job.remaining + lost, job.spec.steps)
            job.lost_steps += lost
            job.preemptions += 1
            job.segments.append((view.now, None))
            view.evicted.append(job)
        part = self._serving_held[kind].pop(node, 0)
        if part:
            self.pool.give({node: part})
            view.free[kind] += part
            view.capacity[kind] += part
        self.pool.fail(node)
        view.free[kind] -= size
        view.capacity[kind] -= size
        heapq.heappush(self._events, (view.now + self.failures.repair_s, _REPAIR, node, 0))

    def _repair(self, node: int) -> None:
        view = self.view
        kind, size = self.pool.type_of[node], self.pool.size_of[node]
        self.pool.repair(node)
        view.free[kind] += size
        view.capacity[kind] += size
        following = self.failures.next_after(view.now, self._generators[node])
        heapq.heappush(self._events, (following, _FAIL, node, 0))

    def _serve(self, tick: int) -> None:
        """Serving takes what it needs, from jobs if it must, and gives back the rest."""
        view = self.view
        wanted = self.serving.at(tick, self.cluster.capacity)
        more = [w - sum(h.values()) for w, h in zip(wanted, self._serving_held, strict=True)]
        excess = {i: n - view.free[i] for i, n in enumerate(more) if n > view.free[i]}
        held = [sum((j.counts or (0,) * len(more))[i] for j in view.active.values()) for i in excess]
        excess = {i: min(n, h) for (i, n), h in zip(excess.items(), held, strict=True) if h}
        if excess:
            self._apply(self.policy.reclaim(view, excess))
        for i, n in enumerate(more):
            if n > 0:
                n = min(n, view.free[i])
                for node, part in self.pool.take(i, n).items():
                    self._serving_held[i][node] = self._serving_held[i].get(node, 0) + part
            for node in list(self._serving_held[i]) if n < 0 else ():
                part = min(self._serving_held[i][node], -n)
                self.pool.give({node: part})
                self._serving_held[i][node] -= part
                if not self._serving_held[i][node]:
                    del self._serving_held[i][node]
                n += part
                view.free[i] += part
                view.capacity[i] += part
                if not n:
                    break
            if n > 0:
                view.free[i] -= n
                view.capacity[i] -= n
        self.serving_log.append((view.now, tuple(sum(h.values()) for h in self._serving_held)))
        heapq.heappush(self._events, ((tick + 1) * self.serving.step_s, _SERVE, tick + 1, 0))

    def _result(self) -> Result:
        records = [
            JobRecord(
                job.spec.name,
                job.spec.workload,
                job.spec.max_ests,
                job.spec.submit_s,
                job.started_s if job.started_s is not None else job.spec.submit_s,
                job.finished_s if job.finished_s is not None else math.inf,
                job.spec.steps * job.planner.seconds(job.gang()),
                job.device_seconds,
                job.rescales,
                job.preemptions,
                tuple(job.segments),
            )
            for job in self.jobs
        ]
        makespan = max(r.finish_s for r in records)
        return Result(
            self.policy.name,
            self.cluster.types,
            self.cluster.capacity,
            records,
            makespan,
            serving=self.serving_log,
            decisions=self._decisions,
        )
