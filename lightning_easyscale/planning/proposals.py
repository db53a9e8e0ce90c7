"""Which devices a running job should ask for next.

The paper's limits: one type grows while the others stay, at most doubling the job's devices, waste at most 0.30, ranked
by speed gained per device, ``(speedup_new / speedup_now - 1) / inc + 1``. The allocation behind each proposal is the
exact one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lightning_easyscale.planning.by_type import Counts, TypePlanner

MAX_WASTE = 0.30
MAX_GROWTH = 2.0


@dataclass(frozen=True)
class Proposal:
    """More devices of one type.

    Args:
        device_type: index of the type that grows.
        added: devices more of it.
        counts: devices per type after.
        speedup: speed after over speed now.
        waste: waste after.
        gain: ``(speedup - 1) / added + 1``, the paper's ranking.
    """

    device_type: int
    added: int
    counts: Counts
    speedup: float
    waste: float
    gain: float


def propose(
    planner: TypePlanner,
    held: Counts,
    free: Counts,
    *,
    top_k: int = 1,
    types: Iterable[int] | None = None,
    max_waste: float = MAX_WASTE,
    max_growth: float = MAX_GROWTH,
) -> list[Proposal]:
    """The `top_k` best ways to grow by one type, per type, best first.

    Args:
        planner: the job's exact planner.
        held: devices per type it holds, at least one in all.
        free: devices per type it could add.
        top_k: proposals per type.
        types: types that may grow; default all (a job without D2 names its own only).
        max_waste: proposals above it are left out.
        max_growth: devices after over devices now, at most.

    Raises:
        ValueError: if the job holds nothing, or `top_k` is not positive.
    """
    now, devices = planner.speed(held), sum(held)
    if now <= 0 or top_k < 1:
        raise ValueError(
            f"`held={held}`, `top_k={top_k}`: nothing to grow from."
            " HINT: a running job holds devices; ask for one or more."
        )
    proposals = []
    for i in range(len(held)) if types is None else types:
        found = []
        most = min(free[i], int(devices * max_growth) - devices, planner.num_ests - devices)
        for added in range(1, most + 1):
            counts = (*held[:i], held[i] + added, *held[i + 1 :])
            speedup = planner.speed(counts) / now
            waste = planner.waste(counts)
            if speedup > 1.0 and waste <= max_waste:
                found.append(Proposal(i, added, counts, speedup, waste, (speedup - 1.0) / added + 1.0))
        found.sort(key=lambda p: (-p.gain, -p.added))
        proposals += found[:top_k]
    return sorted(proposals, key=lambda p: (-p.gain, p.device_type, p.added))
