"""Fig. 12: what determinism costs, for every workload.

``python -m recipes.determinism_overhead`` trains each workload on synthetic data in four ways that take turns, block by
block, in one process: non-deterministic with TF32 and without, D1, and D1+D2 by the portable kernels. Ratios are to the
non-deterministic step without TF32, of the same turn. Each workload's result is kept as it ends, so that a time limit
loses only what has not been measured; a run into the same ``hydra.run.dir`` goes on from there. Into it go
``determinism_overhead.json``, ``determinism_overhead.csv`` and ``determinism_overhead.png``, with the published ratios
beside: absolute times are those of other hardware and are not compared.
"""

from __future__ import annotations

import csv
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, List, Optional  # noqa: UP035  OmegaConf reads these at run time

import hydra
import lightning.pytorch as pl
import torch
from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_easyscale import determinism

from . import workloads
from ._config import ConfigError
from ._console import errors_as_lines, make_console
from ._machine import device_name
from ._ways import WAYS, in_force

PUBLISHED_MS = {
    "shufflenetv2": (216.3, 216.7, 469.7),
    "resnet50": (250.3, 268.8, 586.0),
    "vgg19": (258.6, 392.4, 1132.7),
    "yolov3": (473.1, 459.0, 549.1),
    "neumf": (10.3, 10.5, 10.7),
    "bert": (441.3, 440.6, 439.0),
    "electra": (442.0, 441.8, 443.3),
    "swin": (413.2, 411.4, 428.9),
}
"""Milliseconds per mini-batch on a V100, non-deterministic, deterministic and D2: EasyScale (SC'23), Figure 12."""


@dataclass
class DeterminismOverheadConf:
    """The whole configuration.

    Args:
        workloads: to measure.
        size: ``small``, or ``full`` for the published shapes.
        overrides: further ones of every workload, as on the command line: ``workload.batch_size=2``.
        blocks: timed blocks of each way.
        steps: training steps of a block.
        warmup: steps of each way before the first block, in which kernels are compiled and tuned.
        accelerator: ``auto``, ``cpu`` or ``gpu``.
        threads: CPU threads; default: all.
        plot_only: draw again what is in ``hydra.run.dir``.
    """

    workloads: List[str] = field(default_factory=lambda: list(PUBLISHED_MS))  # noqa: UP006
    size: str = "small"
    overrides: List[str] = field(default_factory=list)  # noqa: UP006
    blocks: int = 5
    steps: int = 4
    warmup: int = 2
    accelerator: str = "auto"
    threads: Optional[int] = None  # noqa: UP045
    plot_only: bool = False


ConfigStore.instance().store(name="determinism_overhead_schema", node=DeterminismOverheadConf)


def _ignored(*args: Any, **kwargs: Any) -> None:
    """What a module logs."""


class Training:
    """Steps of one workload on a batch that stays on the device.

    Args:
        workload: the fields of `WorkloadConf`.
        directory: for the workload's data.
        device: where to train.
    """

    def __init__(self, workload: dict[str, Any], directory: Path, device: torch.device) -> None:
        pl.seed_everything(1, verbose=False)
        self.module, data = workloads.build(workload, workloads.prepare(workload, directory))
        self.module.to(device).train()
        batch = next(iter(data.train_dataloader()))
        self.batch = self.module.transfer_batch_to_device(batch, device, 0)
        # Schedules ask the trainer for their length; steps without a trainer cannot log.
        self.module.trainer = pl.Trainer(max_steps=1000, accelerator="cpu", logger=False, barebones=True)
        made: Any = self.module.configure_optimizers()
        self.module.trainer = None
        self.module.log = self.module.log_dict = _ignored
        self.optimizer = made["optimizer"] if isinstance(made, dict) else made
        self.state = {k: v.detach().clone() for k, v in self.module.state_dict().items()}

    def step(self) -> Any:
        """One step; returns the loss."""
        self.optimizer.zero_grad()
        made: Any = self.module.training_step(self.batch, 0)
        loss = made["loss"] if isinstance(made, dict) else made
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def again(self) -> None:
        """The parameters of the beginning, so that no way trains into numbers that are slow or not finite."""
        self.module.load_state_dict(self.state)
        self.optimizer.state.clear()


def measure(conf: DeterminismOverheadConf, name: str, gpu: bool, directory: Path, tick: Callable[[], None]) -> Any:
    """The row of one workload; `tick` is called after each block."""
    device = torch.device("cuda" if gpu else "cpu")
    threads = conf.threads or determinism.default_threads(1)
    torch.set_num_threads(threads)
    workload = _workload(conf, name)
    training = Training(workload, directory / "data", device)
    force = {way: lambda way=way: in_force(way, threads=threads, device_type=device.type) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, set[str]] = {way: set() for way in WAYS}
    warmup: dict[str, float] = {}
    for block in range(-1, conf.blocks):
        for way in WAYS if block % 2 else reversed(WAYS):
            training.again()
            torch.manual_seed(1)
            with force[way]():
                _synchronize(gpu)
                start = time.perf_counter()
                for _ in range(conf.steps if block >= 0 else conf.warmup):
                    loss = training.step()
                _synchronize(gpu)
                spent = time.perf_counter() - start
            if block < 0:
                warmup[way] = spent
                continue
            seconds[way].append(spent / conf.steps)
            losses[way].add(float(loss).hex())
            tick()
    base, published = seconds["nondeterministic"], PUBLISHED_MS[name]
    row: dict[str, Any] = {"workload": name, "batch_size": workload["batch_size"]}
    for way in WAYS:
        ratios = [a / b for a, b in zip(seconds[way], base, strict=True)]
        row |= {
            f"{way}_ms": 1e3 * statistics.median(seconds[way]),
            f"{way}_ratio": statistics.median(ratios),
            f"{way}_least": min(ratios),
            f"{way}_greatest": max(ratios),
            f"{way}_same_loss": len(losses[way]) == 1,
        }
    d2_to_d1 = [a / b for a, b in zip(seconds["d2"], seconds["d1"], strict=True)]
    row |= {"d2_to_d1": statistics.median(d2_to_d1), "published_d1_ratio": published[1] / published[0]}
    row |= {"published_d2_ratio": published[2] / published[0], "warmup_s": warmup, "blocks_s": seconds}
    return row


def _workload(conf: DeterminismOverheadConf, name: str) -> dict[str, Any]:
    from . import learn  # noqa: F401  registers the schema that is composed

    suffix = "_full" if conf.size == "full" else ""
    overrides = [f"workload={name}{suffix}", "workload.data=synthetic", *conf.overrides]
    made: Any = OmegaConf.to_container(compose("learn", overrides=overrides).workload, resolve=True)
    return made  # type: ignore[no-any-return]


def _synchronize(gpu: bool) -> None:
    if gpu:
        torch.cuda.synchronize()


def run(conf: DeterminismOverheadConf, directory: Path, console: Console) -> None:
    """Measure the workloads that ``determinism_overhead.json`` lacks, writing it after each.

    Raises:
        ConfigError: naming the key and the cure.
    """
    if unknown := set(conf.workloads) - set(PUBLISHED_MS):
        raise ConfigError(f"`workloads` has {sorted(unknown)[0]!r}. HINT: there are {', '.join(PUBLISHED_MS)}.")
    if conf.size not in ("small", "full") or min(conf.blocks, conf.steps, conf.warmup) < 1:
        raise ConfigError("`size` is 'small' or 'full', `blocks`, `steps` and `warmup` at least 1.")
    gpu = conf.accelerator == "gpu" or (conf.accelerator == "auto" and torch.cuda.is_available())
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(gpu),
        "torch": torch.__version__,
        "config": {key: value for key, value in vars(conf).items() if key not in ("workloads", "plot_only")},
        "rows": [],
    }
    file = directory / "determinism_overhead.json"
    if file.exists():
        found = json.loads(file.read_text())
        if any(found[key] != report[key] for key in ("device", "torch", "config")):
            raise ConfigError(f"{file} was measured in another way. HINT: use another hydra.run.dir.")
        report = found
    left = [name for name in conf.workloads if name not in {row["workload"] for row in report["rows"]}]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        for name in left:
            bar = bars.add_task(name, total=conf.blocks * len(WAYS))
            report["rows"].append(measure(conf, name, gpu, directory, lambda bar=bar: bars.advance(bar)))
            write(report, directory)
            console.print(text(report["rows"][-1]), soft_wrap=True)
            if gpu:
                torch.cuda.empty_cache()


def text(row: dict[str, Any]) -> str:
    """A line for people."""
    ways = ", ".join(f"{way} {row[f'{way}_ratio']:.3f}" for way in WAYS if way != "nondeterministic")
    return (
        f"{row['workload']:13} {row['nondeterministic_ms']:9.2f} ms; times that: {ways}"
        f" (published: D1 {row['published_d1_ratio']:.2f}, D2 {row['published_d2_ratio']:.2f})"
    )


def write(report: dict[str, Any], directory: Path) -> None:
    """``determinism_overhead.json`` and ``determinism_overhead.csv``."""
    (directory / "determinism_overhead.json").write_text(json.dumps(report, indent=1) + "\n")
    with (directory / "determinism_overhead.csv").open("w", newline="") as file:
        names = [key for key in report["rows"][0] if key not in ("blocks_s", "warmup_s")]
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(report["rows"])


def draw(file: Path, report: dict[str, Any]) -> None:
    """For each workload bars of the measured ratios, with their ranges, and of the published ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = report["rows"]
    figure, axes = plt.subplots(figsize=(11, 4), layout="constrained")
    bars = [("tf32", "TF32", "#999999"), ("d1", "D1", "#56B4E9"), ("d2", "D1+D2", "#0072B2")]
    published = [
        ("published_d1_ratio", "D1, published, V100", "#F0E442"),
        ("published_d2_ratio", "D2, published, V100", "#E69F00"),
    ]
    for number, row in enumerate(rows):
        for place, (way, label, color) in enumerate(bars):
            at = number + 0.16 * (place - 2)
            axes.bar(at, row[f"{way}_ratio"], 0.16, color=color, label=None if number else label)
            axes.plot([at] * 2, [row[f"{way}_least"], row[f"{way}_greatest"]], color="0.2", linewidth=1)
        for place, (key, label, color) in enumerate(published, len(bars)):
            axes.bar(number + 0.16 * (place - 2), row[key], 0.16, color=color, label=None if number else label)
    axes.axhline(1.0, color="0.4", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [f"{row['workload']}\nbatch {row['batch_size']}" for row in rows])
    axes.set_ylabel("time per mini-batch /\nnon-deterministic without TF32")
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"{report['device']}, torch {report['torch']}, size={report['config']['size']}", size=10)
    figure.savefig(file, dpi=120)
    plt.close(figure)


@hydra.main(version_base="1.3", config_path="../conf", config_name="determinism_overhead")
def main(config: DictConfig) -> None:
    """Command line."""
    console = make_console()
    conf = OmegaConf.to_object(config)
    assert isinstance(conf, DeterminismOverheadConf)
    directory = Path(HydraConfig.get().runtime.output_dir).resolve()
    file = directory / "determinism_overhead.json"
    with errors_as_lines(console, resume=f"hydra.run.dir={directory}"):
        if not conf.plot_only:
            run(conf, directory, console)
        elif not file.exists():
            raise ConfigError(f"`plot_only=true` finds no {file.name} in {directory}. HINT: hydra.run.dir=DIR.")
    report = json.loads(file.read_text())
    draw(directory / "determinism_overhead.png", report)
    for row in report["rows"]:
        console.print(text(row), soft_wrap=True)


if __name__ == "__main__":
    main()
