"""Schemas of `accuracy_consistency`: every key that may be set, with its type.

Hydra checks a configuration against these dataclasses, so a misspelt key fails at once with its name. What the numbers
mean together (ESTs that must add up, known levels) is checked by :func:`check`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional  # noqa: UP035  OmegaConf reads these at run time

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from lightning_easyscale.devices import detect
from lightning_easyscale.planning import plan

LEVELS = ("d0", "d1", "d0+d2", "d1+d2")
GPU = "gpu"


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key and the cure."""


@dataclass
class StageConf:
    """One span of steps under one placement.

    Args:
        devices: device type -> how many of it, in executor order; ``gpu`` is the type of this machine's first GPU.
        steps: optimizer steps of this stage.
        ests_per_device: device type -> ESTs on each device of it; default: what the planner finds from `step_seconds`.
        step_seconds: device type -> seconds of one EST's step, for this stage; default: the schedule's.
        hosts: the same devices in the same order, host by host, when they are spread over several.
    """

    devices: Dict[str, int] = MISSING  # noqa: UP006
    steps: int = MISSING
    ests_per_device: Optional[Dict[str, int]] = None  # noqa: UP006, UP045
    step_seconds: Optional[Dict[str, float]] = None  # noqa: UP006, UP045
    hosts: Optional[List[Dict[str, int]]] = None  # noqa: UP006, UP045


@dataclass
class ScheduleConf:
    """N and the stages.

    Args:
        num_ests: N.
        stages: one after another.
        step_seconds: device type -> seconds of one EST's step, from which the planner splits the ESTs of stages that
            do not say how; default: all types are equally fast, which gives an even split.
        max_ests: device type -> ESTs that fit into its memory, for the planner.
    """

    num_ests: int = MISSING
    stages: List[StageConf] = MISSING  # noqa: UP006
    step_seconds: Dict[str, float] = field(default_factory=dict)  # noqa: UP006
    max_ests: Dict[str, int] = field(default_factory=dict)  # noqa: UP006


@dataclass
class WorkloadConf:
    """Model, data and optimizer.

    Args:
        name: what figures and reports call it.
        model: one of `recipes.workloads.TASKS`.
        source: whose model: ``builtin``, ``pytorchcv``, ``torchvision`` or ``transformers``; the sources start from
            different weights for one seed.
        net: arguments of the network; which there are depends on the model.
        data: ``small`` (real, brought by a package), ``synthetic``, or ``full`` (your own copy).
        path: the folder of your own copy.
        image_size: pixels along an edge.
        channels: 1 or 3.
        length: word pieces of a sample.
        classes: of synthetic data.
        samples: of an epoch, where the data is made up.
        batch_size: samples per EST and micro-batch.
        validation_batch_size: samples per EST and validation batch; default: the workload's own.
        workers: loader processes per EST.
        persistent_workers: whether they live from epoch to epoch.
        lr: learning rate.
        learn_steps: optimizer steps of `recipes.learn`.
    """

    name: str = MISSING
    model: str = MISSING
    source: str = "builtin"
    net: Dict[str, Any] = field(default_factory=dict)  # noqa: UP006
    data: str = "small"
    path: Optional[str] = None  # noqa: UP045
    image_size: int = 28
    channels: int = 3
    length: int = 96
    classes: int = 10
    samples: int = 1000
    batch_size: int = 16
    validation_batch_size: Optional[int] = None  # noqa: UP045
    workers: int = 0
    persistent_workers: bool = False
    lr: float = 0.02
    learn_steps: int = 200


@dataclass
class DeterminismConf:
    """Levels to run, of ``d0``, ``d1``, ``d0+d2``, ``d1+d2``."""

    levels: List[str] = MISSING  # noqa: UP006


@dataclass
class TrainerConf:
    """Arguments of the Trainer; ``max_steps`` ends the schedule early."""

    max_steps: Optional[int] = None  # noqa: UP045
    val_check_interval: Optional[int] = None  # noqa: UP045
    accumulate_grad_batches: int = 1
    gradient_clip_val: Optional[float] = None  # noqa: UP045
    precision: str = "32-true"


@dataclass
class AccuracyConsistencyConf:
    """The whole configuration.

    Args:
        workload: group.
        schedule: group.
        determinism: group.
        trainer: group.
        experiment: group; sets others, holds nothing.
        seed: of ``seed_everything`` in every run.
        emulate: whether device types are emulated on the CPU.
        pool: device types that the job may ever use, for D2; default: those of the stages. With a GPU in it, which need
            not be here, D2 has the policy ``portable``.
        threads_per_est: CPU threads of an EST and of a reference worker; default ``max(1, cpu_count // num_ests)``.
        reduction: order of gradient reduction, ``auto``, ``ddp`` or ``tree``; with GPUs ``auto`` is ``ddp``.
        process_group_backend: of reference and executors; default: gloo.
        plot_only: draw figure and table again from what is in ``hydra.run.dir``.
        force: run again what is there already.
        jobs: configurations that are run at a time.
        timeout_s: longest time one run may take, in seconds.
    """

    workload: WorkloadConf = field(default_factory=WorkloadConf)
    schedule: ScheduleConf = field(default_factory=ScheduleConf)
    determinism: DeterminismConf = field(default_factory=DeterminismConf)
    trainer: TrainerConf = field(default_factory=TrainerConf)
    experiment: Optional[str] = None  # noqa: UP045
    seed: int = 1
    emulate: bool = True
    pool: Optional[List[str]] = None  # noqa: UP006, UP045
    threads_per_est: Optional[int] = None  # noqa: UP045
    reduction: str = "auto"
    process_group_backend: Optional[str] = None  # noqa: UP045
    plot_only: bool = False
    force: bool = False
    jobs: int = 2
    timeout_s: float = 1800.0


def register() -> None:
    """Make the schema known to Hydra."""
    ConfigStore.instance().store(name="accuracy_consistency_schema", node=AccuracyConsistencyConf)


@dataclass(frozen=True)
class Stage:
    """A checked stage.

    Args:
        index: 0, 1, ...
        devices: device type -> count, in executor order.
        ests_per_executor: ESTs of each device in that order.
        first_step: optimizer steps done before the stage.
        end_step: and after it.
        hosts: the devices of each host, if there are several.
    """

    index: int
    devices: dict[str, int]
    ests_per_executor: tuple[int, ...]
    first_step: int
    end_step: int
    hosts: tuple[dict[str, int], ...] = ()

    @property
    def key(self) -> str:
        """``stage_0``."""
        return f"stage_{self.index}"

    @property
    def label(self) -> str:
        """``1 v100 + 2 p100``."""
        return " + ".join(f"{count} {name}" for name, count in self.devices.items())


def name_gpu(conf: AccuracyConsistencyConf) -> None:
    """Replace ``gpu`` in the schedule by the type of this machine's first GPU.

    Raises:
        ConfigError: if there is none.
    """
    schedule = conf.schedule
    stages = [counts for s in schedule.stages for counts in (s.devices, s.ests_per_device, s.step_seconds)]
    hosts = [counts for stage in schedule.stages for counts in stage.hosts or ()]
    for counts in (*stages, *hosts, schedule.step_seconds, schedule.max_ests):
        if counts is not None and GPU in counts:
            first = detect()[0]
            if first.kind != "cuda":
                raise ConfigError(f"The schedule has a `{GPU}`, and this machine has none. HINT: choose another.")
            plain: dict[str, Any] = {first.name if name == GPU else name: value for name, value in counts.items()}
            counts.clear()
            counts.update(plain)


def check(conf: AccuracyConsistencyConf) -> list[Stage]:
    """The stages of a configuration.

    Raises:
        ConfigError: for an unknown level or stages that cannot be run.
    """
    for level in conf.determinism.levels:
        if level not in LEVELS:
            raise ConfigError(f"`determinism.levels` has {level!r}. HINT: the levels are {', '.join(LEVELS)}.")
    if conf.jobs < 1:
        raise ConfigError(f"`jobs={conf.jobs}` runs nothing. HINT: give at least 1.")
    if not conf.determinism.levels or not conf.schedule.stages:
        raise ConfigError("`determinism.levels` and `schedule.stages` must name at least one each.")
    stages: list[Stage] = []
    done = 0
    for index, stage in enumerate(conf.schedule.stages):
        if stage.steps < 1:
            raise ConfigError(f"`schedule.stages[{index}].steps={stage.steps}` trains nothing. HINT: give at least 1.")
        ests = _ests_per_executor(stage, index, conf.schedule)
        end = done + stage.steps
        if conf.trainer.max_steps is not None:
            end = min(end, conf.trainer.max_steps)
        if end > done:
            stages.append(Stage(index, dict(stage.devices), ests, done, end, _hosts(stage, index)))
        done = end
    outside = {name for stage in stages for name in stage.devices}.difference(conf.pool or ()) if conf.pool else ()
    if outside:
        raise ConfigError(f"`pool={conf.pool}` lacks {sorted(outside)[0]!r} of the stages. HINT: a pool never grows.")
    if conf.trainer.max_steps is not None and done < conf.trainer.max_steps:
        raise ConfigError(
            f"`trainer.max_steps={conf.trainer.max_steps}` goes past the schedule's {done} steps."
            " HINT: raise `schedule.stages[...].steps`."
        )
    if not stages:
        raise ConfigError(f"`trainer.max_steps={conf.trainer.max_steps}` trains nothing. HINT: give at least 1.")
    return stages


def _ests_per_executor(stage: StageConf, index: int, schedule: ScheduleConf) -> tuple[int, ...]:
    where, num_ests = f"schedule.stages[{index}]", schedule.num_ests
    bad = {name: count for name, count in stage.devices.items() if count < 1}
    if bad or not stage.devices:
        raise ConfigError(f"`{where}.devices={dict(stage.devices)}` must give every type a count of at least 1.")
    if stage.ests_per_device is None:
        seconds = stage.step_seconds or schedule.step_seconds or dict.fromkeys(stage.devices, 1.0)
        try:
            limits = schedule.max_ests
            return plan(num_ests, stage.devices, seconds, max_ests=limits, use_every_device=True).ests_per_device
        except ValueError as error:
            raise ConfigError(f"`{where}`: {error}") from error
    if set(stage.ests_per_device) != set(stage.devices):
        raise ConfigError(
            f"`{where}.ests_per_device` names {sorted(stage.ests_per_device)} and `devices` {sorted(stage.devices)}."
            " HINT: give one number for every type, or leave it out and let the planner split the ESTs."
        )
    ests = tuple(stage.ests_per_device[name] for name, count in stage.devices.items() for _ in range(count))
    if min(ests) < 1 or sum(ests) != num_ests:
        raise ConfigError(
            f"`{where}`: ESTs per device {list(ests)} add up to {sum(ests)}, but `schedule.num_ests={num_ests}`."
            " HINT: every device needs at least one EST, and together they hold all of them."
        )
    return ests


def _hosts(stage: StageConf, index: int) -> tuple[dict[str, int], ...]:
    if not stage.hosts:
        return ()
    spread = [name for host in stage.hosts for name, count in host.items() for _ in range(count)]
    if spread != [name for name, count in stage.devices.items() for _ in range(count)]:
        raise ConfigError(
            f"`schedule.stages[{index}].hosts={[dict(host) for host in stage.hosts]}` does not spread"
            f" `devices={dict(stage.devices)}`. HINT: list every device on exactly one host, in the same order."
        )
    return tuple(dict(host) for host in stage.hosts)
