"""D2's portable kernels one by one: beside torch's own, and beside what the device could do.

``python -m recipes.kernels`` calls operations of the eight workloads at their published shapes (`_kernel_cases.py`) as
training calls them, in several ways that take turns: torch's kernels (cuBLAS, cuDNN) in fp32 without TF32, the fastest
ones and under D1 the deterministic ones, and D2's. Each operation is timed on the device alone and with what Python
spends to launch it (`_kernel_timing.py`); its operands are those of the call before, so that small ones stay in caches.
Ratios are of the same turn. Products and convolutions also get TFLOP/s, counted from their shapes, which algorithms
that multiply less may exceed, and the share of the device's fp32 peak; the rest gets GB/s of what must be moved.

Each finished operation is kept in ``kernels.json`` in ``hydra.run.dir``: the same command with the same directory goes
on where a time limit, or ``seconds``, has ended it. ``kernels.csv`` and ``kernels.png`` lie beside. On CPUs the C++
kernels of the format are compared with torch's; they need a compiler.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, List, Optional  # noqa: UP035  OmegaConf reads these at run time

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_easyscale import determinism
from lightning_easyscale.kernels import build

from ._config import ConfigError
from ._console import errors_as_lines, make_console
from ._kernel_cases import GROUPS, Case, cases
from ._kernel_timing import Stopwatch, peak
from ._machine import device_name
from ._ways import WAYS, in_force


@dataclass
class KernelsConf:
    """The whole configuration.

    Args:
        groups: of operations.
        ways: to compute them; D2 is compared with each of the others.
        size: ``full`` for the published shapes, ``smoke`` to see that everything runs.
        blocks: timed turns of each way.
        sample_ms: calls of a turn take about so many milliseconds.
        compile_processes: that compile D2's kernels before anything is timed; on CPUs there is nothing to compile.
        accelerator: ``auto``, ``cpu`` or ``gpu``.
        threads: CPU threads; default: all.
        peak_tflops: of the device in fp32; default: from its multiprocessors and clock, on CPUs unknown.
        seconds: begin no other operation after so many seconds; default: measure all.
        plot_only: draw again what is in ``hydra.run.dir``.
    """

    groups: List[str] = field(default_factory=lambda: list(GROUPS))  # noqa: UP006
    ways: List[str] = field(default_factory=lambda: ["nondeterministic", "d1", "d2"])  # noqa: UP006
    size: str = "full"
    blocks: int = 5
    sample_ms: float = 5.0
    compile_processes: int = 8
    accelerator: str = "auto"
    threads: Optional[int] = None  # noqa: UP045
    peak_tflops: Optional[float] = None  # noqa: UP045
    seconds: Optional[float] = None  # noqa: UP045
    plot_only: bool = False


ConfigStore.instance().store(name="kernels_schema", node=KernelsConf)


def check(conf: KernelsConf) -> None:
    """Refuse what cannot be measured.

    Raises:
        ConfigError: naming the key and the cure.
    """
    for key, given, known in (("groups", conf.groups, GROUPS), ("ways", conf.ways, WAYS)):
        if unknown := set(given) - set(known):
            raise ConfigError(f"`{key}` has {sorted(unknown)[0]!r}. HINT: there are {', '.join(known)}.")
    if "d2" not in conf.ways or len(conf.ways) < 2:
        raise ConfigError(f"`ways={list(conf.ways)}` compares nothing with D2. HINT: ways=[d1,d2].")
    for key, given, several in (
        ("size", conf.size, ("full", "smoke")),
        ("accelerator", conf.accelerator, ("auto", "cpu", "gpu")),
    ):
        if given not in several:
            raise ConfigError(f"`{key}={given}` is unknown. HINT: use {' or '.join(several)}.")
    if conf.blocks < 1 or conf.sample_ms <= 0:
        raise ConfigError("`blocks` is at least 1, `sample_ms` above 0.")
    if conf.accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("`accelerator=gpu` finds no CUDA device. HINT: accelerator=cpu size=smoke.")
    if not _gpu(conf) and (reason := build.why_unavailable()):
        raise ConfigError(f"D2 cannot compute here: {reason}")


def _gpu(conf: KernelsConf) -> bool:
    return conf.accelerator == "gpu" or (conf.accelerator == "auto" and torch.cuda.is_available())


def _force(way: str, gpu: bool, threads: int) -> AbstractContextManager[None]:
    return in_force(way, threads=threads, device_type="cuda" if gpu else "cpu")


def measure(case: Case, conf: KernelsConf, gpu: bool, threads: int) -> dict[str, Any]:
    """The row of one operation: per way the times of all blocks, in milliseconds."""
    operands = case.make(torch.device("cuda" if gpu else "cpu"))
    watches: dict[str, Stopwatch] = {}
    for way in conf.ways:
        with _force(way, gpu, threads):
            watches[way] = Stopwatch(case.begin(*operands), gpu)
            watches[way].settle(conf.sample_ms / 1e3)
    times: dict[str, dict[str, list[float]]] = {way: {"wall": [], "device": []} for way in conf.ways}
    for _ in range(conf.blocks):
        for way, watch in watches.items():
            with _force(way, gpu, threads):
                times[way]["wall"].append(1e3 * watch.wall())
                times[way]["device"].append(1e3 * watch.device())
    return {
        **{"group": case.group, "name": case.name, "part": case.part, "flops": case.flops, "bytes": case.bytes},
        "queued": {way: watch.queued for way, watch in watches.items()},
        "times_ms": times,
    }


def summary(row: dict[str, Any], tflops: float | None) -> dict[str, Any]:
    """Of a row: medians with ranges, ratios of D2 to the other ways, and rates."""
    made = {key: row[key] for key in ("group", "name", "part", "flops", "bytes")}
    times = row["times_ms"]
    for way, kinds in times.items():
        for kind, values in kinds.items():
            key = f"{way}_{kind}_ms"
            made |= {key: statistics.median(values), f"{key}_least": min(values), f"{key}_greatest": max(values)}
        milliseconds = made[f"{way}_device_ms"]
        made[f"{way}_tflops"] = row["flops"] / milliseconds / 1e9 if row["flops"] else None
        made[f"{way}_of_peak"] = made[f"{way}_tflops"] / tflops if row["flops"] and tflops else None
        made[f"{way}_gbs"] = row["bytes"] / milliseconds / 1e6 if row["bytes"] else None
    for way in times:
        for kind in ("device", "wall") if way != "d2" else ():
            ratios = [a / b for a, b in zip(times["d2"][kind], times[way][kind], strict=True)]
            key = f"d2_to_{way}_{kind}"
            made |= {key: statistics.median(ratios), f"{key}_least": min(ratios), f"{key}_greatest": max(ratios)}
    return made


def compile_one(number: int, size: str, threads: int) -> None:
    """Call an operation once under D2 on the GPU, which leaves its kernels in Triton's cache on disk."""
    case = cases(size)[number]
    operands = case.make(torch.device("cuda"))
    with _force("d2", True, threads):
        case.begin(*operands)()
        torch.cuda.synchronize()


def _compile(numbers: list[int], conf: KernelsConf, threads: int, tick: Callable[[], None]) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(conf.compile_processes, len(numbers)), mp_context=context) as pool:
        for done in as_completed([pool.submit(compile_one, n, conf.size, threads) for n in numbers]):
            done.exception()  # what fails fails again where it is measured, and is reported there
            tick()


def run(conf: KernelsConf, directory: Path, console: Console) -> None:
    """Measure the operations that ``kernels.json`` lacks, writing it after each.

    Raises:
        ConfigError: naming the key and the cure.
    """
    check(conf)
    began, gpu = time.monotonic(), _gpu(conf)
    threads = conf.threads or determinism.default_threads(1)
    torch.set_num_threads(threads)
    found, how = peak(gpu) if conf.peak_tflops is None else (conf.peak_tflops, "as configured")
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(gpu),
        "torch": torch.__version__,
        "config": {key: getattr(conf, key) for key in ("ways", "size", "blocks", "sample_ms")} | {"threads": threads},
        "peak_tflops": found,
        "peak_is": how,
        "rows": [],
        "failed": {},
    }
    file = directory / "kernels.json"
    if file.exists():
        kept = json.loads(file.read_text())
        if any(kept[key] != report[key] for key in ("device", "torch", "config")):
            raise ConfigError(f"{file} was measured in another way. HINT: use another hydra.run.dir.")
        report = {**kept, "failed": {}}
    done = {(row["name"], row["part"]) for row in report["rows"]}
    every = list(enumerate(cases(conf.size)))
    left = [(n, c) for n, c in every if c.group in conf.groups and (c.name, c.part) not in done]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        if gpu and conf.compile_processes > 1 and left:
            bar = bars.add_task("compiling", total=len(left))
            _compile([n for n, _ in left], conf, threads, lambda: bars.advance(bar))
        bar = bars.add_task("measuring", total=len(left))
        for position, (_, case) in enumerate(left):
            if conf.seconds is not None and position and time.monotonic() - began > conf.seconds:
                console.print(f"{len(left) - position} operations are left; the same command goes on with them.")
                break
            bars.update(bar, description=case.title)
            try:
                report["rows"].append(measure(case, conf, gpu, threads))
            except (RuntimeError, NotImplementedError) as error:
                report["failed"][case.title] = f"{type(error).__name__}: {error}"
            bars.advance(bar)
            write(report, directory)
    write(report, directory)


def write(report: dict[str, Any], directory: Path) -> None:
    """``kernels.json``, in one move, and ``kernels.csv``."""
    temporary = directory / "kernels.tmp"
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(directory / "kernels.json")
    if report["rows"]:
        rows = [summary(row, report["peak_tflops"]) for row in report["rows"]]
        with (directory / "kernels.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def tables(report: dict[str, Any]) -> Iterator[Table | str]:
    """For people: a table for each group, and what they share."""
    peak_is = f"; fp32 peak {report['peak_tflops']:.1f} TFLOP/s: {report['peak_is']}" if report["peak_tflops"] else ""
    yield f"{report['device']}, torch {report['torch']}, size={report['config']['size']}{peak_is}"
    others = [way for way in report["config"]["ways"] if way != "d2"]
    for group in dict.fromkeys(row["group"] for row in report["rows"]):
        table = Table(title=group, title_justify="left")
        table.add_column("operation")
        for header in ("D2 ms", "wall", "rate", *(f"{h} {w}" for w in others for h in ("to", "wall to"))):
            table.add_column(header, justify="right")
        for row in (row for row in report["rows"] if row["group"] == group):
            s = summary(row, report["peak_tflops"])
            mark = "" if row["queued"]["d2"] else " *"
            rate = f"{s['d2_gbs']:.3g} GB/s" if s["d2_tflops"] is None else f"{s['d2_tflops']:.3g} TFLOP/s"
            if s["d2_of_peak"] is not None:
                rate += f" {s['d2_of_peak']:.0%}"
            cells = [f"{s['d2_device_ms']:.3f}{mark}", f"{s['d2_wall_ms']:.3f}", rate]
            for way in others:
                ratio = f"d2_to_{way}_device"
                cells.append(f"{s[ratio]:.2f} ({s[f'{ratio}_least']:.2f} .. {s[f'{ratio}_greatest']:.2f})")
                cells.append(f"{s[f'd2_to_{way}_wall']:.2f}")
            table.add_row(f"{row['name']}, {row['part']}", *cells)
        yield table
    if not all(row["queued"]["d2"] for row in report["rows"]):
        yield "* could not be queued: the device waited for the host"


@hydra.main(version_base="1.3", config_path="../conf", config_name="kernels")
def main(config: DictConfig) -> None:
    """Command line."""
    console = make_console(width=160)
    conf = OmegaConf.to_object(config)
    assert isinstance(conf, KernelsConf)
    directory = Path(HydraConfig.get().runtime.output_dir).resolve()
    file = directory / "kernels.json"
    with errors_as_lines(console, resume=f"hydra.run.dir={directory}"):
        if not conf.plot_only:
            run(conf, directory, console)
        elif not file.exists():
            raise ConfigError(f"`plot_only=true` finds no kernels.json in {directory}. HINT: hydra.run.dir=DIR.")
    report = json.loads(file.read_text())
    for part in tables(report):
        console.print(part, soft_wrap=isinstance(part, str))
    if report["rows"]:
        from ._kernel_figure import draw

        rows = [summary(row, report["peak_tflops"]) for row in report["rows"]]
        draw(directory / "kernels.png", report, rows)
    console.print(f"{file}\n{directory / 'kernels.png'}", markup=False, soft_wrap=True)
    for title, error in report["failed"].items():
        console.print(f"{title}: {error}", markup=False, style="red", soft_wrap=True)
    if report["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
