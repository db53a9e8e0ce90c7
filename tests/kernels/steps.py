"""Twenty training steps of a workload under D2's `portable` policy: `python -m tests.kernels.steps SPEC.json`.

In a process of its own, because an emulated device type is an environment that a process starts with.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_easyscale import DeterminismCallback, RunRecord
from lightning_easyscale.devices import apply_environment, detect, environment_of
from lightning_easyscale.kernels import portable
from recipes.workloads import build

ROOT = Path(__file__).parents[2]
STEPS = 20


def pool() -> tuple[str, str]:
    """Two types whose common policy is `portable`: the CPU and this machine's GPU, or one of another machine."""
    found = detect()[0]
    return "cpu", found.name if found.kind == "cuda" else "h200"


def train(workload: dict[str, Any], folder: str, record: str, accelerator: str, steps: int) -> None:
    """Train, validate in the middle and at the end, and record all losses and the state at some steps."""
    record_run = RunRecord(record, digest_at=(1, 2, steps // 2))  # and the last
    pl.seed_everything(1, verbose=False)
    with portable():  # torch draws other initial weights on a CPU without AVX2
        module, data = build(workload, folder)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        callbacks=[DeterminismCallback("D2", pool=pool(), threads=2), record_run],
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=steps // 2,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == steps
    assert all(torch.isfinite(p).all() for p in module.parameters())


def train_on(device_type: str, workload: dict[str, Any], folder: Path, record: Path, *, steps: int = STEPS) -> Path:
    """`train` in a process of its own, on a GPU (``"gpu"``) or as an emulated type of the CPU."""
    accelerator, environment = "cuda", {}
    if device_type != "gpu":
        accelerator, environment = "cpu", environment_of(device_type, emulate=True)
    file = record.with_suffix(".json")
    file.write_text(json.dumps([workload, str(folder), str(record), accelerator, steps]))
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.steps", str(file)],
        cwd=ROOT,
        env=apply_environment(environment),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return record


if __name__ == "__main__":
    train(*json.loads(Path(sys.argv[1]).read_text()))
