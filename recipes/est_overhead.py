"""Fig. 11 and Fig. 13: what switching between ESTs costs, and which EST pays for it, for every workload.

``python -m recipes.est_overhead`` runs each workload on synthetic data, block by block in turns, each side in processes
of its own:

- ``easyscale``: k ESTs in each of P processes (switching on);
- ``alone``: the same with ``overlap_backward=False``;
- ``accumulate``: stock Lightning with ``accumulate_grad_batches=k`` (the same work without ESTs), for P = 1;
- ``ddp``: stock DDP on P devices, one mini-batch a step;
- ``host`` (default: on a GPU): the ESTs again with ``gradient_offload="host"``, in the `tree` order unless
  ``reduction`` names one; the `ddp` order keeps all gradients, where `tree` keeps sums;
- ``overlap`` (default: on a GPU, for P = 1): the ESTs again with ``overlap_backward=True``.

Fig. 11 is the ESTs over ``accumulate``. Fig. 13 divides the step of an executor of ``alone`` into the times in which
each EST had the baton: a middle EST's forward, backward and fold, and the last one's, which also completes the
exchange; both beside a DDP worker's step. ``est_overhead.json``, ``est_overhead.csv`` and two figures go
into ``hydra.run.dir``, with the published ratios beside: absolute times are those of other hardware and are not
compared. Each finished workload is kept at once; the same command with the same directory goes on where ``seconds``, or
a time limit, has ended it.
"""

from __future__ import annotations

import csv
import json
import statistics
import time
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

from ._bench_runs import bench_processes, interleave
from ._bench_worker import Side
from ._config import ConfigError
from ._console import errors_as_lines, make_console
from ._machine import device_name
from ._runs import RunFailedError
from ._warm import WarmProcesses

PUBLISHED_MS = {
    "shufflenetv2": (335.0, 338.7),
    "resnet50": (507.8, 506.4),
    "vgg19": (775.5, 776.0),
    "neumf": (15.09, 15.08),
    "yolov3": (482.6, 480.2),
    "bert": (651.1, 651.0),
    "electra": (645.7, 658.4),
    "swin": (602.9, 604.0),
}
"""Milliseconds per mini-batch on a V100 with switching off and on: EasyScale (SC'23), Figure 11."""

PUBLISHED_PARTS_MS = {
    "shufflenetv2": (455.1, 338.7, 364.2),
    "resnet50": (871.7, 506.4, 512.2),
    "vgg19": (1138.5, 776.0, 1018.2),
    "neumf": (31.15, 15.08, 26.98),
    "yolov3": (613.8, 480.2, 566.9),
    "bert": (829.2, 651.0, 844.7),
    "electra": (844.9, 658.4, 890.2),
    "swin": (666.4, 604.0, 643.8),
}
"""Milliseconds per mini-batch of a DDP worker, a middle EST and the last EST: EasyScale (SC'23), Figure 13."""


@dataclass
class EstOverheadConf:
    """The whole configuration.

    Args:
        workloads: to measure.
        size: ``small``, or ``full`` for the published shapes.
        overrides: further ones of every workload, as on the command line: ``workload.batch_size=2``.
        ests: k, of each process.
        executors: P, processes with a device each.
        host: whether to run ``gradient_offload="host"`` too; default: on a GPU.
        overlap: whether to run ``overlap_backward=True`` too, for one executor; default: on a GPU.
        blocks: timed blocks of each side.
        steps: optimizer steps of a block.
        warmup: steps before the first; in the first five ESTs find out when to overlap.
        accelerator: ``auto``, ``cpu`` or ``gpu``.
        threads: CPU threads of each worker; default: what each side has by itself, which is a share of the CPUs for
            each EST, and for each process of the stock sides. Threads of an EST wait in a pool of their own, and where
            there are more of them in all than CPUs, they fall asleep at once and have to be woken.
        reduction: order of gradient reduction.
        precision: of the Trainer.
        seconds: do not begin another workload when it would not end within so many seconds, judging by the last.
        timeout_s: longest time a workload may take, in seconds.
        plot_only: draw again what is in ``hydra.run.dir``.
    """

    workloads: List[str] = field(default_factory=lambda: list(PUBLISHED_MS))  # noqa: UP006
    size: str = "small"
    overrides: List[str] = field(default_factory=list)  # noqa: UP006
    ests: int = 4
    executors: int = 1
    host: Optional[bool] = None  # noqa: UP045
    overlap: Optional[bool] = None  # noqa: UP045
    blocks: int = 7
    steps: int = 3
    warmup: int = 6
    accelerator: str = "auto"
    threads: Optional[int] = None  # noqa: UP045
    reduction: str = "auto"
    precision: str = "32-true"
    seconds: Optional[float] = None  # noqa: UP045
    timeout_s: float = 900.0
    plot_only: bool = False


ConfigStore.instance().store(name="est_overhead_schema", node=EstOverheadConf)


_OVERLAPS = {"alone": False, "overlap": True}
_ESTS = ("easyscale", "host", *_OVERLAPS)  # the sides that have them
_RUN = ("plot_only", "seconds", "timeout_s", "workloads")  # what decides no row


def measure(conf: EstOverheadConf, directory: Path, console: Console) -> None:
    """Run the workloads that are not there yet; ``est_overhead.json`` holds what is done so far.

    Raises:
        ConfigError: for what cannot be measured.
    """
    if unknown := set(conf.workloads) - set(PUBLISHED_MS):
        raise ConfigError(f"`workloads` has {sorted(unknown)[0]!r}. HINT: there are {', '.join(PUBLISHED_MS)}.")
    if conf.size not in ("small", "full") or conf.ests < 2 or min(conf.blocks, conf.steps, conf.executors) < 1:
        raise ConfigError(
            "`size` is 'small' or 'full', `ests` at least 2, `blocks` and `steps` at least 1, and `executors` too."
        )
    gpu = conf.accelerator == "gpu" or (conf.accelerator == "auto" and torch.cuda.is_available())
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(gpu),
        "torch": torch.__version__,
        "config": {key: value for key, value in vars(conf).items() if key not in _RUN},
        "rows": [],
    }
    file = directory / "est_overhead.json"
    if file.exists():
        old = json.loads(file.read_text())
        if all(old[key] == report[key] for key in ("device", "torch", "config")):
            report["rows"] = old["rows"]
    done = {row["workload"] for row in report["rows"]}
    missing = [name for name in conf.workloads if name not in done]
    if not missing:
        return
    began, last = time.monotonic(), 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with bench_processes() as warm, Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(missing))
        for number, name in enumerate(missing):
            start = time.monotonic()
            if conf.seconds is not None and number and start - began + last > conf.seconds:
                console.print(f"{missing[number:]} are left; the same command goes on with them.", markup=False)
                return
            bar.update(task, description=name)
            report["rows"].append(_row(conf, name, gpu, directory, warm))
            write(report, directory)
            last = time.monotonic() - start
            bar.advance(task)


def _row(conf: EstOverheadConf, name: str, gpu: bool, directory: Path, warm: WarmProcesses) -> dict[str, Any]:
    from . import learn  # noqa: F401  registers the schema that is composed

    suffix = "_full" if conf.size == "full" else ""
    composed = compose("learn", overrides=[f"workload={name}{suffix}", *conf.overrides]).workload
    workload: Any = OmegaConf.to_container(composed, resolve=True)
    kinds = ["easyscale", "alone", *(["accumulate"] if conf.executors == 1 else []), "ddp"]
    if gpu if conf.host is None else conf.host:
        kinds.append("host")
    if conf.executors == 1 and (gpu if conf.overlap is None else conf.overlap):
        kinds.append("overlap")
    sides = {
        kind: Side(
            kind="easyscale" if kind in _ESTS else kind,
            model=name,
            workers=conf.executors if kind == "ddp" else conf.ests * conf.executors,
            executors=conf.executors,
            image_size=workload["image_size"],
            batch_size=workload["batch_size"],
            # As many mini-batches as the others, so that a block is as long.
            steps=conf.steps * (conf.ests if kind == "ddp" else 1),
            blocks=conf.blocks,
            warmup=conf.warmup,
            accelerator="gpu" if gpu else "cpu",
            threads=conf.threads or determinism.default_threads(conf.executors * (conf.ests if kind in _ESTS else 1)),
            reduction="tree" if kind == "host" and conf.reduction == "auto" else conf.reduction,
            directory=str(directory / "sides" / f"{name}_{kind}"),
            workload=workload,
            precision=conf.precision,
            offload="host" if kind == "host" else None,
            overlaps=_OVERLAPS.get(kind, "auto"),
            slices=kind == "alone",
        )
        for kind in kinds
    }
    entries = interleave(sides, warm, timeout_s=conf.timeout_s)
    blocks = {kind: side[1:] for kind, side in entries.items()}
    row: dict[str, Any] = {"workload": name, "batch_size": workload["batch_size"]}
    # Per mini-batch of one device.
    times = {
        kind: [1e3 * entry["seconds"] / (1 if kind == "ddp" else conf.ests) for entry in side]
        for kind, side in blocks.items()
    }
    row |= {f"{kind}_ms": statistics.median(values) for kind, values in times.items()}
    if "accumulate" in times:
        row |= _ratio("ratio", times["easyscale"], times["accumulate"])
        off, on = PUBLISHED_MS[name]
        row["published_ratio"] = on / off
        for kind in [kind for kind in _OVERLAPS if kind in times]:
            row |= _ratio(kind, times[kind], times["accumulate"])
    parts = {part: [1e3 * s for s in _part(blocks["alone"], part)] for part in PARTS}
    for part, published in zip(PARTS, (None, *PUBLISHED_PARTS_MS[name][1:]), strict=True):
        row |= {f"{part}_ms": statistics.median(parts[part]), **_ratio(part, parts[part], times["ddp"])}
        if published is not None:
            row[f"published_{part}"] = published / PUBLISHED_PARTS_MS[name][0]
    if "host" in times:
        row |= _ratio("host", times["host"], times["easyscale"])
    for kind, side in entries.items():
        row |= {f"{kind}_{key}_mib": side[-1][key] / 2**20 for key in ("allocated", "reserved") if key in side[-1]}
    return {**row, "blocks": blocks}


PARTS = ("lead", "middle", "last")
"""The first EST of an executor, whose part has the optimizer's step; those between, if any; the last."""


def _part(blocks: list[dict[str, Any]], part: str) -> list[float]:
    """Seconds per step and EST of a part, block by block."""
    out = []
    for block in blocks:
        *_, last = ranks = sorted(block["slices"], key=int)
        chosen = {"lead": ranks[:1], "middle": ranks[1:-1] or ranks[:1], "last": [last]}[part]
        out.append(statistics.mean(block["slices"][rank] for rank in chosen))
    return out


def _ratio(name: str, ours: list[float], others: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(ours, others, strict=True)]
    return {name: statistics.median(ratios), f"{name}_least": min(ratios), f"{name}_greatest": max(ratios)}


def write(report: dict[str, Any], directory: Path) -> None:
    """``est_overhead.json``, in one move, and ``est_overhead.csv``."""
    temporary = directory / "est_overhead.tmp"
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(directory / "est_overhead.json")
    with (directory / "est_overhead.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [key for key in report["rows"][0] if key != "blocks"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(report["rows"])


def draw(directory: Path, report: dict[str, Any]) -> None:
    """``est_overhead.png`` for Fig. 11 and ``est_parts.png`` for Fig. 13: bars with ranges, the published beside."""
    bars: dict[str, list[tuple[str, str | None, str]]] = {
        "est_overhead": [
            ("ratio", "published_ratio", "switching on / off"),
            ("alone", None, "on, no backward beside forward / off"),
            ("overlap", None, "on, all of backward beside forward / off"),
        ],
        "est_parts": [
            ("middle", "published_middle", "middle EST / DDP worker"),
            ("last", "published_last", "last EST / DDP worker"),
        ],
    }
    for name, all_panels in bars.items():
        if panels := [panel for panel in all_panels if any(panel[0] in row for row in report["rows"])]:
            _draw_bars(directory / f"{name}.png", report, panels)


def _draw_bars(file: Path, report: dict[str, Any], panels: list[tuple[str, str | None, str]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = report["rows"]
    figure, grid = plt.subplots(
        len(panels), 1, figsize=(9, 0.8 + 2.8 * len(panels)), layout="constrained", squeeze=False
    )
    for axes, (ours, published, label) in zip(grid[:, 0], panels, strict=True):
        for number, row in enumerate(rows):
            if ours not in row:
                continue
            first, place = number == 0, number if published is None else number - 0.2
            axes.bar(place, row[ours], 0.4, color="#0072B2", label="measured here" if first else None)
            axes.plot([place] * 2, [row[f"{ours}_least"], row[f"{ours}_greatest"]], color="0.2", linewidth=1)
            if published is not None:
                axes.bar(number + 0.2, row[published], 0.4, color="0.7", label="published, V100" if first else None)
        axes.axhline(1.0, color="0.4", linewidth=0.8)
        axes.set_xticks(range(len(rows)), [row["workload"] for row in rows])
        axes.set_ylabel(f"time per mini-batch,\n{label}")
        axes.legend(frameon=False, fontsize=8)
    config = report["config"]
    where = f"{report['device']}, torch {report['torch']}, {report['date'][:10]}"
    devices = "one device" if config["executors"] == 1 else f"each of {config['executors']} devices"
    figure.suptitle(f"{where}: {config['ests']} ESTs on {devices}", size=10)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def lines(row: dict[str, Any]) -> list[str]:
    """A workload's figures, for the terminal."""

    def ratio(name: str) -> str:
        return f"{row[name]:.3f} ({row[f'{name}_least']:.3f} .. {row[f'{name}_greatest']:.3f})"

    out = []
    if "ratio" in row:
        out.append(
            f"{row['workload']:13} on {row['easyscale_ms']:9.2f} ms, off {row['accumulate_ms']:9.2f} ms,"
            f" ratio {ratio('ratio')}, published {row['published_ratio']:.3f}"
        )
    out.append(
        f"{row['workload']:13} DDP worker {row['ddp_ms']:.2f} ms; of it a middle EST {ratio('middle')}, published"
        f" {row['published_middle']:.3f}; the last {ratio('last')}, published {row['published_last']:.3f};"
        f" the lead {ratio('lead')}"
    )
    for kind, value in _OVERLAPS.items():
        if kind in row:
            out.append(f"{row['workload']:13} overlap_backward={value!r} over off {ratio(kind)}")
    if "host" in row:
        out.append(f"{row['workload']:13} gradient_offload='host' over none {ratio('host')}")
    return out


@hydra.main(version_base="1.3", config_path="../conf", config_name="est_overhead")
def main(config: DictConfig) -> None:
    """Command line."""
    console = make_console()
    conf = OmegaConf.to_object(config)
    assert isinstance(conf, EstOverheadConf)
    directory = Path(HydraConfig.get().runtime.output_dir).resolve()
    file = directory / "est_overhead.json"
    with errors_as_lines(console, RunFailedError, resume=f"hydra.run.dir={directory}"):
        if not conf.plot_only:
            measure(conf, directory, console)
        elif not file.exists():
            raise ConfigError(f"`plot_only=true` finds no est_overhead.json in {directory}. HINT: hydra.run.dir=DIR.")
    report = json.loads(file.read_text())
    draw(directory, report)
    for row in report["rows"]:
        for line in lines(row):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
