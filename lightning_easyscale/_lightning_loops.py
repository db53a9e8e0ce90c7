"""Lightning's loops, made to report the points at which all of a rank's state is known.

Like `_lightning.py`, and only for it, this file touches underscored Lightning names. There are three such points, named
by what follows: ``"validation"`` (a batch is complete, the validation that is due has not begun), ``"next_batch"`` and
``"next_epoch"``. A checkpoint that is taken there continues without anything being done twice.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.exceptions import SIGTERMException

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_MARKS = ("_last_global_step_saved", "_last_checkpoint_saved", "_defer_save_until_validation", "current_score")


@contextmanager
def _stop_left_to_boundaries(trainer: Trainer) -> Iterator[None]:
    """Lightning raises at the end of some hooks when ESTs have agreed to stop; the next boundary does that here."""
    try:
        yield
    except SIGTERMException as error:
        if type(error) is not SIGTERMException or not trainer.received_sigterm:
            raise


class _FitBoundaries:
    trainer: Any

    def on_run_start(self) -> None:
        self.trainer.strategy.checkpointing.resume_shown_metrics()
        super().on_run_start()  # type: ignore[misc]

    def on_advance_start(self) -> None:
        loop: Any = self
        if not loop.restarted_mid_epoch and not loop.restarted_on_epoch_end and not loop.restarted_on_epoch_start:
            self.trainer.strategy.boundaries.reached("next_epoch")
        super().on_advance_start()  # type: ignore[misc]

    def on_advance_end(self) -> None:
        with _stop_left_to_boundaries(self.trainer):
            super().on_advance_end()  # type: ignore[misc]


class _EpochBoundaries:
    trainer: Any

    def on_run_start(self, data_fetcher: Any) -> None:
        super().on_run_start(data_fetcher)  # type: ignore[misc]
        if self.trainer.strategy.boundaries.resumed_before == "next_batch":
            # The batch before is complete: nothing of it is done again, and no validation skipped.
            self._restarting = False

    def on_advance_end(self, data_fetcher: Any) -> None:
        loop: Any = self
        boundaries = self.trainer.strategy.boundaries
        if not loop._skip_next_val and loop._should_check_val_fx(data_fetcher):
            boundaries.reached("validation")
        with _stop_left_to_boundaries(self.trainer):
            super().on_advance_end(data_fetcher)  # type: ignore[misc]
        if not loop.done:
            boundaries.reached("next_batch")

    def _broadcast_sigterm_tensor(self) -> None:
        """Lightning's own way to agree on a stop, a collective in every step, is not needed."""


class _ValidationBoundaries:
    trainer: Any
    batch_progress: Any

    def reset(self) -> None:
        loop: Any = self
        begun_again = loop.restarted_mid_evaluation
        super().reset()  # type: ignore[misc]
        if begun_again:
            # Lightning would count the batch in which the validation was left a second time.
            total = self.batch_progress.total
            total.ready = total.started = total.completed

    def _evaluation_step(self, *args: Any) -> None:
        with _stop_left_to_boundaries(self.trainer):
            super()._evaluation_step(*args)  # type: ignore[misc]
        if not self.batch_progress.is_last_batch:
            self.trainer.strategy.boundaries.in_validation()


def report_boundaries(trainer: Trainer) -> None:
    """Let the loops of `trainer` call its strategy's `boundaries`."""
    fit: Any = trainer.fit_loop
    for loop, reporting in (
        (fit, _FitBoundaries),
        (fit.epoch_loop, _EpochBoundaries),
        (fit.epoch_loop.val_loop, _ValidationBoundaries),
    ):
        if not isinstance(loop, reporting):
            loop.__class__ = type(type(loop).__name__, (reporting, type(loop)), {})


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """This rank's Lightning checkpoint; its tensors are the live ones."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def position(trainer: Trainer) -> tuple[int, int]:
    """Optimizer steps and micro-batches done since the start of training."""
    return trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.total.ready


def validation_batches(trainer: Trainer) -> list[int | float] | None:
    """How many batches each validation loader gives; None while unknown."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    return None if loop._combined_loader is None else list(loop.max_batches)


def continue_with(trainer: Trainer, following: str) -> None:
    """Called when training starts from a checkpoint of a boundary."""
    if following == "next_epoch":
        # Under `max_steps` Lightning takes a finished epoch for one that is to be continued.
        trainer.fit_loop.epoch_loop.restarting = False


def unsaved_state(trainer: Trainer) -> dict[str, Any]:
    """What decides how training goes on and is in no state of Lightning's, as plain data."""
    return {
        "should_stop": trainer.should_stop,
        "files": [_files(saver) for saver in trainer.checkpoint_callbacks],
        "savers": [
            {name: getattr(saver, name) for name in _MARKS if hasattr(saver, name)}
            for saver in trainer.checkpoint_callbacks
        ],
    }


def load_unsaved_state(trainer: Trainer, state: dict[str, Any]) -> None:
    """Put back what `unsaved_state` returned."""
    trainer.should_stop = state["should_stop"]
    for saver, then in zip(trainer.checkpoint_callbacks, state["files"], strict=False):
        # What the life before has saved after this point is saved again, under the same names.
        redone = set(trainer.strategy.broadcast(sorted(set(_files(saver)) - set(then))))
        if redone:
            saver.file_exists = _unless(redone, saver.file_exists)  # type: ignore[attr-defined]
    for saver, marks in zip(trainer.checkpoint_callbacks, state["savers"], strict=False):
        for name, value in marks.items():
            setattr(saver, name, value)


def _files(saver: Any) -> list[str]:
    folder = getattr(saver, "dirpath", None)
    return sorted(os.listdir(folder)) if folder is not None and os.path.isdir(folder) else []


def _unless(redone: set[str], file_exists: Callable[..., bool]) -> Callable[..., bool]:
    def exists(filepath: Any, trainer: Trainer) -> bool:
        name = os.path.basename(filepath)
        if name in redone:
            redone.discard(name)  # from then on it is this life's
            return False
        return file_exists(filepath, trainer)

    return exists


def with_checkpoint(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], path: str
) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Arguments for a trainer's `fit` that make it start from `path`, and what it was to start from before."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    given, bound.arguments["ckpt_path"] = bound.arguments["ckpt_path"], path
    return bound.args, bound.kwargs, given
