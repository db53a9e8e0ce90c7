"""Gavel (Narayanan et al., OSDI'20): shares of time on each type from a linear program, realised in rounds.

Jobs are gangs of P devices of one type at a time and may change type between rounds (Gavel makes no promise about
bits). The program's variables are the shares of time ``X[j, t]``; a round runs the jobs whose share is largest against
the rounds they have had. Rounds follow the simulation's interval (at every event without one, and every minute):
Gavel's own six minutes suit jobs of hours and would only make it look bad on jobs of minutes. Needs scipy (the
`recipes` extra).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_easyscale.simulation.job import JobState
from lightning_easyscale.simulation.policy import Changes, GangPolicy, View


class GavelMaxSum(GangPolicy):
    """Objective: largest sum of normalised throughputs."""

    name = "gavel-max-sum"
    review_s = 60.0
    fair = False

    def __init__(self) -> None:
        """No rounds were run."""
        self._rounds: dict[tuple[int, int], int] = {}
        self._lived: dict[int, int] = {}
        self._shares: dict[tuple[int, int], float] = {}
        self._solved_for: tuple = ()

    def check(self, jobs: Sequence[JobState], capacity: Sequence[int], types: Sequence[str]) -> None:
        """Refuse jobs that fit on no single type."""
        for job in jobs:
            if job.spec.max_ests > max(capacity):
                raise ValueError(
                    f"job `{job.spec.name}` asks for {job.spec.max_ests} devices of one type and can never run under"
                    f" `{self.name}` (largest type: {max(capacity)}). HINT: enlarge the cluster or drop the job."
                )

    def _normalised(self, job: JobState, width: int) -> list[float]:
        """Speed of the gang per type over the slowest type's."""
        times = [m.time_ns(1) if (m := job.planner.models[t]) else 0 for t in range(width)]
        slowest = max(times)
        return [slowest / t if t else 0.0 for t in times]

    def _solve(self, jobs: list[JobState], view: View) -> dict[tuple[int, int], float]:
        from scipy.optimize import linprog
        from scipy.sparse import coo_matrix

        width = len(view.types)
        pairs = [(j, t) for j in range(len(jobs)) for t in range(width) if jobs[j].spec.max_ests <= view.capacity[t]]
        if not pairs:
            return {}
        speed = [self._normalised(job, width) for job in jobs]
        extra = int(self.fair)
        n = len(pairs) + extra
        rows: list[int] = []
        columns: list[int] = []
        values: list[float] = []
        for k, (j, t) in enumerate(pairs):
            rows += [j, len(jobs) + t]
            columns += [k, k]
            values += [1.0, float(jobs[j].spec.max_ests)]
        bounds = [1.0] * len(jobs) + [float(c) for c in view.capacity]
        if self.fair:  # every job's throughput is at least the last variable, which is maximised
            possible = {j for j, _ in pairs}
            index = {j: len(bounds) + i for i, j in enumerate(sorted(possible))}
            for k, (j, t) in enumerate(pairs):
                rows.append(index[j])
                columns.append(k)
                values.append(-speed[j][t])
            for j in possible:
                rows.append(index[j])
                columns.append(n - 1)
                values.append(1.0)
            bounds += [0.0] * len(possible)
        small = 1e-3 if self.fair else 1.0
        cost = [-small * speed[j][t] for j, t in pairs] + [-float(len(jobs))] * extra
        matrix = coo_matrix((values, (rows, columns)), shape=(len(bounds), n))
        found = linprog(np.array(cost), A_ub=matrix.tocsr(), b_ub=np.array(bounds), bounds=(0, None), method="highs")
        return {(jobs[j].index, t): float(x) for (j, t), x in zip(pairs, found.x, strict=False) if x > 1e-9}

    def decide(self, view: View) -> Changes:
        """Solve where jobs or devices changed, then fill the round."""
        jobs = list(view.active.values())
        state = (tuple(view.active), tuple(view.capacity))
        if state != self._solved_for:
            self._shares, self._solved_for = self._solve(jobs, view), state
        for job in jobs:
            self._lived[job.index] = self._lived.get(job.index, 0) + 1
        order = sorted(
            self._shares.items(),
            key=lambda item: (-item[1] * self._lived[item[0][0]] / (self._rounds.get(item[0], 0) + 0.01), item[0]),
        )
        left = view.capacity.copy()
        chosen: dict[int, int] = {}
        for (index, kind), _ in order:
            size = view.active[index].spec.max_ests
            if index not in chosen and size <= left[kind]:
                chosen[index] = kind
                left[kind] -= size
        for job in jobs:  # work conservation: what is left goes in order of submission, fastest type first
            if job.index not in chosen:
                speeds = self._normalised(job, len(left))
                kinds = [t for t, n in enumerate(left) if n >= job.spec.max_ests]
                if kinds:
                    kind = max(kinds, key=lambda t: (speeds[t], -t))
                    chosen[job.index] = kind
                    left[kind] -= job.spec.max_ests
        changes: Changes = {}
        for job in jobs:
            kind_now = chosen.get(job.index)
            counts = None
            if kind_now is not None:
                counts = tuple(job.spec.max_ests if t == kind_now else 0 for t in range(len(left)))
                self._rounds[job.index, kind_now] = self._rounds.get((job.index, kind_now), 0) + 1
            if counts != job.counts:
                changes[job.index] = counts
        return changes


class GavelLas(GavelMaxSum):
    """Objective: the worst-off job's normalised throughput is largest (least attained service, heterogeneous)."""

    name = "gavel-las"
    fair = True
