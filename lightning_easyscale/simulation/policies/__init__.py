"""Scheduling policies by name.

A policy holds state about one run, so every simulation gets its own: `make_policy(name)`.
"""

from __future__ import annotations

from lightning_easyscale.simulation.policies.best import EasyScaleBest
from lightning_easyscale.simulation.policies.easyscale import EasyScaleHeter, EasyScaleHomo
from lightning_easyscale.simulation.policies.gang import (
    Fifo,
    FifoBackfill,
    FifoPerType,
    SerialFifo,
    Srtf,
    Tiresias,
    YarnCapacity,
)
from lightning_easyscale.simulation.policies.gavel import GavelLas, GavelMaxSum
from lightning_easyscale.simulation.policies.greedy import Optimus, PolluxLike
from lightning_easyscale.simulation.policies.sia import SiaLike
from lightning_easyscale.simulation.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        SerialFifo,
        Fifo,
        FifoPerType,
        FifoBackfill,
        YarnCapacity,
        Srtf,
        Tiresias,
        Optimus,
        GavelMaxSum,
        GavelLas,
        PolluxLike,
        SiaLike,
        EasyScaleHomo,
        EasyScaleHeter,
        EasyScaleBest,
    )
}


def make_policy(name: str) -> Policy:
    """A fresh policy.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in POLICIES:
        raise ValueError(f"`policy={name!r}` is unknown. HINT: one of {', '.join(POLICIES)}, or `all`.")
    return POLICIES[name]()


__all__ = ["POLICIES", "make_policy"]
