"""The paper's heuristic for ESTs per device type, for comparison with the exact planner.

Source: EasyScale (SC'23), section 3.4. For every multiplier ``m = 1..P`` the ideal numbers ``m C_i`` are rounded down
and up, type by type; every set of at least two types and every single type gives a candidate ``A``. Devices are then
taken, types with the larger A first, until P ESTs have a place. Unlike the exact planner, a candidate fixes one A per
type, so it may place more ESTs than the job has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from lightning_easyscale.planning.allocation import waste_and_speedup
from lightning_easyscale.planning.by_type import Counts


@dataclass(frozen=True)
class HeuristicProposal:
    """One placement with its ESTs per device.

    Args:
        counts: devices per type.
        ests: A per type; may be positive for a type without devices (an artefact of the candidate).
        waste: the paper's waste.
        speedup: over one device of the reference type.
    """

    counts: Counts
    ests: Counts
    waste: float
    speedup: float


def candidates(num_ests: int, power: Sequence[float]) -> list[tuple[Counts, int]]:
    """The heuristic's ESTs per type, each with its multiplier, in order of generation (repetitions included).

    Args:
        num_ests: P.
        power: ``C_i`` per type, about 1 for the slowest.
    """
    types = range(len(power))
    found = []
    for m in range(1, num_ests + 1):
        for rounded in product(*(dict.fromkeys((math.floor(c * m), math.ceil(c * m))) for c in power)):
            for size in range(2, len(power) + 1):
                for chosen in combinations(types, size):
                    if any(rounded[i] <= num_ests for i in chosen):
                        found.append((tuple(rounded[i] if i in chosen else 0 for i in types), m))
    return found + [(tuple(m if i == j else 0 for j in types), m) for i in types for m in range(1, num_ests + 1)]


def fillings(num_ests: int, ests: Counts, limits: Counts) -> Iterator[Counts]:
    """Devices per type that just hold P ESTs: types by falling A, none of the last type's devices superfluous."""
    order = sorted((i for i, a in enumerate(ests) if a > 0), key=lambda i: (-ests[i], i))

    def fill(depth: int, left: int, counts: list[int]) -> Iterator[Counts]:
        if depth == len(order):
            return
        i = order[depth]
        for n in range(limits[i] + 1):
            counts[i] = n
            if left - n * ests[i] <= 0:
                yield tuple(counts)
                break
            yield from fill(depth + 1, left - n * ests[i], counts)
        counts[i] = 0

    yield from fill(0, num_ests, [0] * len(ests))


def heuristic_proposals(num_ests: int, est_seconds: Sequence[float], limits: Counts) -> list[HeuristicProposal]:
    """Every proposal of the heuristic, waste and speed-up by the paper's definition for any number of types.

    Args:
        num_ests: P.
        est_seconds: one EST's seconds per type; the last type is the reference.
        limits: devices per type there are.
    """
    power = [est_seconds[-1] / t for t in est_seconds]
    proposals = []
    for candidate in sorted({ests for ests, _ in candidates(num_ests, power)}):
        for counts in sorted(fillings(num_ests, candidate, limits), key=sum):
            held = [i for i, n in enumerate(counts) if n]
            given = candidate
            if len(held) == 1:  # one type: an even share, rounded up
                given = tuple(-(-num_ests // counts[i]) if i in held else 0 for i in range(len(candidate)))
            per_device = [(given[i], est_seconds[i]) for i in held for _ in range(counts[i])]
            waste, speedup = waste_and_speedup(
                num_ests, [a for a, _ in per_device], [t for _, t in per_device], est_seconds[-1]
            )
            proposals.append(HeuristicProposal(counts, given, waste, speedup))
    return proposals


def best_by_placement(proposals: Sequence[HeuristicProposal]) -> dict[Counts, HeuristicProposal]:
    """The fastest proposal of each placement."""
    best: dict[Counts, HeuristicProposal] = {}
    for p in proposals:
        if p.counts not in best or p.speedup > best[p.counts].speedup:
            best[p.counts] = p
    return best
