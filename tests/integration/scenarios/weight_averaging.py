"""Averages of weights, which Lightning has from 2.6 on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging, WeightAveraging

from ..models import Model, loader, train_val_data
from ..scenario import Script, feature

GROUP = "Callbacks and trainer"


class EveryOther(WeightAveraging):
    """Averages after every second step and after epochs, evaluates and saves the average."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None or bool(step_idx % 2)


def _fit_and_test(trainer: Any, script: Script, make_trainer: Any) -> None:
    trainer.fit(script.module, **script.data)
    trainer.test(script.module, loader(24, shuffle=False))


@feature("WeightAveraging, every other step, BatchNorm averaged", GROUP, use_buffers=True, worlds=(2, 3))
@feature("WeightAveraging, buffers left alone", GROUP, use_buffers=False)
def weight_averaging(config: dict[str, Any], root: Path) -> Script:
    saver = ModelCheckpoint(dirpath=root / "ckpt", monitor="val_loss", save_top_k=2)
    callbacks = [EveryOther(use_buffers=config["use_buffers"]), saver]
    return Script(Model(), train_val_data(), {"max_epochs": 2, "callbacks": callbacks}, main=_fit_and_test)


@feature("EMAWeightAveraging with accumulation, from a later step", GROUP, worlds=(3,))
def late_ema(config: dict[str, Any], root: Path) -> Script:
    callbacks = [EMAWeightAveraging(decay=0.8, update_every_n_steps=2, update_starting_at_step=2)]
    trainer = {"max_epochs": 2, "callbacks": callbacks, "accumulate_grad_batches": 2, "val_check_interval": 2}
    return Script(Model(), train_val_data(), trainer)


@feature("EMAWeightAveraging", GROUP, worlds=(2, 3, 4))
def ema(config: dict[str, Any], root: Path) -> Script:
    callbacks = [EMAWeightAveraging(decay=0.7)]
    return Script(Model(), train_val_data(), {"max_epochs": 2, "callbacks": callbacks, "val_check_interval": 2})
