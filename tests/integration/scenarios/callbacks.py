"""Callbacks that Lightning ships, beyond those of `trainer_features`."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateFinder,
    ModelSummary,
    OnExceptionCheckpoint,
    RichModelSummary,
    RichProgressBar,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from ..models import Model, train_data, train_val_data
from ..scenario import Script, feature, note, notes

GROUP = "Callbacks and trainer"


@feature("max_time, used up at once", GROUP, trainer={"max_time": {"seconds": 0}})
@feature("max_time, used up, min_steps", GROUP, trainer={"max_time": "00:00:00:00", "min_steps": 3})
def used_up(config: dict[str, Any], root: Path) -> Script:
    return Script(Model(), train_val_data(), {"max_epochs": 2, **config["trainer"]})


@feature("Timer by epoch, used up", GROUP)
def timer_by_epoch(config: dict[str, Any], root: Path) -> Script:
    trainer = {"max_epochs": 3, "callbacks": [Timer(timedelta(seconds=0), interval="epoch")]}
    return Script(Model(), train_val_data(), trainer)


@feature("LearningRateFinder", GROUP, files=False)
def lr_finder(config: dict[str, Any], root: Path) -> Script:
    callbacks = [LearningRateFinder(min_lr=1e-4, max_lr=0.5, num_training_steps=8, early_stop_threshold=None)]
    return Script(Model(), train_val_data(), {"max_epochs": 1, "callbacks": callbacks})


@feature("BatchSizeFinder, refused by Lightning", GROUP, same_error="MisconfigurationException")
def batch_size_finder(config: dict[str, Any], root: Path) -> Script:
    return Script(Model(), train_data(), {"max_epochs": 1, "callbacks": [BatchSizeFinder()]})


@feature("EarlyStopping: check_finite, divergence, on training epochs", GROUP)
def diverges(config: dict[str, Any], root: Path) -> Script:
    stop = EarlyStopping("train_loss_epoch", check_on_train_epoch_end=True, divergence_threshold=0.1)
    return Script(Model(), train_data(), {"max_epochs": 4, "callbacks": [stop]})


@feature("DeviceStatsMonitor of the CPU", GROUP, files="names", skip_without="psutil")
def cpu_stats(config: dict[str, Any], root: Path) -> Script:
    callbacks = [DeviceStatsMonitor(cpu_stats=True)]
    return Script(Model(), train_data(), {"callbacks": callbacks, "logger": CSVLogger(root), "log_every_n_steps": 1})


@feature("RichProgressBar, RichModelSummary once", GROUP, skip_without="rich")
def rich(config: dict[str, Any], root: Path) -> Script:
    callbacks = [RichProgressBar(), RichModelSummary(max_depth=2)]
    return Script(Model(), train_val_data(), {"callbacks": callbacks, "enable_progress_bar": True})


@feature("ModelSummary", GROUP)
def summary(config: dict[str, Any], root: Path) -> Script:
    return Script(Model(), train_data(), {"callbacks": [ModelSummary(max_depth=-1)], "enable_model_summary": True})


@feature("profiler: simple, to a file per rank", GROUP, files="names")
def simple_profiler(config: dict[str, Any], root: Path) -> Script:
    return Script(Model(), train_val_data(), {"profiler": SimpleProfiler(root / "profile", "simple")})


def _fit_twice(trainer: Any, script: Script, make_trainer: Any) -> None:
    trainer.fit(script.module, **script.data)
    trainer.fit_loop.max_epochs += 1
    trainer.fit(script.module, **script.data)
    written = Path(trainer.profiler.dirpath)
    # The file of rank 0 only: a process has one such profiler at a time, which follows the lead of its ESTs.
    _note_at_zero("written", sorted(p.name for p in written.iterdir() if p.name.endswith("-0.txt")))


def _note_at_zero(name: str, value: Any) -> None:
    if rank_zero_only.rank == 0:
        note(0, name, value)


@feature("profiler: PyTorch", GROUP, kind="pytorch", files=False)
@feature("profiler: advanced, to a file", GROUP, kind="advanced", files=False)
def process_profilers(config: dict[str, Any], root: Path) -> Script:
    kinds = {"pytorch": partial(PyTorchProfiler, export_to_chrome=False), "advanced": AdvancedProfiler}
    profiler = kinds[config["kind"]](root / "profile", "profile")
    return Script(Model(), train_data(), {"profiler": profiler}, main=_fit_twice)


class AllFail(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 2:
            raise ValueError("broken everywhere")
        return super().training_step(batch, batch_idx)


def _fit_and_catch(trainer: Any, script: Script, make_trainer: Any) -> None:
    try:
        trainer.fit(script.module, **script.data)
    except ValueError as error:
        _note_at_zero("error", str(error))
    # The EST that fails first, and runs ahead, ends the others where they are: rank 0 and the checkpoint are compared.
    for rank, values in notes().items():
        if rank > 0:
            values.clear()


@feature("OnExceptionCheckpoint", GROUP)
def on_exception(config: dict[str, Any], root: Path) -> Script:
    trainer = {"callbacks": [OnExceptionCheckpoint(root, "last words")]}
    return Script(AllFail(), train_data(), trainer, main=_fit_and_catch)
