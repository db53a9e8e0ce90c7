"""Does a workload learn? A short run of ESTs on its real data, and its metric before and after.

``python -m recipes.learn workload=neumf hydra.run.dir=DIR`` trains `workload.learn_steps` optimizer steps with
``num_ests`` ESTs on one device and adds a row to ``learn.json`` and ``learn.md`` in DIR, one per workload.
The exit status is 1 if the metric has not come above twice its chance level by at least 0.1.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ._config import WorkloadConf
from ._console import errors_as_lines, make_console
from ._machine import device_name
from .workloads import build, prepare


@dataclass
class LearnConf:
    """The whole configuration.

    Args:
        workload: group.
        num_ests: ESTs, all on one device.
        determinism: level.
        accelerator: ``auto``, ``cpu`` or ``gpu``.
        threads: CPU threads per EST; default: all.
        seed: of ``seed_everything``.
    """

    workload: WorkloadConf = field(default_factory=WorkloadConf)
    num_ests: int = 2
    determinism: str = "D1"
    accelerator: str = "auto"
    threads: Optional[int] = None  # noqa: UP045  OmegaConf reads it at run time
    seed: int = 1


ConfigStore.instance().store(name="learn_schema", node=LearnConf)


def learn(conf: LearnConf, directory: Path) -> dict[str, Any]:
    """Train and validate; returns the row of the table."""
    import lightning.pytorch as pl

    from lightning_easyscale import EasyScaleStrategy, determinism

    workload = vars(conf.workload)
    pl.seed_everything(conf.seed, workers=True, verbose=False)
    module, data = build(workload, prepare(workload, directory / "data"))
    strategy = EasyScaleStrategy(
        num_ests=conf.num_ests,
        determinism=conf.determinism,
        threads_per_est=conf.threads or determinism.default_threads(1),
    )
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator=conf.accelerator,
        devices=1,
        max_steps=conf.workload.learn_steps,
        max_epochs=-1,
        limit_val_batches=0,  # only as asked for below
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
    )

    def metrics() -> dict[str, float]:
        trainer.limit_val_batches = 1.0
        return dict(trainer.validate(module, datamodule=data, verbose=False)[0])

    before = metrics()
    trainer.limit_val_batches = 0
    began = time.perf_counter()
    trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - began
    after = metrics()
    return {
        "workload": conf.workload.name,
        "metric": module.metric,
        "chance": module.chance,
        "before": before[module.metric],
        "after": after[module.metric],
        "steps": conf.workload.learn_steps,
        "batch": f"{conf.num_ests} x {conf.workload.batch_size}",
        "parameters": sum(p.numel() for p in module.parameters()),
        "seconds": round(seconds, 1),
        "loss_before": before["val_loss"],
        "loss_after": after["val_loss"],
        "determinism": conf.determinism,
        "data": conf.workload.data,
        "source": conf.workload.source,
        "device": device_name(strategy.root_device.type == "cuda"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config": workload,
    }


def has_learned(row: dict[str, Any]) -> bool:
    """Whether a run ended clearly above chance."""
    return bool(row["after"] >= 2 * row["chance"] + 0.1)


def write(row: dict[str, Any], directory: Path) -> list[dict[str, Any]]:
    """Put a row into ``learn.json`` and ``learn.md`` instead of its workload's last one; returns all rows."""
    file = directory / "learn.json"
    rows = {old["workload"]: old for old in json.loads(file.read_text())} if file.exists() else {}
    rows[row["workload"]] = row
    file.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
    (directory / "learn.md").write_text(table(list(rows.values())))
    return list(rows.values())


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| workload | parameters | steps | batch | metric | chance | before | after | seconds | device, torch, date |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = f"{row['chance']:.2f} | {row['before']:.3f} | {row['after']:.3f} | {row['seconds']:.0f}"
        where = f"{row['device']}, {row['torch']}, {row['date'][:10]}"
        lines.append(
            f"| {row['workload']} | {row['parameters']:,} | {row['steps']} | {row['batch']} | {row['metric']}"
            f" | {numbers} | {where} |"
        )
    return "\n".join(lines) + "\n"


@hydra.main(version_base="1.3", config_path="../conf", config_name="learn")
def main(config: DictConfig) -> None:
    """Command line."""
    console = make_console()
    conf = OmegaConf.to_object(config)
    assert isinstance(conf, LearnConf)
    directory = Path(HydraConfig.get().runtime.output_dir).resolve()
    with errors_as_lines(console, FileNotFoundError):
        row = learn(conf, directory)
    write(row, directory)
    console.print(
        f"{row['workload']}: {row['metric']} {row['before']:.3f} before, {row['after']:.3f} after {row['steps']} steps"
        f" ({row['seconds']:.0f} s), chance {row['chance']:.2f}. {directory / 'learn.md'}",
        soft_wrap=True,
    )
    if not has_learned(row):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
