"""What happens to a cluster besides training: nodes fail, serving takes devices by day.

Both are generated before the run from a seed, so that every policy meets the same events.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_easyscale.planning.by_type import Counts


@dataclass(frozen=True)
class Failures:
    """Node failures: exponential time between failures per node, fixed repair time.

    Args:
        mtbf_s: mean seconds between failures of one node; 0: no failures.
        repair_s: seconds until the node is back.
        checkpoint_s: seconds between periodic checkpoints: a failed job falls back to the last one.
        seed: of the generator.

    Raises:
        ValueError: if a time is out of range.
    """

    mtbf_s: float = 0.0
    repair_s: float = 3600.0
    checkpoint_s: float = 1800.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.mtbf_s < 0 or self.repair_s <= 0 or self.checkpoint_s <= 0:
            raise ValueError(
                f"`mtbf_s={self.mtbf_s}`, `repair_s={self.repair_s}`, `checkpoint_s={self.checkpoint_s}`: out of range."
                " HINT: repair and checkpoint times are positive; `mtbf_s=0` switches failures off."
            )

    def first(self, nodes: int) -> tuple[list[float], list[random.Random]]:
        """The first failure of each node and its generator for the next ones."""
        generators = [random.Random(f"{self.seed}/{node}") for node in range(nodes)]
        return [self.next_after(0.0, g) for g in generators], generators

    def next_after(self, now: float, generator: random.Random) -> float:
        """When a node that works at `now` fails next."""
        return now + generator.expovariate(1.0 / self.mtbf_s) if self.mtbf_s else math.inf


@dataclass(frozen=True)
class Serving:
    """Inference that shares the cluster and has priority: its load follows the day.

    Args:
        trough: smallest share of the devices it needs, in 0..1.
        peak: largest share.
        period_s: a day.
        step_s: seconds between changes.
        noise: standard deviation of a random share added at each change.
        seed: of the noise.

    Raises:
        ValueError: if a share or time is out of range.
    """

    trough: float = 0.0
    peak: float = 0.0
    period_s: float = 86400.0
    step_s: float = 900.0
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.trough <= self.peak < 1 or self.period_s <= 0 or self.step_s <= 0 or self.noise < 0:
            raise ValueError(
                f"`trough={self.trough}`, `peak={self.peak}`, `period_s={self.period_s}`, `step_s={self.step_s}`,"
                f" `noise={self.noise}`: out of range. HINT: 0 <= trough <= peak < 1, times positive."
            )

    def at(self, tick: int, capacity: Sequence[int]) -> Counts:
        """Devices per type taken from time ``tick * step_s`` on; lowest at the start of a day."""
        phase = 2 * math.pi * tick * self.step_s / self.period_s
        share = self.trough + (self.peak - self.trough) * (1 - math.cos(phase)) / 2
        if self.noise:
            share += random.Random(f"{self.seed}/{tick}").gauss(0.0, self.noise)
        share = min(max(share, 0.0), 0.95)
        return tuple(int(n * share) for n in capacity)
