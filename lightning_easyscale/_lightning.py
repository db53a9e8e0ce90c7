"""The only place that touches underscored Lightning names.

Lightning may rename what it does not promise. Everything the package borrows is imported here, checked once, and named
in one error when a version lacks it.
"""

from __future__ import annotations

import builtins
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection

try:
    from lightning.fabric.strategies.launchers.subprocess_script import (
        _basic_subprocess_cmd,
        _ChildProcessObserver,
        _hydra_subprocess_cmd,
    )
    from lightning.fabric.utilities.seed import reset_seed
    from lightning.pytorch.overrides.distributed import _sync_module_states
    from lightning.pytorch.plugins.io import async_plugin
    from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
    from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
    from lightning.pytorch.strategies.strategy import _ForwardRedirection
    from lightning.pytorch.trainer.call import _interrupt
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
    from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
    from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
    from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
    from lightning.pytorch.utilities.rank_zero import rank_zero_only
except ImportError as error:
    from importlib.metadata import version

    raise ImportError(
        f"lightning_easyscale supports `lightning` 2.5 and 2.6, but found {version('lightning')}: {error}."
        " HINT: install `lightning>=2.5,<2.7`."
    ) from error

from .elastic.notice import STOPPED

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from .runtime.executor import Executor

__all__ = [
    "MultiProcessingLauncher",
    "StockForwardRedirection",
    "SubprocessScriptLauncher",
    "batches_ahead",
    "begin_fit",
    "continue_epoch",
    "copied_for_later",
    "follow_agreed_stop",
    "forget_loader_states",
    "forget_metric_names",
    "inside_accumulation",
    "inside_epoch",
    "observe_processes",
    "logged_values",
    "on_interrupt",
    "pending_after_batch",
    "requested_devices",
    "reset_seed",
    "rerun_command",
    "resume_at_pending",
    "resume_logged_values",
    "resume_shown_metrics",
    "set_rank",
    "shown_metrics",
    "steps_done",
    "sync_module_states",
    "trainer_flags",
    "training_loaders",
    "validation_loaders",
]

_META = (
    "fx",
    "name",
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "enable_graph",
    "add_dataloader_idx",
    "dataloader_idx",
    "metric_attribute",
)

_SHOWN = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")

MultiProcessingLauncher = _MultiProcessingLauncher
StockForwardRedirection = _ForwardRedirection
SubprocessScriptLauncher = _SubprocessScriptLauncher
sync_module_states = _sync_module_states


def set_rank(rank: int) -> None:
    """Let Lightning's ``rank_zero_only`` functions know which rank runs."""
    rank_zero_only.rank = rank  # type: ignore[attr-defined]


def trainer_flags() -> dict[str, Any]:
    """What the Trainer that is being built just now was given; empty outside its construction.

    Lightning turns `benchmark` and `deterministic` into process-wide flags and forgets them, and the flags do not tell
    ``deterministic=False`` from nothing given.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _AcceleratorConnector.__init__.__code__:
            return {name: frame.f_locals[name] for name in ("benchmark", "deterministic")}
        frame = frame.f_back  # type: ignore[assignment]
    return {}


def training_loaders(trainer: Trainer) -> list[Any]:
    """The loaders that the fit loop draws from, in their order; empty before they are set up."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def validation_loaders(trainer: Trainer) -> list[Any]:
    """The loaders that are validated with while fitting, in their order; empty before they are set up."""
    combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def batches_ahead(trainer: Trainer) -> int:
    """How many batches the fit loop has read and not trained on: it does so where it cannot know the last one."""
    return len(getattr(trainer.fit_loop._data_fetcher, "batches", ()))


def inside_epoch(trainer: Trainer) -> bool:
    """Whether a training epoch has begun and has batches left."""
    progress: Any = trainer.fit_loop.epoch_progress.total
    return progress.started > progress.processed and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def pending_after_batch(trainer: Trainer) -> str | None:
    """What of the current batch is still to come when a checkpoint is saved in ``on_train_batch_end``.

    Returns:
        ``"validation"``, ``"epoch_end"`` or None.
    """
    loop = trainer.fit_loop.epoch_loop
    total: Any = loop.batch_progress.total
    if total.completed == total.processed or trainer.fit_loop._data_fetcher is None:
        return None
    if loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
        return "validation"
    return "epoch_end" if loop.batch_progress.is_last_batch else None


def forget_loader_states(loops: dict[str, Any]) -> None:
    """Drop what Lightning saved of loaders with a `state_dict`: it is rank 0's and would be given to all ranks."""
    loops["fit_loop"]["state_dict"].pop("combined_loader", None)


def resume_at_pending(loops: dict[str, Any], pending: str | None) -> None:
    """Change a checkpoint's loop states so that Lightning goes on with what was pending instead of skipping it."""
    if pending not in ("validation", "epoch_end"):
        return
    fit = loops["fit_loop"]
    for progress in fit["epoch_loop.batch_progress"]["total"], fit["epoch_loop.batch_progress"]["current"]:
        progress["completed"] = progress["processed"]
    if pending == "validation":
        # As if the first validation batch had begun: Lightning then runs the validation from its start.
        validation = fit["epoch_loop.val_loop.batch_progress"]
        validation["current"].update(ready=0, started=0, processed=0, completed=0)
        for progress in validation["total"], validation["current"]:
            progress["ready"] += 1
            progress["started"] += 1
    else:
        fit["epoch_loop.state_dict"]["_batches_that_stepped"] += 1


def continue_epoch(trainer: Trainer, pending: str | None) -> None:
    """Called in ``on_train_start`` of a resumed run: a resumed epoch goes on, and ends, as any other.

    Args:
        trainer: the trainer.
        pending: from `pending_after_batch`.
    """
    fit = trainer.fit_loop
    # Lightning leaves out the step of the epoch's learning rate schedulers in a resumed epoch. What else it has to know
    # of the restart it has noted before this hook.
    fit._restarting = False
    progress: Any = fit.epoch_progress.total
    if progress.started > progress.processed and fit.epoch_loop.batch_progress.current.ready > 0:
        # The next batch is not the epoch's first: `self.log` must not drop what it has accumulated.
        trainer._logger_connector._first_loop_iter = True
    if pending == "epoch_end" and fit._data_fetcher is not None:
        # No batch is left; the loop finds out by asking for one.
        fit._data_fetcher.done = True


def inside_accumulation(trainer: Trainer) -> bool:
    """Whether gradients wait for the rest of an accumulation window."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready > 0 and trainer.fit_loop._should_accumulate()


def logged_values(trainer: Trainer) -> list[dict[str, Any]]:
    """What `self.log` has accumulated in this training epoch, as plain values and tensors.

    A metric object of the module's has its state there; that it was logged is noted here. A value reduced over a
    process group of the user's is left out: groups do not outlive the process.
    """
    return [
        {
            "key": key,
            "meta": {name: getattr(metric.meta, name) for name in _META},
            "reduce_fx": [metric.meta.reduce_fx.__name__, metric.meta.reduce_fx in (sum, min, max)],
            "sync": [metric.meta.sync.should, metric.meta.sync.rank_zero_only],
            "values": {name: value.detach().clone() for name, value in metric.metric_state.items()}
            if metric.is_tensor
            else None,
            "updates": metric.update_count,
        }
        for key, metric in trainer.fit_loop.epoch_loop._results.items()
        if metric.meta.on_epoch
        and not metric.has_reset
        and (metric.meta.sync.group is None if metric.is_tensor else metric.meta.metric_attribute is not None)
    ]


def resume_logged_values(trainer: Trainer, values: list[dict[str, Any]]) -> None:
    """Let `self.log` go on accumulating on top of `values` (from `logged_values`)."""
    results = trainer.fit_loop.epoch_loop._results
    for saved in values:
        name, builtin = saved["reduce_fx"]
        reduce_fx = getattr(builtins, name) if builtin else getattr(torch, name)
        meta = _Metadata(**saved["meta"], reduce_fx=reduce_fx)
        should, rank_zero = saved["sync"]
        meta.sync = _Sync(fn=trainer.strategy.reduce, _should=should, rank_zero_only=rank_zero)
        metric = results[saved["key"]] = _ResultMetric(meta, is_tensor=saved["values"] is not None)
        if saved["values"] is None:
            assert meta.metric_attribute is not None
            metric.value = trainer.lightning_module.get_submodule(meta.metric_attribute)
        for state, value in (saved["values"] or {}).items():
            setattr(metric, state, value.to(trainer.strategy.root_device))
        metric._update_count = saved["updates"]


def shown_metrics(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """What callbacks, loggers and the progress bar can see of logged values, as tensors."""
    connector = trainer._logger_connector
    if connector._first_loop_iter is not None:
        # Brings the three up to date; outside a batch that would reduce unfinished epoch values.
        connector.callback_metrics, connector.logged_metrics, connector.progress_bar_metrics  # noqa: B018
    return {
        name: {key: torch.as_tensor(value).detach().clone() for key, value in getattr(connector, name).items()}
        for name in _SHOWN
    }


def resume_shown_metrics(trainer: Trainer, shown: dict[str, dict[str, Any]]) -> None:
    """Put back what `shown_metrics` saved."""
    device = trainer.strategy.root_device
    for name in _SHOWN:
        values = {key: value.to(device) for key, value in shown[name].items()}
        if name == "_progress_bar_metrics":
            values = {key: value.item() for key, value in values.items()}
        setattr(trainer._logger_connector, name, values)


def forget_metric_names(module: LightningModule) -> None:
    """`self.log` remembers a module's metrics by identity, which a clone's are not."""
    module._metric_attributes = None


def steps_done(module: LightningModule) -> int:
    """Optimizer steps of the module's trainer; 0 before it has one."""
    return 0 if module._trainer is None else module.trainer.global_step


def requested_devices(trainer: Trainer) -> list[torch.device]:
    """The devices that the accelerator gave the Trainer, which strategies for one device do not keep."""
    return trainer._accelerator_connector._parallel_devices  # type: ignore[return-value]


def rerun_command(local_rank: int) -> tuple[list[str], str | None]:
    """The command that runs the user's script again, and its working directory (as stock DDP does)."""
    try:
        from hydra.core.hydra_config import HydraConfig

        in_use = HydraConfig.initialized()
    except ImportError:
        in_use = False
    if in_use:
        command, cwd = _hydra_subprocess_cmd(local_rank)
        return list(command), cwd
    return list(_basic_subprocess_cmd()), None


class _Observer(_ChildProcessObserver):
    """Ends all executors of the host when one has failed; one that a stop signal has ended is no failure."""

    def __init__(self, processes: list[subprocess.Popen[Any]], stopped: Callable[[], None]) -> None:
        super().__init__(main_pid=os.getpid(), child_processes=processes)
        self._stopped = stopped

    def _run(self) -> bool:
        codes = [process.poll() for process in self._child_processes]
        by_signal = (STOPPED, -signal.SIGTERM)  # the second before it listens
        if any(code not in (None, 0, *by_signal) for code in codes):
            return super()._run()
        if any(code in by_signal for code in codes):
            self._stopped()
        return None not in codes


def observe_processes(processes: list[subprocess.Popen[Any]], stopped: Callable[[], None]) -> None:
    """Watch the executors that this process has started, in a thread.

    Args:
        processes: the executors.
        stopped: called when one of them was ended by a stop signal.
    """
    _Observer(processes, stopped).start()


def on_interrupt(trainer: Trainer, error: BaseException) -> None:
    """What Lightning does with a trainer whose run ended by an exception."""
    _interrupt(trainer, error)
    trainer._teardown()
    trainer.state.stage = None


def begin_fit(trainer: Trainer) -> None:
    """Put `trainer` into the state in which `Trainer.fit` hands it to the launcher."""
    trainer.state.fn = TrainerFn.FITTING
    trainer.state.status = TrainerStatus.RUNNING
    trainer.training = True
    trainer.should_stop = False
    # `fit` makes both anew; clones are made before it does.
    trainer.fit_loop._combined_loader = trainer.fit_loop.epoch_loop.val_loop._combined_loader = None


def copied_for_later(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint that an `AsyncCheckpointIO` may write while training goes on: until 2.6 it did not copy tensors."""
    if hasattr(async_plugin, "_clone_tensor"):
        return checkpoint
    copied: dict[str, Any] = apply_to_collection(checkpoint, torch.Tensor, lambda tensor: tensor.detach().clone())
    return copied


class _AgreedStop(_SignalConnector):
    """Signal connector whose `received_sigterm` is one value for all ESTs, agreed at a rendezvous."""

    _easyscale_executor: Executor

    @property
    def received_sigterm(self) -> bool:  # type: ignore[override]
        """Whether all ESTs have agreed to stop."""
        return self._easyscale_executor.stop_agreed

    @received_sigterm.setter
    def received_sigterm(self, value: bool) -> None:
        """Ignored: only a rendezvous decides."""

    def register_signal_handlers(self) -> None:
        """Nothing: the executor listens from the start of `fit` (`elastic.notice`)."""


def follow_agreed_stop(trainer: Trainer, executor: Executor) -> None:
    """Let `trainer.received_sigterm` say whether the ESTs have agreed to stop."""
    connector = trainer._signal_connector
    connector.__dict__.pop("received_sigterm", None)
    connector.__class__ = _AgreedStop
    connector._easyscale_executor = executor  # type: ignore[attr-defined]
