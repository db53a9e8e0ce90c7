"""The recipes' workloads, as a user's script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..scenario import Script


def workload_job(config: dict[str, Any], root: Path) -> Script:
    """Two epochs of a few batches each, with validation.

    Args:
        config: ``workload``, the fields of `WorkloadConf`, and ``data``, the directory that `prepare` returned.
    """
    from recipes.workloads import build

    module, data = build(config["workload"], config["data"])
    trainer = {"max_epochs": 2, "limit_train_batches": 4, "limit_val_batches": 2, "enable_checkpointing": False}
    return Script(module, {"datamodule": data}, trainer)
