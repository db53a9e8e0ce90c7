"""Measure how fast jobs are on the devices at hand, under every configuration that the planner generates for them.

First every job size alone on one device of each type, from which speeds per EST follow; then all combinations of
devices of which none is idle weight, with the planner's split of ESTs; then exchanges of several sizes between devices
that do nothing else, to which a link (latency and bandwidth) is fitted. Each run has processes of its own. The result
is one JSON, written after every run: an interrupted profile goes on where it was, and other workloads add to it.
`recipes.simulate profile.path=FILE` replays it.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_easyscale.devices import apply_environment, device_type
from lightning_easyscale.planning import Profile

from ._config import ConfigError
from ._console import errors_as_lines, make_console
from ._exchange import measure_exchanges
from ._profile_config import ProfileConf, check, read_pace, register
from ._profile_runs import (
    BYTES_PER_PARAMETER,
    Measurer,
    Wanted,
    concluded,
    planned,
    prediction_errors,
    single_devices,
)
from ._runs import RunFailedError
from .workloads import build, prepare

register()


def measure(conf: ProfileConf, directory: Path, console: Console) -> Profile:
    """Measure what the profile's file lacks; returns the profile.

    Raises:
        ConfigError: if the file was measured under other conditions.
    """
    file = Path(conf.file)
    profile = _begin(conf, file)
    sizes = dict(profile.gradient_bytes)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Measurer(conf, directory, prepare(vars(conf.workload), directory / "data")) as measurer,
        Progress(*columns, console=console) as bars,
    ):

        def run(title: str, wanted: Iterable[Wanted]) -> None:
            nonlocal profile
            there = {c.key for c in profile.configurations}
            missing = [w for w in wanted if w.key not in there]
            for one in bars.track(missing, description=f"{title:16}"):
                sizes[one.workload["name"]] = _gradient_bytes(one)
                profile = replace(profile, configurations=(*profile.configurations, measurer.measure(one)))
                profile.save(file)
            profile = concluded(profile, sizes)

        workloads = [
            {**vars(conf.workload), "batch_size": size} for size in conf.batch_sizes or [conf.workload.batch_size]
        ]
        run("single devices", [w for one in workloads for w in single_devices(conf, one)])
        run("planned", [w for one in workloads for w in planned(conf, one, profile)])
    wanted = conf.exchange
    if wanted.bytes and wanted.executors and not profile.exchanges:
        kind = device_type(wanted.device_type, emulate=conf.emulate)
        found = measure_exchanges(
            wanted.bytes,
            wanted.executors,
            rounds=wanted.rounds,
            kind=kind.kind,
            environment=apply_environment(kind.environment),
            directory=directory / "exchange",
            timeout_s=conf.timeout_s,
        )
        profile = concluded(replace(profile, exchanges=tuple(found)), sizes)
    profile.save(file)
    return profile


def _begin(conf: ProfileConf, file: Path) -> Profile:
    conditions: dict[str, Any] = {
        "emulate": conf.emulate,
        "pace": read_pace(conf.pace),
        "threads_per_est": conf.threads_per_est,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    if not file.exists():
        source = "recipes.profile: medians of steps timed on this machine"
        return Profile(name=file.stem, source=source, measurements=(), conditions=conditions)
    profile = Profile.load(file)
    if other := [k for k, v in conditions.items() if profile.conditions.get(k) != v]:
        name = other[0]
        raise ConfigError(
            f"`file={file}` was measured with {name}={profile.conditions.get(name)}, not {conditions[name]}."
            " HINT: give another `file`, or the same settings."
        )
    return profile


def _gradient_bytes(wanted: Wanted) -> float:
    module, _ = build({**wanted.workload, "data": "synthetic", "path": None}, "")
    return BYTES_PER_PARAMETER * sum(p.numel() for p in module.parameters())


def table(profile: Profile) -> Table:
    """Speeds per workload, kernels and type."""
    out = Table()
    for name in ("workload", "kernels", "type", "batch", "ms per EST", "ms per step besides"):
        out.add_column(name, justify="left" if name in ("workload", "kernels", "type") else "right")
    for m in profile.measurements:
        times = (f"{1000 * m.seconds:.2f}", f"{1000 * m.fixed_seconds:.2f}")
        out.add_row(m.workload, m.kernels, m.device_type, str(m.batch_size), *times)
    return out


@hydra.main(version_base="1.3", config_path="../conf", config_name="profile")
def main(config: DictConfig) -> None:
    """Command line."""
    console = make_console()
    conf = OmegaConf.to_object(config)
    assert isinstance(conf, ProfileConf)
    directory = Path(HydraConfig.get().runtime.output_dir).resolve()
    with errors_as_lines(console, RunFailedError, resume=f"file={conf.file}"):
        check(conf)
        profile = measure(conf, directory, console)
    console.print(table(profile))
    errors = [abs(e) for e in prediction_errors(profile)]
    console.print(
        f"{len(errors)} configurations; model against measured step time: mean error {mean(errors):.1%},"
        f" largest {max(errors):.1%}"
    )
    if profile.communication is not None:
        c = profile.communication
        console.print(
            f"exchange: {1e3 * c['latency_s']:.3f} ms + bytes / {c['bytes_per_s'] / 1e6:.0f} MB/s; mean error"
            f" {c['mean_relative_error']:.1%}, largest {c['max_relative_error']:.1%} of {c['points']:.0f} exchanges"
        )
    console.print(f"profile: {conf.file}")


if __name__ == "__main__":
    main()
