"""Fig. 11: what switching between ESTs costs, for every workload.

``python -m recipes.est_overhead`` runs each workload on synthetic data with k ESTs in one process (switching on) and in
stock Lightning with ``accumulate_grad_batches=k`` (the same work without ESTs), block by block in turns, each side in
processes of its own. Into ``hydra.run.dir`` go ``est_overhead.json``, ``est_overhead.csv`` and ``est_overhead.png``,
with the published ratios beside: absolute times are those of other hardware and are not compared.
"""

from __future__ import annotations

import csv
import json
import statistics
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

from lightning_easyscale import determinism

from ._bench_runs import interleave
from ._bench_worker import Side
from ._config import ConfigError
from ._machine import device_name
from ._runs import RunFailedError

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


@dataclass
class EstOverheadConf:
    """The whole configuration.

    Args:
        workloads: to measure.
        size: ``small``, or ``full`` for the published shapes.
        overrides: further ones of every workload, as on the command line: ``workload.batch_size=2``.
        ests: k.
        blocks: timed blocks of each side.
        steps: optimizer steps of a block.
        warmup: steps before the first.
        accelerator: ``auto``, ``cpu`` or ``gpu``.
        threads: CPU threads per process; default: all.
        reduction: order of gradient reduction.
        timeout_s: longest time a workload may take, in seconds.
        plot_only: draw again what is in ``hydra.run.dir``.
    """

    workloads: List[str] = field(default_factory=lambda: list(PUBLISHED_MS))  # noqa: UP006
    size: str = "small"
    overrides: List[str] = field(default_factory=list)  # noqa: UP006
    ests: int = 4
    blocks: int = 7
    steps: int = 3
    warmup: int = 2
    accelerator: str = "auto"
    threads: Optional[int] = None  # noqa: UP045
    reduction: str = "auto"
    timeout_s: float = 900.0
    plot_only: bool = False


ConfigStore.instance().store(name="est_overhead_schema", node=EstOverheadConf)


def measure(conf: EstOverheadConf, directory: Path) -> dict[str, Any]:
    """Run all workloads; returns the content of ``est_overhead.json``."""
    if unknown := set(conf.workloads) - set(PUBLISHED_MS):
        raise ConfigError(f"`workloads` has {sorted(unknown)[0]!r}. HINT: there are {', '.join(PUBLISHED_MS)}.")
    if conf.size not in ("small", "full") or conf.ests < 2 or min(conf.blocks, conf.steps) < 1:
        raise ConfigError("`size` is 'small' or 'full', `ests` at least 2, `blocks` and `steps` at least 1.")
    gpu = conf.accelerator == "gpu" or (conf.accelerator == "auto" and torch.cuda.is_available())
    rows = [_row(conf, name, gpu, directory) for name in conf.workloads]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(gpu),
        "torch": torch.__version__,
        "config": vars(conf),
        "rows": rows,
    }


def _row(conf: EstOverheadConf, name: str, gpu: bool, directory: Path) -> dict[str, Any]:
    from . import learn  # noqa: F401  registers the schema that is composed

    suffix = "_full" if conf.size == "full" else ""
    composed = compose("learn", overrides=[f"workload={name}{suffix}", *conf.overrides]).workload
    workload: Any = OmegaConf.to_container(composed, resolve=True)
    sides = {
        kind: Side(
            kind=kind,
            model=name,
            workers=conf.ests,
            executors=1,
            image_size=workload["image_size"],
            batch_size=workload["batch_size"],
            steps=conf.steps,
            blocks=conf.blocks,
            warmup=conf.warmup,
            accelerator="gpu" if gpu else "cpu",
            threads=conf.threads or determinism.default_threads(1),
            reduction=conf.reduction,
            directory=str(directory / "sides" / f"{name}_{kind}"),
            workload=workload,
        )
        for kind in ("easyscale", "accumulate")
    }
    for side in sides.values():
        for file in ("go", "done", "ready"):
            (Path(side.directory) / file).unlink(missing_ok=True)
    blocks = interleave(sides, timeout_s=conf.timeout_s)
    on, off = ([1e3 * entry["seconds"] / conf.ests for entry in blocks[kind]] for kind in ("easyscale", "accumulate"))
    ratios = [a / b for a, b in zip(on, off, strict=True)]
    published_off, published_on = PUBLISHED_MS[name]
    return {
        "workload": name,
        "batch_size": workload["batch_size"],
        "on_ms": statistics.median(on),
        "off_ms": statistics.median(off),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "greatest": max(ratios),
        "published_ratio": published_on / published_off,
        "blocks": blocks,
    }


def write(report: dict[str, Any], directory: Path) -> None:
    """``est_overhead.json`` and ``est_overhead.csv``."""
    (directory / "est_overhead.json").write_text(json.dumps(report, indent=1) + "\n")
    with (directory / "est_overhead.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [key for key in report["rows"][0] if key != "blocks"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(report["rows"])


def draw(file: Path, report: dict[str, Any]) -> None:
    """A bar per workload for the measured ratio, with its range, and one for the published."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = report["rows"]
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for number, row in enumerate(rows):
        first = number == 0
        axes.bar(number - 0.2, row["ratio"], 0.4, color="#0072B2", label="measured here" if first else None)
        axes.plot([number - 0.2] * 2, [row["least"], row["greatest"]], color="0.2", linewidth=1)
        axes.bar(number + 0.2, row["published_ratio"], 0.4, color="0.7", label="published, V100" if first else None)
    axes.axhline(1.0, color="0.4", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [row["workload"] for row in rows])
    axes.set_ylabel("time per mini-batch,\nswitching on / off")
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"{report['device']}, torch {report['torch']}, {report['config']['ests']} ESTs", size=10)
    figure.savefig(file, dpi=120)
    plt.close(figure)


@hydra.main(version_base="1.3", config_path="../conf", config_name="est_overhead")
def main(config: DictConfig) -> None:
    """Command line."""
    console = Console()
    conf = OmegaConf.to_object(config)
    assert isinstance(conf, EstOverheadConf)
    directory = Path(HydraConfig.get().runtime.output_dir).resolve()
    file = directory / "est_overhead.json"
    try:
        if not conf.plot_only:
            write(measure(conf, directory), directory)
        elif not file.exists():
            raise ConfigError(f"`plot_only=true` finds no est_overhead.json in {directory}. HINT: hydra.run.dir=DIR.")
    except (ConfigError, RunFailedError, ImportError, ValueError) as error:
        console.print(f"{type(error).__name__}: {error}", markup=False, style="red")
        raise SystemExit(2) from error
    report = json.loads(file.read_text())
    draw(directory / "est_overhead.png", report)
    for row in report["rows"]:
        console.print(
            f"{row['workload']:13} on {row['on_ms']:9.2f} ms, off {row['off_ms']:9.2f} ms, ratio {row['ratio']:.3f}"
            f" ({row['least']:.3f} .. {row['greatest']:.3f}), published {row['published_ratio']:.3f}",
            soft_wrap=True,
        )


if __name__ == "__main__":
    main()
