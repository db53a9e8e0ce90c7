"""Which configurations a profile needs, one measured run for each, and what follows from all of them."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from lightning_easyscale import devices
from lightning_easyscale.planning import (
    AffineStepTime,
    Configuration,
    Exchange,
    LinkFit,
    Measurement,
    Profile,
    TypePlanner,
    fit_link,
    plan,
)
from lightning_easyscale.planning.step_time import to_ns

from ._profile_config import LEVELS, ProfileConf, counts, read_pace
from ._runs import RunFailedError
from ._stage import RunSpec
from ._stage_callbacks import read_report
from ._warm import WarmProcesses

BYTES_PER_PARAMETER = 4.0


@dataclass(frozen=True)
class Wanted:
    """A configuration to measure.

    Args:
        workload: fields of `WorkloadConf`.
        level: ``d1`` or ``d1+d2``.
        devices: type of each device, in device order.
        ests_per_device: ESTs of each.
    """

    workload: Mapping[str, Any]
    level: str
    devices: tuple[str, ...]
    ests_per_device: tuple[int, ...]

    @property
    def key(self) -> tuple[str, str, int, tuple[str, ...], tuple[int, ...]]:
        """As `Configuration.key`."""
        kernels = LEVELS[self.level]
        return self.workload["name"], kernels, self.workload["batch_size"], self.devices, self.ests_per_device

    @property
    def text(self) -> str:
        """For people."""
        split = " + ".join(f"{a} on {name}" for a, name in zip(self.ests_per_device, self.devices, strict=True))
        return f"{self.workload['name']}, batch {self.workload['batch_size']}, {self.level}: {split}"


def single_devices(conf: ProfileConf, workload: Mapping[str, Any]) -> Iterator[Wanted]:
    """Every job size alone on one device of each type: what the planner's speeds are fitted to."""
    for level, name, size in product(conf.levels, counts(conf), conf.num_ests):
        yield Wanted(workload, level, (name,), (size,))


def planned(conf: ProfileConf, workload: Mapping[str, Any], profile: Profile) -> Iterator[Wanted]:
    """Every configuration of more devices that the planner generates, by the speeds in `profile`."""
    cluster = counts(conf)
    for level, size in product(conf.levels, conf.num_ests):
        kernels, batch = LEVELS[level], workload["batch_size"]
        seconds = {t: profile.seconds(workload["name"], t, kernels, batch) for t in cluster}
        fixed = {t: profile.fixed_seconds(workload["name"], t, kernels, batch) for t in seconds}
        planner = TypePlanner(size, [AffineStepTime(to_ns(seconds[t]), 0, to_ns(fixed[t])) for t in cluster])
        for held in product(*(range(min(n, size) + 1) for n in cluster.values())):
            mixed = sum(1 for n in held if n) > 1
            if sum(held) < 2 or sum(held) > size or (mixed and level == "d1"):
                continue
            if planner.trimmed(held) != held:
                continue  # one of these devices would bring nothing
            names = tuple(t for t, n in zip(cluster, held, strict=True) for _ in range(n))
            found = plan(size, names, seconds, use_every_device=True)
            yield Wanted(workload, level, names, found.ests_per_device)


class Measurer:
    """Runs configurations, each in processes of its own, forked from one warm process per instruction set.

    Args:
        conf: the configuration.
        directory: for records, checkpoints and logs.
        data: file of the data.
    """

    def __init__(self, conf: ProfileConf, directory: Path, data: Path) -> None:
        self.conf, self.directory, self.data = conf, directory, data
        self._warm: dict[frozenset[tuple[str, str]], WarmProcesses] = {}
        self._count = 0

    def __enter__(self) -> Measurer:
        return self

    def __exit__(self, *_: Any) -> None:
        for warm in self._warm.values():
            warm.close()

    def warm(self, level: str, device_type: str) -> WarmProcesses:
        """The warm process for jobs of a level on a type."""
        conf = self.conf
        if level.endswith("d2"):
            variables = devices.pinned_environment(tuple(counts(self.conf)), emulate=conf.emulate)
        else:
            variables = devices.environment_of(device_type, emulate=conf.emulate)
        key = frozenset(variables.items())
        if key not in self._warm:
            self._warm[key] = WarmProcesses(devices.apply_environment(variables), threads=conf.threads_per_est)
        return self._warm[key]

    def measure(self, wanted: Wanted) -> Configuration:
        """One run; medians over its timed steps.

        Raises:
            RunFailedError: if it fails.
        """
        conf = self.conf
        self._count += 1
        home = self.directory / "runs" / str(self._count)
        shutil.rmtree(home, ignore_errors=True)  # reports of an interrupted profile would be taken for this run's
        last = conf.warmup + conf.steps
        pace = tuple(read_pace(conf.pace).get(name, 0.0) for name in wanted.devices)
        spec = RunSpec(
            kind="easyscale",
            name=wanted.text,
            level=wanted.level,
            num_ests=sum(wanted.ests_per_device),
            devices=",".join(f"{name}:{n}" for name, n in Counter(wanted.devices).items()),
            ests_per_executor=wanted.ests_per_device,
            pool=tuple(counts(conf)),
            emulate=conf.emulate,
            threads=conf.threads_per_est,
            seed=conf.seed,
            first_step=0,
            end_step=last,
            digest_at=(),
            record=str(home / "record"),
            save=str(home / "end.ckpt"),
            resume=None,
            data=str(self.data),
            workload=dict(wanted.workload),
            trainer={"limit_val_batches": 0},
            pace=((0, pace),) if any(pace) else (),
            report=str(home / "steps"),
        )
        self.warm(wanted.level, wanted.devices[0]).start(spec, home / "log").wait(conf.timeout_s)
        reports = [read_report(home / "steps", i) for i in range(len(wanted.devices))]
        if any(len(lines) != last + 1 for lines in reports):
            raise RunFailedError(f"{wanted.text}: {[len(lines) for lines in reports]} reports of {last} steps.")
        Path(spec.save).unlink()
        timed = [list(zip(lines[conf.warmup :], lines[conf.warmup + 1 : -1], strict=False)) for lines in reports]
        seconds = median(b[1] - a[1] for a, b in timed[0])
        busy = [median(b[1] - a[1] - (b[2] - a[2]) for a, b in pairs) for pairs in timed]
        return Configuration(*wanted.key, seconds=seconds, busy_seconds=tuple(busy))


def concluded(profile: Profile, gradient_bytes: Mapping[str, float]) -> Profile:
    """The profile with what follows from what was measured: speeds per type, and the link."""
    fit = fit_exchange(profile.exchanges)
    communication = None if fit is None else {**asdict(fit.link), **asdict(fit)}
    if communication is not None:
        del communication["link"]
    return replace(
        profile,
        measurements=fit_speeds(profile.configurations),
        gradient_bytes=dict(gradient_bytes),
        communication=communication,
    )


def fit_speeds(configurations: Sequence[Configuration]) -> tuple[Measurement, ...]:
    """Seconds per EST and per step for each workload, type, kernels and batch size: busy time = fixed + ESTs * seconds.

    By least squares of the relative error over all devices that were measured.
    """
    points: dict[tuple[str, str, str, int], list[tuple[int, float]]] = {}
    for c in configurations:
        for name, ests, busy in zip(c.devices, c.ests_per_device, c.busy_seconds, strict=True):
            points.setdefault((c.workload, name, c.kernels, c.batch_size), []).append((ests, busy))
    rows = []
    for (workload, name, kernels, batch), seen in points.items():
        weights = [1.0 / t**2 for _, t in seen]
        total = sum(weights)
        mean_a = sum(w * a for w, (a, _) in zip(weights, seen, strict=True)) / total
        mean_t = sum(w * t for w, (_, t) in zip(weights, seen, strict=True)) / total
        spread = sum(w * (a - mean_a) ** 2 for w, (a, _) in zip(weights, seen, strict=True))
        slope = sum(w * (a - mean_a) * (t - mean_t) for w, (a, t) in zip(weights, seen, strict=True))
        slope = slope / spread if spread else 0.0
        fixed = mean_t - slope * mean_a
        if slope <= 0 or fixed < 0:  # one size only, or noise: proportional
            slope, fixed = (
                sum(w * a * t for w, (a, t) in zip(weights, seen, strict=True))
                / sum(w * a * a for w, (a, _) in zip(weights, seen, strict=True)),
                0.0,
            )
        rows.append(Measurement(workload, name, kernels, batch, slope, fixed))
    return tuple(rows)


def fit_exchange(exchanges: Sequence[Exchange]) -> LinkFit | None:
    """The link that explains the exchanges best; None with too little to fit."""
    points = [(e.num_bytes, e.executors, e.seconds) for e in exchanges]
    return fit_link(points) if len({b for b, *_ in points}) > 1 else None


def prediction_errors(profile: Profile) -> list[float]:
    """Relative error of the models' step time (slowest device plus exchange) for every configuration."""
    errors = []
    for c in profile.configurations:
        compute = max(
            profile.fixed_seconds(c.workload, name, c.kernels, c.batch_size)
            + ests * profile.seconds(c.workload, name, c.kernels, c.batch_size)
            for name, ests in zip(c.devices, c.ests_per_device, strict=True)
        )
        link = profile.link
        if link is not None:
            compute += link.ring_seconds(profile.gradient_bytes[c.workload], len(c.devices))
        errors.append(compute / c.seconds - 1.0)
    return errors
