"""Between jobs: choose one option per job so that the utilities' sum is largest and no device type is over-committed.

Step counts make a job's speed a staircase in its devices, so taking the best next increment first is not optimal. With
few types the exact answer is a dynamic program over the counts of free devices: ``(N_1 + 1)...(N_k + 1)`` states, one
sweep per option. Greedy is kept beside it: it is fast enough for any cluster and a few per cent worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_easyscale.planning.by_type import Counts


@dataclass(frozen=True)
class Option:
    """One way to run a job: devices per type and what that is worth."""

    counts: Counts
    utility: float


def pareto(options: Sequence[Option]) -> list[Option]:
    """Options that no other beats with at most its devices; the empty option is worth 0 and implied."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (-o.utility, sum(o.counts), o.counts)):
        if option.utility > 0 and not any(
            all(a <= b for a, b in zip(k.counts, option.counts, strict=True)) for k in kept
        ):
            kept.append(option)
    return kept


def choose_exactly(jobs: Sequence[Sequence[Option]], capacity: Counts) -> list[Option | None]:
    """The choice with the largest sum of utilities; None where a job waits.

    Args:
        jobs: the options of each job.
        capacity: devices per type.

    Raises:
        ValueError: if an option's length does not match `capacity`.
    """
    pruned = [pareto(options) for options in jobs]
    for options in pruned:
        for option in options:
            if len(option.counts) != len(capacity):
                raise ValueError(
                    f"`counts={option.counts}` does not match {len(capacity)} device types. HINT: one count per type."
                )
    # Devices that no job could take would only make the table larger.
    asked = [sum(max((o.counts[i] for o in options), default=0) for options in pruned) for i in range(len(capacity))]
    capacity = tuple(map(min, capacity, asked))
    shape = tuple(n + 1 for n in capacity)
    value = np.zeros(shape)
    taken: list[np.ndarray] = []
    for options in pruned:
        best, choice = value.copy(), np.full(shape, -1, dtype=np.int32)
        for index, option in enumerate(options):
            if any(c > n for c, n in zip(option.counts, capacity, strict=True)):
                continue
            after = tuple(slice(c, None) for c in option.counts)
            before = tuple(slice(0, n + 1 - c) for c, n in zip(option.counts, capacity, strict=True))
            gained = value[before] + option.utility
            better = gained > best[after]
            best[after][better] = gained[better]
            choice[after][better] = index
        value = best
        taken.append(choice)
    left, chosen = tuple(capacity), []
    for options, choice in zip(reversed(pruned), reversed(taken), strict=True):
        index = int(choice[left])
        chosen.append(options[index] if index >= 0 else None)
        if index >= 0:
            left = tuple(n - c for n, c in zip(left, options[index].counts, strict=True))
    return chosen[::-1]


def choose_greedily(jobs: Sequence[Sequence[Option]], capacity: Counts) -> list[Option | None]:
    """Repeatedly the upgrade with the largest gain per device added, from nothing; not optimal, fast.

    An upgrade replaces a job's option by one that holds at least as many devices of every type.
    """
    chosen: list[Option | None] = [None] * len(jobs)
    empty = Option((0,) * len(capacity), 0.0)
    left = capacity
    pruned = [pareto(options) for options in jobs]
    while True:
        best_rate, best = 0.0, None
        for j, options in enumerate(pruned):
            now = chosen[j] or empty
            for option in options:
                extra = tuple(a - b for a, b in zip(option.counts, now.counts, strict=True))
                if min(extra) < 0 or any(e > n for e, n in zip(extra, left, strict=True)):
                    continue
                rate = (option.utility - now.utility) / max(1, sum(extra))
                if rate > best_rate:
                    best_rate, best = rate, (j, option, extra)
        if best is None:
            return chosen
        j, option, extra = best
        chosen[j] = option
        left = tuple(n - e for n, e in zip(left, extra, strict=True))
