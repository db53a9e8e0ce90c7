"""Fig. 10: k workers on one device, as ESTs, as processes, and as accumulated batches.

``python -m recipes.gpu_sharing`` measures, for every workload and k,

- ``easyscale``: k ESTs; ``easyscale_alone``: the same with ``overlap_backward=False``; ``easyscale_overlap``: with
  ``True``; ``easyscale_inputs``: with ``input_offload="host"``; ``easyscale_host``: with ``gradient_offload="host"``
  (`tree` order), which includes it; ``easyscale_host_alone``: with that and ``overlap_backward=False``;
- ``packing``: k stock DDP processes on the device, over gloo: NCCL refuses to share a device;
- ``accumulate``: stock Lightning with ``accumulate_grad_batches=k`` in one process: the work without ESTs.

The kinds take turns block by block, each in processes of its own. A cell's memory is read when it has warmed up, while
the other kinds wait with an emptied cache: ``allocated`` and ``reserved`` are the allocators' peaks, ``device`` is what
the device itself says that the processes hold, CUDA contexts included. Then, block by block, ``seconds`` per mini-batch
and worker: a block's time over its mini-batches. One batch is made once and used again and again, so that loading data
costs nothing. A cell that runs out of memory says so, and larger k of its kind are not tried.

Each finished k is kept in ``gpu_sharing.json`` in ``hydra.run.dir`` at once: the same command with the same directory
goes on where a time limit, or ``seconds``, has ended it. ``gpu_sharing.csv`` and ``gpu_sharing.png`` lie beside.
"""

from __future__ import annotations

import csv
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, List, Optional  # noqa: UP035  OmegaConf reads these at run time

import hydra
import torch
from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_easyscale import determinism

from ._bench_runs import SideFailedError, bench_processes, interleave
from ._bench_worker import Side
from ._config import ConfigError
from ._console import errors_as_lines, make_console
from ._machine import device_name
from ._runs import RunFailedError
from ._sharing_figure import draw
from ._warm import WarmProcesses
from .est_overhead import PUBLISHED_MS

SETTINGS = {"resnet50": (32, "32-true"), "shufflenetv2": (512, "32-true"), "bert": (8, "bf16-mixed")}
"""Workload -> batch size and precision at ``size=full``; the first two are the paper's. Others have their own."""

KINDS = (
    *("packing", "accumulate", "easyscale", "easyscale_alone", "easyscale_overlap"),
    *("easyscale_inputs", "easyscale_host", "easyscale_host_alone"),
)
_MEMORY = ("device_mib", "allocated_mib", "reserved_mib")


@dataclass
class GpuSharingConf:
    """The whole configuration.

    Args:
        workloads: of the eight.
        kinds: what to compare.
        ks: workers on the device.
        size: ``full`` for the published shapes, or ``small``.
        overrides: further ones of every workload, as on the command line: ``workload.batch_size=2``.
        blocks: timed blocks of each kind.
        mini_batches: of a block, over all workers; at least k are run.
        warmup: optimizer steps before the first block; in the first five ESTs find out when to overlap.
        accelerator: ``auto``, ``cpu`` or ``gpu``.
        threads: CPU threads per process; default: all.
        seconds: do not begin another k when it would not end within so many seconds, judging by the last; default: all.
        timeout_s: longest time that a k of a workload may take, in seconds.
        plot_only: draw again what is in ``hydra.run.dir``.
    """

    workloads: List[str] = field(default_factory=lambda: list(SETTINGS))  # noqa: UP006
    kinds: List[str] = field(default_factory=lambda: list(KINDS))  # noqa: UP006
    ks: List[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])  # noqa: UP006
    size: str = "full"
    overrides: List[str] = field(default_factory=list)  # noqa: UP006
    blocks: int = 5
    mini_batches: int = 16
    warmup: int = 6
    accelerator: str = "auto"
    threads: Optional[int] = None  # noqa: UP045
    seconds: Optional[float] = None  # noqa: UP045
    timeout_s: float = 600.0
    plot_only: bool = False


ConfigStore.instance().store(name="gpu_sharing_schema", node=GpuSharingConf)


def check(conf: GpuSharingConf) -> None:
    """Refuse what cannot be measured.

    Raises:
        ConfigError: naming the key and the cure.
    """
    for key, given, known in (("workloads", conf.workloads, PUBLISHED_MS), ("kinds", conf.kinds, KINDS)):
        if unknown := set(given) - set(known):
            raise ConfigError(f"`{key}` has {sorted(unknown)[0]!r}. HINT: there are {', '.join(known)}.")
    if not conf.ks or min(conf.ks) < 1:
        raise ConfigError(f"`ks={list(conf.ks)}` must be numbers of workers. HINT: ks=[1,2,4].")
    if conf.size not in ("small", "full"):
        raise ConfigError(f"`size={conf.size}` is unknown. HINT: use 'small' or 'full'.")
    if min(conf.blocks, conf.mini_batches, conf.warmup) < 1:
        raise ConfigError("`blocks`, `mini_batches` and `warmup` are at least 1 each.")


class Sharing:
    """Measures the cells of a configuration that are not there yet.

    Args:
        conf: the configuration.
        directory: of the results.
        warm: starts processes.
    """

    def __init__(self, conf: GpuSharingConf, directory: Path, warm: WarmProcesses) -> None:
        self.conf, self.directory, self.warm = conf, directory, warm
        self.gpu = conf.accelerator == "gpu" or (conf.accelerator == "auto" and torch.cuda.is_available())
        self._workloads = {name: self._workload(name) for name in conf.workloads}
        file = directory / "gpu_sharing.json"
        self.cells: list[dict[str, Any]] = json.loads(file.read_text())["cells"] if file.exists() else []

    def groups(self) -> Iterator[tuple[str, int, list[str]]]:
        """Workload, k and the kinds still to be measured, small k first."""
        for name in self.conf.workloads:
            for k in sorted(set(self.conf.ks)):
                if missing := [kind for kind in self.conf.kinds if not self._kept(name, kind, k)]:
                    yield name, k, missing

    def measure(self, name: str, k: int, kinds: list[str]) -> list[dict[str, Any]]:
        """Measure some kinds of a workload at one k, and keep the cells."""
        hopeless = [kind for kind in kinds if self._ran_out_below(name, kind, k)]
        results: dict[str, dict[str, Any]] = {kind: {"out_of_memory": True, "tried": False} for kind in hopeless}
        together = {kind: self._side(name, k, kind) for kind in kinds if kind not in hopeless}
        alone: dict[str, Side] = {}
        while together or alone:
            apart = not together
            sides = together or dict([alone.popitem()])
            try:
                blocks = interleave(sides, self.warm, timeout_s=self.conf.timeout_s, device_memory=True)
            except SideFailedError as error:
                if not error.out_of_memory:
                    raise
                side = sides.pop(error.side)
                if error.warmed_up and not apart:
                    # It fits, but not beside the others.
                    alone[error.side] = side
                else:
                    results[error.side] = {"out_of_memory": True, "tried": True}
                continue
            results |= {kind: _cell(entries, k, apart) for kind, entries in blocks.items()}
            together = {}
        cells = [{**self._key(name, kind, k), **results[kind]} for kind in kinds]
        self.cells += cells
        write(self.report(), self.directory)
        return cells

    def report(self) -> dict[str, Any]:
        """The content of ``gpu_sharing.json``."""
        order = {name: i for i, name in enumerate(dict.fromkeys([*SETTINGS, *PUBLISHED_MS]))}
        return {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": device_name(self.gpu),
            "torch": torch.__version__,
            "config": vars(self.conf),
            "cells": sorted(self.cells, key=lambda c: (order[c["workload"]], KINDS.index(c["kind"]), c["k"])),
        }

    def _workload(self, name: str) -> dict[str, Any]:
        from . import learn  # noqa: F401  registers the schema that is composed

        overrides = [f"workload={name}", *self.conf.overrides]
        if self.conf.size == "full":
            batch = [f"workload.batch_size={SETTINGS[name][0]}"] if name in SETTINGS else []
            overrides = [f"workload={name}_full", *batch, *self.conf.overrides]
        composed: Any = OmegaConf.to_container(compose("learn", overrides=overrides).workload, resolve=True)
        return dict(composed)

    def _key(self, name: str, kind: str, k: int) -> dict[str, Any]:
        """What tells cells apart; a cell is used again only where all of it is equal."""
        conf, workload = self.conf, self._workloads[name]
        return {
            "workload": name,
            "kind": kind,
            "k": k,
            "batch_size": workload["batch_size"],
            "precision": self._precision(name),
            "size": conf.size,
            "overrides": list(conf.overrides),
            "mini_batches": conf.mini_batches,
            "measured_blocks": conf.blocks,
            "warmup": conf.warmup,
            "threads": self._threads,
            "machine": device_name(self.gpu),
            "torch": torch.__version__,
        }

    @staticmethod
    def _precision(name: str) -> str:
        return SETTINGS[name][1] if name in SETTINGS else "32-true"

    @property
    def _threads(self) -> int:
        return self.conf.threads or determinism.default_threads(1)

    def _kept(self, name: str, kind: str, k: int) -> bool:
        key = self._key(name, kind, k)
        return any({field: cell[field] for field in key} == key for cell in self.cells)

    def _ran_out_below(self, name: str, kind: str, k: int) -> bool:
        return any(
            c["out_of_memory"]
            and c["k"] < k
            and all(c[f] == value for f, value in self._key(name, kind, c["k"]).items())
            for c in self.cells
        )

    def _side(self, name: str, k: int, kind: str) -> Side:
        workload = self._workloads[name]
        host = kind.startswith("easyscale_host")
        return Side(
            kind=kind.partition("_")[0],
            model=name,
            workers=k,
            executors=1,
            image_size=workload["image_size"],
            batch_size=workload["batch_size"],
            steps=max(1, self.conf.mini_batches // k),
            blocks=self.conf.blocks + 1,
            warmup=self.conf.warmup,
            accelerator="gpu" if self.gpu else "cpu",
            threads=self._threads,
            reduction="tree" if host else "auto",
            directory=str(self.directory / "sides" / f"{name}_{k}_{kind}"),
            workload=workload,
            precision=self._precision(name),
            offload="host" if host else None,
            input_offload="host" if kind == "easyscale_inputs" else None,
            overlaps={"alone": False, "overlap": True}.get(kind.rpartition("_")[2], "auto"),
            repeats=True,
            releases=True,
        )


def _cell(entries: list[dict[str, Any]], k: int, apart: bool) -> dict[str, Any]:
    # The first block fills the allocator's cache again.
    memory, _, *blocks = entries
    seconds = [entry["seconds"] / k for entry in blocks]
    mib = {key: round(value / 2**20, 1) for key, value in memory.items()}
    return {
        "out_of_memory": False,
        "alone": apart,
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "seconds": seconds,
        "device_mib": mib["device"],
        "allocated_mib": mib.get("allocated"),
        "reserved_mib": mib.get("reserved"),
    }


def write(report: dict[str, Any], directory: Path) -> None:
    """``gpu_sharing.json``, in one move, and ``gpu_sharing.csv``."""
    temporary = directory / "gpu_sharing.tmp"
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(directory / "gpu_sharing.json")
    columns = ("workload", "kind", "k", "batch_size", "precision", "out_of_memory", "alone", "median", "min", "max")
    with (directory / "gpu_sharing.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, (*columns, *_MEMORY), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(report["cells"])


def lines(report: dict[str, Any], name: str, k: int) -> Iterator[str]:
    """What was found for a workload and k, with ratios to accumulation and to EasyScale with the least k."""
    cells = {cell["kind"]: cell for cell in report["cells"] if (cell["workload"], cell["k"]) == (name, k)}
    first = next((c for c in report["cells"] if (c["workload"], c["kind"]) == (name, "easyscale")), {})
    for kind, cell in cells.items():
        if cell["out_of_memory"]:
            yield f"{name} k={k} {kind}: out of memory"
            continue
        ratio, held = "", cell["device_mib"] / first["device_mib"] if "device_mib" in first else 0.0
        if "seconds" in (other := cells.get("accumulate", {})):
            ratios = [a / b for a, b in zip(cell["seconds"], other["seconds"], strict=True)]
            ratio = f", {statistics.median(ratios):.3f} of accumulation ({min(ratios):.3f} .. {max(ratios):.3f})"
        yield (
            f"{name} k={k} {kind}: {1e3 * cell['median']:.2f} ms per mini-batch{ratio};"
            f" device {cell['device_mib']:.0f} MiB ({held:.2f} of {first.get('k')} EST)"
            + (f", allocated {cell['allocated_mib']:.0f}" if cell["allocated_mib"] else "")
        )


def measure(conf: GpuSharingConf, directory: Path, console: Console) -> None:
    """Measure what is missing, until all is there or the time is up."""
    began, last = time.monotonic(), 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with bench_processes() as warm, Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        sharing = Sharing(conf, directory, warm)
        groups = list(sharing.groups())
        task = bar.add_task("", total=len(groups))
        for done, (name, k, kinds) in enumerate(groups):
            start = time.monotonic()
            if conf.seconds is not None and done and start - began + last > conf.seconds:
                console.print(f"{len(groups) - done} of {len(groups)} are left; the same command goes on with them.")
                return
            bar.update(task, description=f"{name} k={k}")
            sharing.measure(name, k, kinds)
            last = time.monotonic() - start
            bar.advance(task)
            for line in lines(sharing.report(), name, k):
                console.print(line, markup=False, highlight=False, soft_wrap=True)


@hydra.main(version_base="1.3", config_path="../conf", config_name="gpu_sharing")
def main(config: DictConfig) -> None:
    """Command line."""
    console = make_console()
    conf = OmegaConf.to_object(config)
    assert isinstance(conf, GpuSharingConf)
    directory = Path(HydraConfig.get().runtime.output_dir).resolve()
    file = directory / "gpu_sharing.json"
    with errors_as_lines(console, RunFailedError, resume=f"hydra.run.dir={directory}"):
        check(conf)
        if not conf.plot_only:
            measure(conf, directory, console)
        elif not file.exists():
            raise ConfigError(f"`plot_only=true` finds no gpu_sharing.json in {directory}. HINT: hydra.run.dir=DIR.")
    report = json.loads(file.read_text())
    write(report, directory)
    draw(directory / "gpu_sharing.png", report)
    console.print(f"{file}\n{directory / 'gpu_sharing.png'}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
