"""Logging and metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from torchmetrics import CatMetric, MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from ..models import Model, train_data, train_val_data
from ..scenario import Script, feature, note

GROUP = "Metrics and logging"


class Logs(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("step", loss, on_step=True, on_epoch=False)
        self.log("epoch", loss, on_step=False, on_epoch=True)
        self.log("synced_step", loss, on_step=True, on_epoch=True, sync_dist=True)
        for reduce_fx in ("min", "max", "sum", "mean"):
            self.log(reduce_fx, loss + batch_idx, on_step=False, on_epoch=True, reduce_fx=reduce_fx, sync_dist=True)
        self.log("integer", float(batch_idx), batch_size=3)
        if self.trainer.is_global_zero:
            self.log("zero", loss, rank_zero_only=True)
        self.log("flag", loss, rank_zero_only=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("at_end", float(self.global_rank), sync_dist=True)
        note(self.global_rank, "metrics", dict(self.trainer.callback_metrics))

    def on_validation_epoch_end(self) -> None:
        self.log("val_end", torch.tensor(float(self.global_rank)), sync_dist=True)


@feature("self.log: step, epoch, sync_dist, reduce_fx, rank_zero_only", GROUP, worlds=(2, 3))
def logs(config: dict[str, Any], root: Path) -> Script:
    return Script(Logs(), train_val_data(), {"max_epochs": 2})


class WithMetrics(Model):
    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(3)
        self.values = CatMetric()
        self.collection = MetricCollection({"accuracy": MulticlassAccuracy(3), "f1": MulticlassF1Score(3)})
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = torch.nn.functional.cross_entropy(logits, y)
        note(self.global_rank, "forward", self.accuracy(logits, y))
        self.log("train_accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.mean.update(loss)
        if batch_idx == 2:
            note(self.global_rank, "computed inside the epoch", self.mean.compute())
        return loss

    def on_train_epoch_end(self) -> None:
        note(self.global_rank, "mean", self.mean.compute())
        self.mean.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.collection.update(logits, y)
        self.values.update(logits[:, 0])

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.collection.compute())
        note(self.global_rank, "values", self.values.compute())
        self.collection.reset()
        self.values.reset()


@feature("torchmetrics: sum and list states, MetricCollection, compute inside the epoch", GROUP, worlds=(2, 3))
def metrics(config: dict[str, Any], root: Path) -> Script:
    return Script(WithMetrics(), train_val_data(), {"max_epochs": 2})


@feature("CSVLogger writes once", GROUP, logger="csv", worlds=(2, 3))
@feature("TensorBoardLogger writes once", GROUP, logger="tensorboard")
@feature("two loggers", GROUP, logger="both")
def loggers(config: dict[str, Any], root: Path) -> Script:
    csv, board = CSVLogger(root, name="csv"), TensorBoardLogger(root, name="board")
    chosen = {"csv": csv, "tensorboard": board, "both": [csv, board]}[config["logger"]]
    module = Logs()
    module.save_hyperparameters({"lr": 0.1})
    return Script(module, train_val_data(), {"max_epochs": 2, "logger": chosen, "log_every_n_steps": 2})


@feature("progress bar once", GROUP)
def progress_bar(config: dict[str, Any], root: Path) -> Script:
    return Script(Model(), train_data(), {"max_epochs": 1, "enable_progress_bar": True, "enable_model_summary": True})
