"""What running ESTs costs, against stock Lightning doing the same work.

``python -m recipes.overhead`` compares, in interleaved runs (each side in processes of its own, taking turns block by
block):

- ``est_vs_accumulation``: k ESTs in one process / stock single process with ``accumulate_grad_batches=k``;
- ``est_vs_ddp``: one EST on each of P executors / stock DDP on P;
- ``switch``: a hand-over of the baton by itself, beside one of bare threads, and an EST's step of a module that does
  nothing;
- ``memory``: what one more EST needs beyond the parameters that all share;
- ``collectives``: calls of the virtual world / stock gloo (NCCL on GPUs), and how often each hands on the baton;
- ``snapshots``: steps during which a snapshot is copied and committed / the same without; and steps with snapshots as
  often as they may be taken for 1 % / the same without.

Every number is the median of the blocks, with the least and the greatest; a ratio is that of neighbouring blocks, so a
slow spell of the machine falls on both sides. Into ``hydra.run.dir`` go ``overhead.json`` (all blocks),
``overhead.csv`` and ``overhead.png``.
"""

from __future__ import annotations

import csv
import itertools
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_easyscale import determinism

from . import _bench_figure
from ._bench_config import ModelConf, OverheadConf, check, register
from ._bench_runs import bench_processes, interleave
from ._bench_switch import time_switches, time_threads
from ._bench_worker import COLLECTIVES, Side
from ._config import ConfigError
from ._console import errors_as_lines, make_console
from ._machine import device_name
from ._runs import RunFailedError
from ._warm import WarmProcesses

register()

AIMS = {"ratio_resnet18": 1.02, "switch_us": 150.0, "snapshots": 1.01}

Row = dict[str, Any]


class Bench:
    """Runs the comparisons of a configuration.

    Args:
        conf: the configuration.
        directory: where sides keep their files.
        warm: starts the processes of sides.
    """

    def __init__(self, conf: OverheadConf, directory: Path, warm: WarmProcesses) -> None:
        self.conf = conf
        self.directory = directory
        self.warm = warm
        gpu = conf.accelerator == "gpu" or (conf.accelerator == "auto" and torch.cuda.is_available())
        self.accelerator = "gpu" if gpu else "cpu"
        self.threads = conf.threads or determinism.default_threads(conf.ests)
        self.raw: dict[str, Any] = {}

    def est_vs_accumulation(self) -> list[Row]:
        """(a) of the module's list, for ResNet-18 and the tiny model."""
        k, rows = self.conf.ests, []
        for model in ("resnet18", "tiny"):
            name = f"est_vs_accumulation {model}"
            ours = ("easyscale", k, 1)
            results = self._compare(name, model, easyscale=ours, overlap=ours, accumulation=("accumulate", k, 1))
            aim = AIMS["ratio_resnet18"] if model == "resnet18" else None
            for side, how in (("easyscale", ""), ("overlap", ", overlap_backward=True")):
                pair = results[side], results["accumulation"]
                rows.append(_ratio(name, f"{k} ESTs / accumulation over {k}{how}", *pair, aim=aim))
                rows.append(_ratio(name, "the same, CPU time", *pair, key="cpu"))
            rows += _counts(name, results["easyscale"], self.conf.bench.models[model].steps)
        return rows

    def est_vs_ddp(self) -> list[Row]:
        """(b): processes side by side."""
        p, rows = self.conf.executors, []
        if self.accelerator == "gpu" and torch.cuda.device_count() < p:
            return []
        for model in ("resnet18", "tiny"):
            name = f"est_vs_ddp {model}"
            results = self._compare(name, model, easyscale=("easyscale", p, p), ddp=("ddp", p, p))
            aim = AIMS["ratio_resnet18"] if model == "resnet18" else None
            rows.append(_ratio(name, f"{p} executors of one EST / DDP on {p}", *results.values(), aim=aim))
            rows.append(_ratio(name, "the same, CPU time", *results.values(), key="cpu"))
            rows += _counts(name, results["easyscale"], self.conf.bench.models[model].steps)
        return rows

    def switch(self) -> list[Row]:
        """(c): hand-overs alone, and steps of a module that does nothing."""
        k, bench = self.conf.ests, self.conf.bench
        device = torch.device("cuda" if self.accelerator == "gpu" else "cpu")
        alone, bare = [], []
        for _ in range(bench.blocks):
            alone += time_switches(ests=k, device=device, blocks=1, rounds=10 * bench.calls)
            bare += time_threads(threads=k, blocks=1, rounds=10 * bench.calls)
        self.raw["switch"], self.raw["switch bare"] = alone, bare
        rows = [
            _row("switch", f"hand-over among {k} ESTs", "us", [1e6 * s for s in alone], aim=AIMS["switch_us"]),
            _row("switch", f"hand-over among {k} bare threads", "us", [1e6 * s for s in bare]),
        ]
        results = self._compare(
            "switch empty",
            "empty",
            easyscale=("easyscale", k, 1),
            accumulation=("accumulate", k, 1),
            ddp=("ddp", 1, 1),
        )
        per_est = [entry["seconds"] / k for entry in results["easyscale"]]
        for other, share in (("ddp", 1), ("accumulation", k)):
            beyond = [1e6 * (a - b["seconds"] / share) for a, b in zip(per_est, results[other], strict=True)]
            stock = "a stock DDP rank's" if other == "ddp" else "a stock accumulated batch's"
            rows.append(_row("switch empty", f"an EST's step beyond {stock}", "us", beyond))
        return rows

    def memory(self) -> list[Row]:
        """(d): growth with the number of ESTs in one process."""
        k, rows = self.conf.ests, []
        key = "allocated" if self.accelerator == "gpu" else "rss"
        shared = sum(p.numel() * p.element_size() for p in _resnet18_parameters())
        rows.append(_row("memory resnet18", "parameters, shared by all ESTs", "MiB", [shared / 2**20]))
        for reduction in dict.fromkeys((self.conf.reduction, "tree")):
            name = f"memory resnet18 {reduction}"
            sides = {"one": ("easyscale", 1, 1), "many": ("easyscale", k, 1)}
            results = self._compare(name, "resnet18", blocks=3, reduction=reduction, **sides)
            for what, label in ((key, "one more EST"), ("peak_rss", "one more EST, peak of the process")):
                grown = [
                    (b[what] - a[what]) / (k - 1) / 2**20 for a, b in zip(results["one"], results["many"], strict=True)
                ]
                rows.append(_row(name, f"{label} ({reduction} order)", "MiB", grown))
        return rows

    def collectives(self) -> list[Row]:
        """(e): calls of one EST or rank."""
        k, p, rows = self.conf.ests, self.conf.executors, []
        sides = {f"{k} ESTs on 1": ("easyscale", k, 1)}
        if self.accelerator == "cpu" or torch.cuda.device_count() >= p:
            sides |= {f"{p} ESTs on {p}": ("easyscale", p, p), f"stock DDP on {p}": ("ddp", p, p)}
        results = self._compare("collectives", "collectives", **sides)
        for call in COLLECTIVES:
            for name, entries in results.items():
                # The ESTs of one process take turns: a round of them is k calls.
                share = k if name.endswith("on 1") else 1
                rows.append(_row("collectives", f"{call}: {name}", "us", [1e6 * e[call] / share for e in entries]))
                if share > 1:
                    switches = [e[f"{call} switches"] / share for e in entries]
                    rows.append(_row("collectives", f"{call}: {name}", "switches", switches))
        return rows

    def snapshots(self) -> list[Row]:
        """(f): blocks with one snapshot each, taken after their first step; then with the automatic interval."""
        steps, name = self.conf.bench.snapshot_steps, "snapshots resnet18"
        results = self._with_snapshots(name, every=steps, steps=steps, warmup=2 * steps - 1)
        rows = [
            _ratio(name, f"a snapshot every {steps} steps / none", *results.values(), aim=AIMS["snapshots"]),
            _ratio(name, "the same, CPU time", *results.values(), key="cpu"),
        ]
        cost = [1e3 * steps * (a["seconds"] - b["seconds"]) for a, b in zip(*results.values(), strict=True)]
        rows.append(_row(name, "what a snapshot adds", "ms", cost))
        written = [entry["counts"]["snapshots"] for entry in results["on"]]
        rows.append(_row(name, "snapshots committed until the end of a block", "", written))
        steps, name = self.conf.bench.automatic_steps, "snapshots resnet18 auto"
        results = self._with_snapshots(name, every="auto", steps=steps, warmup=3 * steps)
        what = "snapshots as often as 1 % allows / none"
        rows.append(_ratio(name, what, *results.values(), aim=AIMS["snapshots"]))
        rows.append(_ratio(name, "the same, CPU time", *results.values(), key="cpu"))
        written = [entry["counts"]["snapshots"] for entry in results["on"]]
        between = [b - a for a, b in itertools.pairwise(written)] or written
        return [*rows, _row(name, f"snapshots committed in {steps} steps", "", between)]

    def _with_snapshots(self, name: str, *, every: int | str, steps: int, warmup: int) -> dict[str, list[Row]]:
        size = replace(self.conf.bench.models["resnet18"], steps=steps, warmup=warmup)
        side = ("easyscale", self.conf.ests, 1)
        return self._compare(name, "resnet18", size=size, snapshot_every={"on": every}, on=side, off=side)

    def _compare(
        self,
        name: str,
        model: str,
        *,
        blocks: int | None = None,
        reduction: str | None = None,
        size: ModelConf | None = None,
        snapshot_every: Mapping[str, int | str] | None = None,
        **sides: tuple[str, int, int],
    ) -> dict[str, list[dict[str, Any]]]:
        bench = self.conf.bench
        size = size or bench.models["empty" if model == "collectives" else model]
        made = {
            side: Side(
                kind=kind,
                model=model,
                workers=workers,
                executors=executors,
                image_size=size.image_size,
                batch_size=size.batch_size,
                steps=bench.calls if model == "collectives" else size.steps,
                blocks=blocks or bench.blocks,
                warmup=size.warmup,
                accelerator=self.accelerator,
                threads=self.threads,
                reduction=reduction or self.conf.reduction,
                directory=str(self.directory / "sides" / f"{name} {side}".replace(" ", "_")),
                overlaps=True if side == "overlap" else "auto",
                snapshot_every=(snapshot_every or {}).get(side),
            )
            for side, (kind, workers, executors) in sides.items()
        }
        results = interleave(made, self.warm, timeout_s=self.conf.timeout_s)
        self.raw[name] = blocks = {side: entries[1:] for side, entries in results.items()}
        return blocks


def _row(comparison: str, what: str, unit: str, values: Sequence[float], *, aim: float | None = None) -> Row:
    middle = statistics.median(values)
    return {
        "comparison": comparison,
        "what": what,
        "unit": unit,
        "median": middle,
        "min": min(values),
        "max": max(values),
        "blocks": len(values),
        "aim": aim,
    }


def _ratio(
    comparison: str,
    what: str,
    ours: list[dict[str, Any]],
    stock: list[dict[str, Any]],
    *,
    key: str = "seconds",
    aim: float | None = None,
) -> Row:
    row = _row(comparison, what, "x", [a[key] / b[key] for a, b in zip(ours, stock, strict=True)], aim=aim)
    for name, entries in (("ours_ms", ours), ("stock_ms", stock)):
        row[name] = 1e3 * statistics.median(entry[key] for entry in entries)
    return row


def _counts(comparison: str, entries: list[dict[str, Any]], steps: int) -> list[Row]:
    """Switches, rendezvous and physical collectives of an executor per step, between the first and the last block."""
    first, last = entries[0]["counts"], entries[-1]["counts"]
    between = max(len(entries) - 1, 1) * steps
    names = {"switches": "switches", "meetings": "rendezvous", "physical": "physical control collectives"}
    return [
        _row(comparison, f"{label} per step and executor", "", [(last[name] - first[name]) / between])
        for name, label in names.items()
    ]


def _resnet18_parameters() -> list[torch.nn.Parameter]:
    from ._bench_models import resnet18

    return list(resnet18().parameters())


def measure(conf: OverheadConf, directory: Path, console: Console) -> None:
    """Run the comparisons; ``overhead.json`` and ``overhead.csv`` hold what is done so far after each of them."""
    rows: list[Row] = []
    with bench_processes() as warm:
        bench = Bench(conf, directory, warm)
        for name in dict.fromkeys(conf.only):
            console.print(f"{name} ...")
            new = getattr(bench, name)()
            rows += new
            for row in new:
                console.print(f"  {row['comparison']}: {row['what']}: {row['median']:.4g} {row['unit']}", markup=False)
            write(_report(conf, bench, rows), directory)


def _report(conf: OverheadConf, bench: Bench, rows: list[Row]) -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(bench.accelerator == "gpu"),
        "cpu_count": determinism.default_threads(1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads_per_process": bench.threads,
        "reduction": conf.reduction,
        "ests": conf.ests,
        "executors": conf.executors,
        "models": {name: vars(model) for name, model in conf.bench.models.items()},
        "rows": rows,
        "blocks": bench.raw,
    }


def table(report: dict[str, Any]) -> Table:
    """All rows; a missed aim stands out."""
    out = Table(title=f"{report['device']}, torch {report['torch']}, {report['date']}")
    for column in ("comparison", "what", "median", "min", "max", "aim", "ms ours / stock"):
        out.add_column(column, justify="left" if column in ("comparison", "what") else "right")
    for row in report["rows"]:
        digits = 3 if row["unit"] == "x" else 1
        middle, low, high = (f"{row[key]:.{digits}f}" for key in ("median", "min", "max"))
        aim = row["aim"]
        if aim is not None:
            middle = f"[{'green' if row['median'] <= aim else 'bold red'}]{middle}[/]"
        pair = f"{row['ours_ms']:.2f} / {row['stock_ms']:.2f}" if "ours_ms" in row else ""
        out.add_row(row["comparison"], row["what"], f"{middle} {row['unit']}", low, high, f"{aim}" if aim else "", pair)
    return out


def write(report: dict[str, Any], directory: Path) -> None:
    """``overhead.json`` and ``overhead.csv``."""
    (directory / "overhead.json").write_text(json.dumps(report, indent=1) + "\n")
    columns = ("comparison", "what", "unit", "median", "min", "max", "blocks", "aim", "ours_ms", "stock_ms")
    with (directory / "overhead.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(report["rows"])


@hydra.main(version_base="1.3", config_path="../conf", config_name="overhead")
def main(config: DictConfig) -> None:
    """Command line."""
    console = make_console(width=150)
    conf = OmegaConf.to_object(config)
    assert isinstance(conf, OverheadConf)
    directory = Path(HydraConfig.get().runtime.output_dir).resolve()
    with errors_as_lines(console, RunFailedError):
        check(conf)
        file = directory / "overhead.json"
        if not conf.plot_only:
            measure(conf, directory, console)
        elif not file.exists():
            raise ConfigError(f"`plot_only=true` finds no overhead.json in {directory}. HINT: say hydra.run.dir=DIR.")
        report = json.loads(file.read_text())
        _bench_figure.draw(directory / "overhead.png", report)
        console.print(table(report))
        console.print(f"{file}\n{directory / 'overhead.png'}")


if __name__ == "__main__":
    main()
