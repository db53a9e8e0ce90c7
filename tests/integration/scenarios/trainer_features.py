"""Callbacks and features of the Trainer."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    DeviceStatsMonitor,
    EarlyStopping,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from ..models import Model, loader, train_data, train_val_data
from ..scenario import Script, feature, note

GROUP = "Callbacks and trainer"


@feature(
    "ModelCheckpoint: top-k of a monitored metric, save_last",
    GROUP,
    worlds=(2, 3),
    options={"monitor": "val_loss", "save_top_k": 2, "save_last": True},
)
@feature("ModelCheckpoint: every n steps", GROUP, options={"every_n_train_steps": 3, "save_top_k": -1})
@feature(
    "ModelCheckpoint: on the end of training epochs",
    GROUP,
    options={"save_on_train_epoch_end": True, "monitor": "train_loss_epoch", "mode": "max"},
)
def model_checkpoint(config: dict[str, Any], root: Path) -> Script:
    saver = ModelCheckpoint(dirpath=root / "ckpt", filename="{epoch}-{step}-{val_loss:.4f}", **config["options"])
    return Script(Model(), train_val_data(), {"max_epochs": 3, "callbacks": [saver]})


@feature("EarlyStopping", GROUP, worlds=(2, 3))
def early_stopping(config: dict[str, Any], root: Path) -> Script:
    stop = EarlyStopping("val_loss", patience=1, min_delta=10.0)
    return Script(Model(), train_val_data(), {"max_epochs": 6, "callbacks": [stop]})


@feature("LearningRateMonitor", GROUP)
def rate_monitor(config: dict[str, Any], root: Path) -> Script:
    trainer = {"max_epochs": 2, "callbacks": [LearningRateMonitor()], "logger": CSVLogger(root), "log_every_n_steps": 1}
    return Script(Model(), train_data(), trainer)


@feature("StochasticWeightAveraging", GROUP, worlds=(2, 3), norm=False)
@feature("StochasticWeightAveraging with BatchNorm", GROUP, norm=True)
def swa(config: dict[str, Any], root: Path) -> Script:
    callbacks = [StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)]
    return Script(Model(norm=config["norm"]), train_val_data(), {"max_epochs": 4, "callbacks": callbacks})


class OwnEMA(Callback):
    """Written by hand: swaps by `.data`, by `copy_` and by `load_state_dict`."""

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.average = {name: value.detach().clone() for name, value in module.state_dict().items()}

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.average[name].mul_(0.9).add_(value, alpha=0.1)

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self.kept = {name: value.detach().clone() for name, value in module.state_dict().items()}
        module.load_state_dict(self.average)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        for name, parameter in module.named_parameters():
            parameter.data = self.kept[name].clone()
        for name, buffer in module.named_buffers():
            buffer.copy_(self.kept[name])
        with torch.no_grad():
            torch._foreach_mul_(list(module.parameters()), 1.01)
            module.net[0].weight[0] += 0.1
            module.net[0].bias.add_(torch.randn(8))
            nn.init.normal_(module.net[4].bias)
        note(trainer.global_rank, "swapped back", list(module.parameters()))


@feature("parameters written in hooks: swap, .data, load_state_dict, noise, init", GROUP, worlds=(2, 3, 4))
def own_ema(config: dict[str, Any], root: Path) -> Script:
    return Script(Model(), train_val_data(), {"max_epochs": 2, "callbacks": [OwnEMA()], "val_check_interval": 2})


@feature("Timer, max_time", GROUP)
def timer(config: dict[str, Any], root: Path) -> Script:
    trainer = {"max_epochs": 2, "callbacks": [Timer(timedelta(minutes=5))], "max_time": "00:00:05:00"}
    return Script(Model(), train_data(), trainer)


class Writer(BasePredictionWriter):
    def __init__(self, root: Path) -> None:
        super().__init__("batch_and_epoch")
        self.root = root

    def write_on_batch_end(self, trainer: Any, module: Any, prediction: Any, indices: Any, *args: Any) -> None:
        note(trainer.global_rank, "predicted", [prediction, indices])
        (self.root / f"{trainer.global_rank}-{args[1]}.txt").write_text(repr(indices))

    def write_on_epoch_end(self, trainer: Any, module: Any, predictions: Any, indices: Any) -> None:
        note(trainer.global_rank, "all predictions", [predictions, indices])


def _predict(trainer: Any, script: Script, make_trainer: Any) -> None:
    trainer.predict(script.module, dataloaders=loader(22, shuffle=False))


@feature("BasePredictionWriter", GROUP, worlds=(2, 3))
def prediction_writer(config: dict[str, Any], root: Path) -> Script:
    return Script(Model(), {}, {"callbacks": [Writer(root)]}, main=_predict)


@feature("DeviceStatsMonitor", GROUP, files=False)
def device_stats(config: dict[str, Any], root: Path) -> Script:
    return Script(Model(), train_data(), {"callbacks": [DeviceStatsMonitor()], "logger": CSVLogger(root)})


@feature("profiler: simple", GROUP, trainer={"profiler": "simple"}, files=False)
@feature("profiler: advanced", GROUP, trainer={"profiler": "advanced"}, files=False)
@feature("fast_dev_run", GROUP, trainer={"fast_dev_run": True})
@feature("detect_anomaly", GROUP, trainer={"detect_anomaly": True})
@feature("num_sanity_val_steps", GROUP, trainer={"num_sanity_val_steps": 2})
@feature("inference_mode=False", GROUP, trainer={"inference_mode": False})
@feature("max_epochs=0", GROUP, trainer={"max_epochs": 0})
@feature("barebones", GROUP, trainer={"barebones": True, "max_epochs": 2}, worlds=(2, 3))
@feature("enable_checkpointing=False", GROUP, trainer={"enable_checkpointing": False, "max_epochs": 2})
def trainer_option(config: dict[str, Any], root: Path) -> Script:
    return Script(Model(), train_val_data(), config["trainer"])


def _note_result(name: str, result: Any) -> None:
    if rank_zero_only.rank == 0:
        note(0, name, result)


def _sequence(trainer: Any, script: Script, make_trainer: Any) -> None:
    module, val = script.module, loader(30, shuffle=False)
    # Only rank 0's: the script itself runs once per executor, not once per EST.
    _note_result("validate", trainer.validate(module, val))
    trainer.fit(module, **script.data)
    _note_result("test", trainer.test(module, val))
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, **script.data)
    _note_result("predict", trainer.predict(module, val))
    module.extra = 1.5
    _note_result("validate", trainer.validate(module, val))


class Extra(Model):
    extra = 1.0

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) * self.extra


@feature("validate, fit, test, fit again, predict, validate", GROUP, worlds=(2, 3))
def sequence(config: dict[str, Any], root: Path) -> Script:
    return Script(Extra(), train_val_data(), {"max_epochs": 1}, main=_sequence)


def _two_trainers(trainer: Any, script: Script, make_trainer: Any) -> None:
    trainer.fit(script.module, **script.data)
    second = make_trainer(max_epochs=2)
    second.fit(script.module, **script.data)
    second.test(script.module, loader(30, shuffle=False))


@feature("a second Trainer on the same module", GROUP, worlds=(2, 3))
def two_trainers(config: dict[str, Any], root: Path) -> Script:
    return Script(Model(), train_val_data(), {"max_epochs": 1}, main=_two_trainers)


def _best(trainer: Any, script: Script, make_trainer: Any) -> None:
    trainer.fit(script.module, **script.data)
    _note_result("best", trainer.test(ckpt_path="best", dataloaders=loader(30, shuffle=False)))


@feature("test(ckpt_path='best')", GROUP, worlds=(2, 3))
def best(config: dict[str, Any], root: Path) -> Script:
    saver = ModelCheckpoint(dirpath=root / "ckpt", monitor="val_loss", save_top_k=1)
    return Script(Model(lr=0.5), train_val_data(), {"max_epochs": 3, "callbacks": [saver]}, main=_best)


class Stops(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 2:
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


@feature("trainer.should_stop", GROUP)
def should_stop(config: dict[str, Any], root: Path) -> Script:
    return Script(Stops(), train_val_data(), {"max_epochs": 3})


class SkipsEpoch(Model):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 else None


@feature("on_train_batch_start that returns -1", GROUP)
def skip_epoch(config: dict[str, Any], root: Path) -> Script:
    return Script(SkipsEpoch(), train_val_data(), {"max_epochs": 2})


class Remembers(Callback):
    def __init__(self) -> None:
        self.losses: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"] + trainer.global_rank)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        note(trainer.global_rank, "callback", self.losses)


class RankState(Model):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.register_buffer("count", torch.zeros(1))
        self.state = {"last": None}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += [batch_idx] * self.global_rank
        self.count += self.global_rank
        self.state["last"] = batch[0].sum()
        return super().training_step(batch, batch_idx)

    def on_fit_end(self) -> None:
        note(self.global_rank, "module", [self.seen, self.state, self.count])


@feature("per-rank Python state on module and callbacks", GROUP, worlds=(2, 3))
def rank_state(config: dict[str, Any], root: Path) -> Script:
    seen: list[int] = []
    record = LambdaCallback(on_train_batch_end=lambda trainer, *_: seen.append(trainer.global_rank))
    end = LambdaCallback(on_train_end=lambda trainer, _: note(trainer.global_rank, "closure", seen))
    callbacks = [Remembers(), record, end]
    return Script(RankState(), train_data(), {"max_epochs": 2, "callbacks": callbacks}, {"broadcast_buffers": False})


@feature("ModelPruning", GROUP)
def pruning(config: dict[str, Any], root: Path) -> Script:
    callbacks = [ModelPruning("l1_unstructured", amount=0.3, parameter_names=["weight"])]
    return Script(Model(norm=False), train_data(), {"max_epochs": 3, "callbacks": callbacks})
