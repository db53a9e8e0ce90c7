"""Number formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision

from ..models import Model, train_val_data
from ..scenario import Script, feature

GROUP = "Precision"


@feature("bf16-mixed", GROUP, precision="bf16-mixed")
@feature("bf16-true", GROUP, precision="bf16-true")
@feature("16-true", GROUP, precision="16-true")
@feature("64-true", GROUP, precision="64-true")
@feature("32-true", GROUP, precision="32-true")
def precision(config: dict[str, Any], root: Path) -> Script:
    trainer = {"max_epochs": 1, "precision": config["precision"], "gradient_clip_val": 0.5}
    return Script(Model(), train_val_data(), trainer)


@feature("a precision plugin as Trainer(plugins=...)", GROUP)
def plugin(config: dict[str, Any], root: Path) -> Script:
    trainer = {"max_epochs": 1, "plugins": [MixedPrecision("bf16-mixed", "cpu")]}
    return Script(Model(), train_val_data(), trainer)


@feature("torch.set_float32_matmul_precision", GROUP)
def matmul_precision(config: dict[str, Any], root: Path) -> Script:
    torch.set_float32_matmul_precision("medium")
    return Script(Model(width=64), train_val_data(), {"max_epochs": 1})
