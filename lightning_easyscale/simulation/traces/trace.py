"""A trace and what was assumed to make one.

Public cluster traces say when a job came, how long it ran and on how many GPUs; none says which model it trained, how
far it could scale or on what device speed. `assign` fills these in with a seed and writes every assumption into the
trace's notes, which travel with the results.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_easyscale.planning.profile import Profile
from lightning_easyscale.simulation.job import JobSpec


@dataclass
class Trace:
    """Jobs, and what a reader of the results must know about them."""

    name: str
    jobs: list[JobSpec]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RawJob:
    """What public traces state about a job.

    Args:
        name: its name.
        submit_s: seconds since the trace's start.
        duration_s: seconds it ran.
        num_gpus: GPUs it ran on.
        queue: tenant or virtual cluster.
    """

    name: str
    submit_s: float
    duration_s: float
    num_gpus: int
    queue: str = "default"


_D2_COST = 1.1


def d2_friendly(profile: Profile) -> set[str]:
    """Workloads whose D2 kernels take at most a tenth longer than their D1 kernels, on every type; these may mix types.

    By the published step times: BERT, ELECTRA, NeuMF and Swin.
    """

    def cost(workload: str, device_type: str) -> float:
        sizes = set(profile.batch_sizes(workload, device_type, "D1"))
        shared = sizes.intersection(profile.batch_sizes(workload, device_type, "D2"))
        ratios = (
            profile.seconds(workload, device_type, "D2", size) / profile.seconds(workload, device_type, "D1", size)
            for size in shared
        )
        return max(ratios, default=float("inf"))

    return {w for w in profile.workloads if all(cost(w, t) <= _D2_COST for t in profile.device_types)}


def assign(
    raw: Sequence[RawJob],
    profile: Profile,
    capacity: Mapping[str, int],
    *,
    seed: int = 0,
    workloads: Mapping[str, float] | None = None,
) -> tuple[list[JobSpec], list[str]]:
    """Give each raw job a model, a device type, and work that makes it run for its duration.

    Args:
        raw: the jobs.
        profile: step times.
        capacity: devices per type; types are drawn in proportion, among those with enough devices.
        seed: of the draws; each job's draw depends on the seed and its own name only.
        workloads: weights; default: all of the profile, equally.

    Returns:
        The jobs, and the assumptions in words.

    Raises:
        ValueError: if a job is larger than every device type.
    """
    weights = dict(workloads or dict.fromkeys(profile.workloads, 1.0))
    friendly = d2_friendly(profile)
    specs = []
    for job in raw:
        draw = random.Random(f"{seed}/{job.name}")
        workload = draw.choices(list(weights), list(weights.values()))[0]
        large = {t: n for t, n in capacity.items() if n >= job.num_gpus}
        if not large:
            raise ValueError(
                f"job `{job.name}` ran on {job.num_gpus} GPUs and no type has as many ({dict(capacity)})."
                " HINT: enlarge the cluster or set `max_gpus` to leave such jobs out."
            )
        preferred = draw.choices(list(large), list(large.values()))[0]
        d2 = workload in friendly
        kernels = "D2" if d2 else "D1"
        batch = profile.batch_sizes(workload, preferred, kernels)[0]
        steps = job.duration_s / profile.seconds(workload, preferred, kernels, batch)
        specs.append(JobSpec(job.name, job.submit_s, workload, job.num_gpus, steps, batch, d2, preferred, job.queue))
    notes = [
        f"maxP assumed equal to the GPUs a job ran on; workload and device type drawn with seed {seed}",
        "work chosen so that the job takes its recorded duration alone on maxP devices of its type",
    ]
    return specs, notes
