"""What the progress bar shows of a job."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from lightning_easyscale import EasyScaleStrategy
from lightning_easyscale.placement import Placement
from lightning_easyscale.progress import Rates, split_by_type


class Model(BoringModel):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.randn(72, 32), batch_size=4)  # type: ignore[arg-type]


def test_rates_look_back_ten_seconds() -> None:
    rates = Rates()
    assert rates(0, 0, now=100.0) == []
    assert rates(5, 20, now=101.0) == [5.0, 20.0]
    for second in range(2, 40):
        found = rates(5, 20 + 8 * second, now=100.0 + second)
    assert found == [0.0, 8.0]


@pytest.mark.parametrize(
    ("split", "types", "shown"),
    [
        ((4,), ["h100"], "h100:4"),
        ((2, 1, 1), ["v100", "p100", "v100"], "v100:2+1 p100:1"),
        ((2, 2), ["v100"], "2+2"),
    ],
)
def test_devices_of_one_type_stand_together(split: tuple[int, ...], types: list[str], shown: str) -> None:
    assert split_by_type(Placement(split), types) == shown


@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
def test_the_bar_shows_the_job_while_it_trains_and_is_as_before_afterwards(kind: Any, tmp_path: Any) -> None:
    shown: list[dict[str, Any]] = []

    class Bar(kind):  # type: ignore[misc]
        def get_metrics(self, trainer: Any, model: Any) -> Any:
            return {"own": 1}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args)
            if trainer.global_rank == 0:
                shown.append(self.get_metrics(trainer, pl_module))

    trainer = pl.Trainer(
        strategy=EasyScaleStrategy(num_ests=3),
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        accumulate_grad_batches=2,
        callbacks=[Bar()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Model())
    assert len(shown) == 6
    assert all(items["own"] == 1 and items["ESTs"] == "cpu:3" for items in shown)
    last = shown[-1]
    # Two micro-batches of four samples on three ESTs are one optimizer step.
    assert float(last["samples/s"]) / float(last["steps/s"]) == pytest.approx(2 * 4 * 3, rel=0.5)
    assert trainer.progress_bar_callback is not None
    assert "get_metrics" not in vars(trainer.progress_bar_callback)
