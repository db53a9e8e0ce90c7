"""One process of a run: a stock DDP rank, or an executor. Runs the script and notes everything that is compared."""

from __future__ import annotations

import dataclasses
import faulthandler
import importlib
import os
import pickle
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_easyscale import DeterminismCallback, EasyScaleStrategy, ordered_allreduce_hook

from ..elastic.faults import Fault, inject
from .exact import exact
from .scenario import Script, note, notes

SEED = 7


@dataclass(frozen=True)
class Task:
    """What one process has to do.

    Args:
        build: the scenario, ``module:function``.
        config: its config.
        root: folder that the run writes to.
        num_ests: N.
        index: rank of a stock process, index of an executor.
        port: where the processes meet.
        placement: ESTs per executor; None: a stock run.
        reduction: order of gradient sums.
        stop_at: (batch, save) pairs: micro-batch after which a checkpoint is saved, and where.
        resume: the checkpoint to start from.
        watch: whether the state is noted after every step.
        environment: more variables.
        determinism: what a stock run's `DeterminismCallback` gets.
        strategy: more arguments of the strategy.
        faults: what happens to the run.
    """

    build: str
    config: dict[str, Any]
    root: str
    num_ests: int
    index: int
    port: int
    placement: tuple[int, ...] | None = None
    reduction: str = "auto"
    stop_at: int | None = None
    save: str | None = None
    resume: str | None = None
    watch: bool = True
    environment: dict[str, str] = field(default_factory=dict)
    determinism: dict[str, Any] = field(default_factory=lambda: {"level": "D1"})
    faults: tuple[Fault, ...] = ()
    strategy: dict[str, Any] = field(default_factory=dict)


class OrderedDDP(DDPStrategy):
    """Stock DDP with the ordered hook, which Lightning itself registers on CUDA only."""

    def _register_ddp_hooks(self) -> None:
        self.model.register_comm_hook(None, ordered_allreduce_hook)  # type: ignore[union-attr,operator]


class Watch(Callback):
    """Notes what every hook shows."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.batches = 0

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]

    def _state(self, trainer: Trainer, module: LightningModule, when: str) -> None:
        rank = trainer.global_rank
        step = f"{when} {self.batches}/{trainer.global_step}"
        note(rank, f"{step} parameters", dict(module.named_parameters()))
        note(rank, f"{step} buffers", dict(module.named_buffers()))
        note(rank, f"{step} optimizers", [_numbered(o.state_dict(), rank) for o in trainer.optimizers])

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, i: int) -> None:
        self.batches += 1
        note(trainer.global_rank, f"train {self.batches} outputs", outputs)
        note(trainer.global_rank, f"train {self.batches} metrics", dict(trainer.callback_metrics))
        if self.task.watch:
            self._state(trainer, module, "train")
        if self.task.stop_at == self.batches:
            trainer.save_checkpoint(self.task.save)  # type: ignore[arg-type]
            trainer.should_stop = True
            raise _Enough

    def _outputs(self, trainer: Trainer, outputs: Any, i: int, loader: int) -> None:
        note(trainer.global_rank, f"{trainer.state.stage} {loader}/{i} at {self.batches}", outputs)

    def on_validation_batch_end(self, t: Trainer, m: Any, outputs: Any, batch: Any, i: int, loader: int = 0) -> None:
        self._outputs(t, outputs, i, loader)

    def on_test_batch_end(self, t: Trainer, m: Any, outputs: Any, batch: Any, i: int, loader: int = 0) -> None:
        self._outputs(t, outputs, i, loader)

    def on_predict_batch_end(self, t: Trainer, m: Any, outputs: Any, batch: Any, i: int, loader: int = 0) -> None:
        self._outputs(t, outputs, i, loader)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        note(trainer.global_rank, f"epoch end {self.batches} metrics", dict(trainer.callback_metrics))
        self._state(trainer, module, "epoch end")

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        note(trainer.global_rank, f"validation end {self.batches} metrics", dict(trainer.callback_metrics))

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._state(trainer, module, "train end")

    def on_exception(self, trainer: Trainer, module: LightningModule, error: BaseException) -> None:
        if not isinstance(error, _Enough):
            note(trainer.global_rank, "exception", type(error).__name__)

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        metrics = {**trainer.callback_metrics, **{f"logged {k}": v for k, v in trainer.logged_metrics.items()}}
        note(trainer.global_rank, f"teardown {stage}", [metrics, trainer.current_epoch, trainer.global_step])


class WatchLast(Watch, Checkpoint):
    """As a `Checkpoint`, it comes after every other callback."""


class _Enough(BaseException):
    """Ends a stage right after its checkpoint."""


def _numbered(state: dict[str, Any], rank: int) -> dict[str, Any]:
    """An optimizer's state; LBFGS keeps a rank's own last loss, which is rank 0's in any checkpoint."""
    own = {"prev_loss"} if rank > 0 else set()
    kept = {k: {n: v for n, v in state["state"][k].items() if n not in own} for k in sorted(state["state"])}
    return {"state": kept, "groups": state["param_groups"]}


def _build(task: Task) -> Script:
    module, _, function = task.build.partition(":")
    return getattr(importlib.import_module(module), function)(dict(task.config), Path(task.root))


def _strategy(task: Task, options: dict[str, Any]) -> Any:
    if task.placement is not None:
        return EasyScaleStrategy(
            num_ests=task.num_ests,
            ests_per_executor=task.placement,
            threads_per_est=1,
            reduction=task.reduction,  # type: ignore[arg-type]
            **{**options, **task.strategy},
        )
    if task.reduction == "tree":
        return OrderedDDP(**options)
    return DDPStrategy(**options) if options else "ddp"


def run(task: Task) -> None:
    """Run the script of a task in this process."""
    seed_everything(SEED, workers=True, verbose=False)
    script = _build(task)

    def make_trainer(**arguments: Any) -> Trainer:
        callbacks = list(arguments.pop("callbacks", ()))
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": task.num_ests if task.placement is None else len(task.placement),
            "strategy": _strategy(task, script.ddp),
            "default_root_dir": task.root,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "max_epochs": 1,
        }
        # Without checkpoints Lightning takes no `Checkpoint`, and keeps the order in which callbacks are given.
        plain = arguments.get("barebones") or arguments.get("enable_checkpointing") is False
        watch = Watch(task) if plain else WatchLast(task)
        first: list[Callback] = [DeterminismCallback(threads=1, **task.determinism)] if task.placement is None else []
        first += inject(task.faults)
        return Trainer(**{**defaults, **arguments}, callbacks=[*first, *callbacks, watch])

    trainer = make_trainer(**script.trainer)
    if task.resume is not None:
        script.data["ckpt_path"] = task.resume
    script.main(trainer, script, make_trainer)


def _environment(task: Task) -> dict[str, str]:
    """What the launchers of stock DDP and of EasyScale give the processes they start."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(task.port), "NODE_RANK": "0"}
    if task.placement is None:
        return {**common, "LOCAL_RANK": str(task.index), "WORLD_SIZE": str(task.num_ests)}
    if task.index == 0:
        return {**common, "EASYSCALE_EXECUTOR": "0"}
    lead = sum(task.placement[: task.index])
    return {
        **common,
        "EASYSCALE_EXECUTOR": str(task.index),
        "LOCAL_RANK": str(lead),
        "WORLD_SIZE": str(task.num_ests),
    }


def main(file: str) -> int:
    """Run the task in `file` and write the answer to ``file.out``; returns the exit status."""
    faulthandler.dump_traceback_later(60, exit=True)
    task: Task = pickle.loads(Path(file).read_bytes())
    os.environ.update({**_environment(task), **task.environment})
    torch.set_num_threads(1)
    error, began = None, time.monotonic()
    try:
        run(task)
    except _Enough:
        pass
    except BaseException as raised:  # noqa: BLE001 - goes to the test
        traceback.print_exc()
        error = {
            "type": type(raised).__name__,
            "message": str(raised),
            "notes": getattr(raised, "__notes__", []),
            "traceback": traceback.format_exc(),
            "code": getattr(raised, "code", None),
        }
    answer = {"notes": notes(), "error": error, "seconds": time.monotonic() - began}
    Path(file + ".tmp").write_bytes(pickle.dumps(answer))
    os.replace(file + ".tmp", file + ".out")
    sys.stdout.flush()
    return 0


def describe(task: Task) -> str:
    """For messages."""
    return str(dataclasses.asdict(task))


__all__ = ["Task", "describe", "exact", "main", "run"]
