"""A record goes on where a checkpoint was taken: nothing is lost, and nothing old is recorded as new."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch import Callback

from lightning_easyscale import EasyScaleStrategy, RunRecord
from lightning_easyscale.compare import compare
from lightning_easyscale.record import est_file
from lightning_easyscale.stopping import TrainingStopped
from tests.launch.job import Classifier, loader, make_trainer


class Logging(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("epoch_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("seen", float(batch_idx), sync_dist=True)


class StopAfter(Callback):
    def __init__(self, batch: int | None) -> None:
        self.batch = batch
        self.lines: int | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch and trainer.global_rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def fit(root: Path, folder: Path | None, stop: int | None) -> None:
    strategy = EasyScaleStrategy(num_ests=2, threads_per_est=1, elastic_dir=folder)
    record = RunRecord(root / "record", flush_every_n_steps=1000)
    trainer = make_trainer(
        root, strategy=strategy, max_epochs=1, val_check_interval=6, callbacks=[record, StopAfter(stop)]
    )
    trainer.fit(Logging(), loader(80), loader(shuffle=False))


def test_metrics_of_before_are_not_recorded_as_new(tmp_path: Path) -> None:
    """Stopped between the last validation of an epoch and its end."""
    pl.seed_everything(3, verbose=False)
    fit(tmp_path / "whole", None, None)
    pl.seed_everything(3, verbose=False)
    with pytest.raises(TrainingStopped):
        fit(tmp_path / "parts", tmp_path / "job", 6)
    pl.seed_everything(3, verbose=False)
    fit(tmp_path / "parts", tmp_path / "job", None)
    difference = compare(tmp_path / "whole" / "record", tmp_path / "parts" / "record")
    assert difference is None, str(difference)


def test_a_checkpoint_comes_after_the_record_of_what_it_holds(tmp_path: Path) -> None:
    """Otherwise a process that is killed right after a checkpoint leaves a record with a hole."""
    seen: list[int] = []

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "x.ckpt")
                rank = trainer.global_rank
                seen.append(est_file(tmp_path / "record", rank).read_text().count('"kind":"step"'))

    strategy = EasyScaleStrategy(num_ests=2, threads_per_est=1)
    record = RunRecord(tmp_path / "record", flush_every_n_steps=1000)
    trainer = make_trainer(tmp_path, strategy=strategy, max_epochs=1, max_steps=4, callbacks=[record, Save()])
    trainer.fit(Classifier(), loader(), loader(shuffle=False))
    assert seen == [3, 3]


def test_metrics_of_a_run_that_ended_inside_an_epoch_give_way_to_those_of_the_whole_epoch(tmp_path: Path) -> None:
    """A run that `max_steps` ends writes an epoch's metrics after its last checkpoint; no whole run has those."""

    class SaveAfter(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    def run(folder: str, steps: int, resume: Path | None = None) -> None:
        pl.seed_everything(3, verbose=False)
        strategy = EasyScaleStrategy(num_ests=2, threads_per_est=1)
        callbacks = [RunRecord(tmp_path / folder), SaveAfter()]
        # the validation after step 3 comes after the checkpoint: it is run and recorded again
        options = {"val_check_interval": 3, "max_steps": steps, "max_epochs": 1}
        trainer = make_trainer(tmp_path, strategy=strategy, callbacks=callbacks, **options)
        trainer.fit(Logging(), loader(80), loader(shuffle=False), ckpt_path=resume)

    run("whole", 6)
    run("parts", 3)
    assert '"stage":"train","step":3' in est_file(tmp_path / "parts", 0).read_text()
    run("parts", 6, tmp_path / "x.ckpt")
    difference = compare(tmp_path / "whole", tmp_path / "parts")
    assert difference is None, str(difference)
