"""A seeded trace generator fitted to published statistics.

Arrivals are a Poisson process whose rate follows the day; sizes are drawn from the published shares; durations are
log-normal with the published median and spread, cut off at a maximum. Fitted here from the public traces:

- ``easyscale`` (68-job trace of SC'23): gap 70 s, sizes 4 to 32, duration (alone on maxP devices) median 75 s, sigma
1.6; - ``philly`` (Jeon et al., ATC'19; 82,247 jobs): 93 % one GPU, median 1144 s, sigma 2.21 (95th percentile 43,647
s); - ``elasticflow`` (69,351 jobs): 83 % one GPU, 10 % eight, median 10,537 s, sigma 1.03 (95th percentile 57,514 s).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_easyscale.planning.profile import Profile
from lightning_easyscale.simulation.traces.trace import RawJob, Trace, assign


@dataclass(frozen=True)
class Shape:
    """Statistics of a trace.

    Args:
        sizes: weight of each number of GPUs.
        median_s: median duration.
        sigma: standard deviation of the duration's logarithm.
        longest_s: durations are cut off here.
        gap_s: mean seconds between submissions.
        daily: arrival rate at night over its mean; 1: no daily rhythm.
    """

    sizes: Mapping[int, float]
    median_s: float
    sigma: float
    longest_s: float
    gap_s: float
    daily: float = 1.0

    def mean_duration(self) -> float:
        """Mean of the cut-off log-normal, seconds."""
        z = (math.log(self.longest_s) - math.log(self.median_s)) / self.sigma
        inside = self.median_s * math.exp(self.sigma**2 / 2) * _normal(z - self.sigma)
        return inside + self.longest_s * (1 - _normal(z))


def _normal(z: float) -> float:
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


SHAPES = {
    "easyscale": Shape({4: 0.02, 8: 0.18, 16: 0.25, 32: 0.55}, 75.0, 1.6, 3000.0, 70.0),
    "philly": Shape(
        {1: 0.932, 2: 0.022, 4: 0.023, 8: 0.02, 16: 0.0024, 32: 0.0008}, 1144.0, 2.21, 864000.0, 114.0, 0.7
    ),
    "elasticflow": Shape(
        {1: 0.832, 2: 0.021, 4: 0.034, 8: 0.101, 16: 0.0055, 32: 0.0051, 64: 0.001}, 10537.0, 1.03, 864000.0, 75.0, 0.8
    ),
}


def generate(
    profile: Profile,
    capacity: Mapping[str, int],
    *,
    shape: str | Shape = "easyscale",
    num_jobs: int = 68,
    load: float | None = None,
    seed: int = 0,
    workloads: Mapping[str, float] | None = None,
) -> Trace:
    """A trace.

    Args:
        profile: step times.
        capacity: devices per type.
        shape: one of `SHAPES`, or your own.
        num_jobs: how many.
        load: mean demand over capacity (device-seconds asked for per second and device); sets the gap. None: the
            shape's.
        seed: same seed, same trace, on every machine.
        workloads: weights; default: the profile's, equally.

    Raises:
        ValueError: if a number is out of range or the shape unknown.
    """
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise ValueError(f"`shape={shape!r}` is unknown. HINT: one of {', '.join(SHAPES)}.")
        name, statistics = shape, SHAPES[shape]
    else:
        name, statistics = "custom", shape
    if num_jobs < 1:
        raise ValueError(f"`num_jobs={num_jobs}` is an empty trace. HINT: give at least one job.")
    if load is not None and load <= 0:
        raise ValueError(f"`load={load}` is no load. HINT: a positive number, 1 keeps every device busy.")
    largest = max(capacity.values())
    sizes = {size: weight for size, weight in statistics.sizes.items() if size <= largest}
    if not sizes:
        raise ValueError(f"`shape={name!r}` has no job small enough for {dict(capacity)}. HINT: enlarge the cluster.")
    gap = statistics.gap_s
    if load is not None:
        mean_size = sum(s * w for s, w in sizes.items()) / sum(sizes.values())
        gap = mean_size * statistics.mean_duration() / (load * sum(capacity.values()))
    draw = random.Random(f"easyscale-trace/{seed}")
    now = 0.0
    raw: list[RawJob] = []
    while len(raw) < num_jobs:
        # Thinning: candidates at the day's highest rate, kept in proportion to the hour's.
        swing = 1.0 - statistics.daily
        now += draw.expovariate((1.0 + swing) / gap)
        rate = (1.0 - swing * math.cos(2 * math.pi * now / 86400.0)) / (1.0 + swing)
        if draw.random() >= rate:
            continue
        duration = min(statistics.median_s * math.exp(statistics.sigma * draw.gauss(0.0, 1.0)), statistics.longest_s)
        size = draw.choices(list(sizes), list(sizes.values()))[0]
        queue = f"tenant-{draw.randrange(8)}"
        raw.append(RawJob(f"job-{len(raw):05d}", now, max(duration, 1.0), size, queue))
    specs, notes = assign(raw, profile, capacity, seed=seed, workloads=workloads)
    notes.insert(0, f"generated: {num_jobs} jobs, shape `{name}`, mean gap {gap:.1f} s, seed {seed}")
    return Trace(f"generated-{name}-{num_jobs}-{seed}", specs, notes)
