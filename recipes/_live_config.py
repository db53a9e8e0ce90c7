"""Schema of `cluster`, and the trace of jobs that it draws."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import List, Optional  # noqa: UP035  OmegaConf reads these at run time

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from lightning_easyscale.simulation import POLICIES, JobSpec

from ._config import ConfigError, WorkloadConf
from ._profile_config import read_pace


@dataclass
class PolicyConf:
    """Names of policies, as `simulate` takes them; a cluster has one."""

    names: List[str] = MISSING  # noqa: UP006


@dataclass
class LiveConf:
    """The whole configuration.

    Args:
        workload: group.
        devices: the cluster, as for the accelerator: ``v100:2,t4:1``.
        pace: seconds that an EST sleeps in its mini-batch, by type: emulated devices then keep their speed whatever
            the number of cores.
        policy: group; who decides.
        num_jobs: jobs of the trace.
        mean_gap_s: mean seconds between submissions.
        num_ests: job sizes that are drawn.
        steps: least and greatest number of steps that are drawn.
        d2_share: share of jobs that may mix types.
        seed: of the trace and of the jobs.
        profile: a profile of `recipes.profile`; default: one is measured first.
        profile_steps: steps that are timed for each of its configurations.
        calibrations: how often the cost of starting and of rescaling is measured.
        timeout_s: longest time the live part may take, in seconds.
    """

    workload: WorkloadConf = field(default_factory=WorkloadConf)
    devices: str = MISSING
    pace: str = MISSING
    policy: PolicyConf = field(default_factory=PolicyConf)
    num_jobs: int = MISSING
    mean_gap_s: float = MISSING
    num_ests: List[int] = MISSING  # noqa: UP006
    steps: List[int] = MISSING  # noqa: UP006
    d2_share: float = 0.7
    seed: int = 0
    profile: Optional[str] = None  # noqa: UP045
    profile_steps: int = 8
    calibrations: int = 3
    timeout_s: float = 1800.0


def register() -> None:
    """Make the schema known to Hydra."""
    ConfigStore.instance().store(name="live_schema", node=LiveConf)


def check(conf: LiveConf) -> None:
    """Refuse what cannot run.

    Raises:
        ConfigError: naming the key and the cure.
    """
    names = list(conf.policy.names)
    if len(names) != 1 or names[0] not in POLICIES:
        raise ConfigError(f"`policy.names={names}` is not one policy. HINT: one of {', '.join(POLICIES)}.")
    if conf.num_jobs < 1 or conf.mean_gap_s < 0 or conf.calibrations < 1:
        raise ConfigError(
            f"`num_jobs={conf.num_jobs}`, `mean_gap_s={conf.mean_gap_s}`, `calibrations={conf.calibrations}`: out of"
            " range. HINT: at least one job and one calibration; gaps of zero or more."
        )
    if len(conf.steps) != 2 or not 1 <= conf.steps[0] <= conf.steps[1]:
        raise ConfigError(f"`steps={list(conf.steps)}`. HINT: give the least and the greatest number of steps.")
    if not conf.num_ests or min(conf.num_ests) < 1 or not 0 <= conf.d2_share <= 1:
        raise ConfigError(
            f"`num_ests={list(conf.num_ests)}`, `d2_share={conf.d2_share}`. HINT: sizes >= 1, a share 0..1."
        )
    read_pace(conf.pace)


def draw_trace(conf: LiveConf, types: dict[str, int]) -> list[JobSpec]:
    """Jobs with exponential gaps; sizes, lengths, kernels and types drawn with the seed."""
    draw = random.Random(conf.seed)
    submit, jobs = 0.0, []
    for number in range(conf.num_jobs):
        size, steps = draw.choice(list(conf.num_ests)), draw.randint(*conf.steps)
        d2, preferred = draw.random() < conf.d2_share, draw.choices(list(types), list(types.values()))[0]
        if not d2:
            size = min(size, types[preferred])  # a gang needs as many of its type
        name = f"job-{number}-{size}-{'d2' if d2 else preferred}"
        jobs.append(JobSpec(name, submit, conf.workload.name, size, steps, conf.workload.batch_size, d2, preferred))
        submit += draw.expovariate(1.0 / conf.mean_gap_s) if conf.mean_gap_s else 0.0
    return jobs
