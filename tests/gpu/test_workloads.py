"""On a GPU: every workload trains under D0 and D1 without an operation that raises, and gives the same bits again."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_easyscale import EasyScaleStrategy
from lightning_easyscale.digest import digest_state

pytest.importorskip("hydra")

from recipes.workloads import build, prepare

from ..recipes.test_workloads import NAMES, tiny

pytestmark = pytest.mark.gpu


def train(workload: dict[str, Any], directory: Any, level: str, accelerator: str = "cuda") -> Any:
    """Digest of the state after three steps and a validation of two ESTs on one device."""
    pl.seed_everything(1, verbose=False)
    module, data = build(workload, prepare(workload, directory))
    trainer = pl.Trainer(
        strategy=EasyScaleStrategy(num_ests=2, determinism=level, threads_per_est=2),
        accelerator=accelerator,
        devices=1,
        max_steps=3,
        max_epochs=-1,
        val_check_interval=3,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    return digest_state(module.state_dict())


@pytest.mark.parametrize("level", ["D0", "D1"])
@pytest.mark.parametrize("name", NAMES)
def test_workload_trains_and_repeats_its_bits(name: str, level: str, tmp_path_factory: Any) -> None:
    workload = tiny(name)
    directory = tmp_path_factory.getbasetemp() / "workloads"
    assert train(workload, directory, level) == train(workload, directory, level)
