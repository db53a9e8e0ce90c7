"""Gavel (Narayanan et al., OSDI'20): shares of time on each type from a linear program, realised in rounds.

Jobs are gangs of P devices of one type at a time and may change type between rounds (Gavel makes no promise about
bits). The program gives every job its shares of time on the types; a round runs the jobs whose share is largest against
the rounds they have had. Jobs with the same step times and size are alike to the program, so it is solved over classes
of jobs, and its size does not grow with the trace. A class's time is then dealt out: evenly where the objective is
fairness, else whole shares to its oldest jobs, which has the same sum and preempts less.
Rounds follow the simulation's interval (at every event without one, and every minute): Gavel's own six minutes suit
jobs of hours and would only make it look bad on jobs of minutes. Needs scipy (the `recipes` extra).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_easyscale.planning.by_type import Counts, TypePlanner
from lightning_easyscale.simulation.job import JobState
from lightning_easyscale.simulation.policy import Changes, GangPolicy, View


class GavelMaxSum(GangPolicy):
    """Objective: largest sum of normalised throughputs."""

    name = "gavel-max-sum"
    review_s = 60.0
    fair = False

    def __init__(self) -> None:
        """No rounds were run."""
        self._classes: dict[TypePlanner, int] = {}
        self._speeds: list[list[float]] = []
        self._sizes: list[int] = []
        self._members = np.zeros(0, dtype=np.int64)
        self._class_of = np.zeros(0, dtype=np.int64)
        self._lived = np.zeros(0)
        self._rounds = np.zeros((0, 0))
        self._shares = np.zeros((0, 0))
        self._solved_for: tuple = ()

    def check(self, jobs: Sequence[JobState], capacity: Sequence[int], types: Sequence[str]) -> None:
        """Refuse jobs that fit on no single type; sort the others into classes."""
        width = len(types)
        self._class_of = np.zeros(len(jobs), dtype=np.int64)
        self._lived, self._rounds = np.zeros(len(jobs)), np.zeros((len(jobs), width))
        for job in jobs:
            if job.spec.max_ests > max(capacity):
                raise ValueError(
                    f"job `{job.spec.name}` asks for {job.spec.max_ests} devices of one type and can never run under"
                    f" `{self.name}` (largest type: {max(capacity)}). HINT: enlarge the cluster or drop the job."
                )
            if job.planner not in self._classes:
                self._classes[job.planner] = len(self._classes)
                times = [m.time_ns(1) if m else 0 for m in job.planner.models]
                self._speeds.append([max(times) / t if t else 0.0 for t in times])  # over the slowest type's
                self._sizes.append(job.spec.max_ests)
            self._class_of[job.index] = self._classes[job.planner]
        self._members = np.zeros(len(self._classes), dtype=np.int64)
        self._shares = np.zeros((len(self._classes), width))

    def _solve(self, capacity: Sequence[int]) -> np.ndarray:
        """How many jobs of each class are to run on each type, time-averaged."""
        from scipy.optimize import linprog
        from scipy.sparse import coo_matrix

        shares = np.zeros_like(self._shares)
        present = [c for c, count in enumerate(self._members) if count]
        pairs = [(c, t) for c in present for t, n in enumerate(capacity) if self._sizes[c] <= n]
        if not pairs:
            return shares
        row_of = {c: i for i, c in enumerate(present)}
        count = {c: float(self._members[c]) for c in present}
        n = len(pairs) + int(self.fair)
        rows: list[int] = []
        columns: list[int] = []
        values: list[float] = []
        for k, (c, t) in enumerate(pairs):  # the variables are a class's jobs that run on a type at a time
            rows += [row_of[c], len(present) + t]
            columns += [k, k]
            values += [1.0, float(self._sizes[c])]
        bounds = [count[c] for c in present] + [float(c) for c in capacity]
        if self.fair:  # every job's throughput is at least the last variable, which is maximised
            index = {c: len(bounds) + i for i, c in enumerate(dict.fromkeys(c for c, _ in pairs))}
            for k, (c, t) in enumerate(pairs):
                rows.append(index[c])
                columns.append(k)
                values.append(-self._speeds[c][t] / count[c])
            for row in index.values():
                rows.append(row)
                columns.append(n - 1)
                values.append(1.0)
            bounds += [0.0] * len(index)
        small = 1e-3 if self.fair else 1.0
        cost = [-small * self._speeds[c][t] for c, t in pairs] + [-sum(count.values())] * int(self.fair)
        matrix = coo_matrix((values, (rows, columns)), shape=(len(bounds), n))
        found = linprog(np.array(cost), A_ub=matrix.tocsr(), b_ub=np.array(bounds), bounds=(0, None), method="highs")
        for (c, t), x in zip(pairs, found.x, strict=False):
            shares[c, t] = x if x > 1e-9 else 0.0
        return shares

    def _dealt(self, active: np.ndarray) -> np.ndarray:
        """The shares of each active job, by order of submission."""
        classes = self._class_of[active]
        if self.fair:
            return self._shares[classes] / self._members[classes, None]
        order = np.argsort(classes, kind="stable")
        rank = np.empty(len(active))
        rank[order] = np.arange(len(active)) - np.searchsorted(classes[order], classes[order])
        # A class's time lies end to end, type after type; the job of rank r owns what falls into [r, r + 1).
        ends = np.cumsum(self._shares, axis=1)
        begins = ends - self._shares
        owned = np.minimum(ends[classes], rank[:, None] + 1) - np.maximum(begins[classes], rank[:, None])
        return np.where(owned > 1e-9, owned, 0.0)

    def decide(self, view: View) -> Changes:
        """Solve where jobs or devices changed, then fill the round."""
        for job in view.arrived:
            self._members[self._class_of[job.index]] += 1
        for job in view.gone:
            self._members[self._class_of[job.index]] -= 1
        state = (self._members.tobytes(), tuple(view.capacity))
        if state != self._solved_for:
            self._shares, self._solved_for = self._solve(view.capacity), state
        active = np.fromiter(view.active, dtype=np.int64, count=len(view.active))
        self._lived[active] += 1
        left, chosen = view.capacity.copy(), {}
        width = len(left)
        priority = (self._dealt(active) * self._lived[active, None] / (self._rounds[active] + 0.01)).ravel()
        order = np.argsort(-priority, kind="stable")[: np.count_nonzero(priority)]
        for place in order.tolist():
            index, kind = int(active[place // width]), place % width
            size = view.active[index].spec.max_ests
            if size <= left[kind] and index not in chosen:
                chosen[index] = kind
                left[kind] -= size
                if not any(left):
                    break
        for index, job in view.active.items():  # what is left goes in order of submission, fastest type first
            room = max(left)
            if not room:
                break
            if job.spec.max_ests <= room and index not in chosen:
                speeds = self._speeds[self._class_of[index]]
                kind = max((t for t, n in enumerate(left) if n >= job.spec.max_ests), key=lambda t: (speeds[t], -t))
                chosen[index] = kind
                left[kind] -= job.spec.max_ests
        changes: Changes = {}
        for index, job in view.active.items():
            counts: Counts | None = None
            if index in chosen:
                kind = chosen[index]
                self._rounds[index, kind] += 1
                counts = tuple(job.spec.max_ests if t == kind else 0 for t in range(width))
            if counts != job.counts:
                changes[index] = counts
        return changes


class GavelLas(GavelMaxSum):
    """Objective: the worst-off job's normalised throughput is largest (least attained service, heterogeneous)."""

    name = "gavel-las"
    fair = True
