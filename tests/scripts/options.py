"""The command line of the scripts: what a user changes to go from one strategy to another, and what is recorded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_easyscale import DeterminismCallback, RunRecord


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def trainer(options: argparse.Namespace, *callbacks: Any, **arguments: Any) -> pl.Trainer:
    """A Trainer as the script wants it, recorded."""
    recorders = [RunRecord(options.out / "record", digest_every_n_steps=2)]
    if options.strategy.startswith("ddp"):
        recorders.append(DeterminismCallback("D1"))  # type: ignore[arg-type]
    return pl.Trainer(
        accelerator="cpu",
        strategy=options.strategy,
        devices=options.devices,
        default_root_dir=options.out,
        callbacks=[*callbacks, *recorders],
        enable_progress_bar=False,
        **arguments,
    )
