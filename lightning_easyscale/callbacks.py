"""Two Lightning callbacks that work with every strategy, stock DDP included.

:class:`RunRecord` writes a run record (`record.py`), :class:`DeterminismCallback` applies a determinism level, so that
a stock ``Trainer(strategy="ddp", devices=N)`` becomes the reference run that an EasyScale job must equal.

A record holds what `training_step` returned, not what Lightning passes to `on_train_batch_end`: there the loss has
already been divided by `accumulate_grad_batches`, and a closure that ran several times (LBFGS) has left its last result
only. So while `fit` runs, the module's `training_step` is wrapped by a function that looks at its result and passes it
on.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from . import determinism, devices, kernels
from .portability import PortableKernels
from .record import digest_module, digest_optimizers, flatten_tensors
from .record_writer import RecordWriter


class RunRecord(Callback):
    """Records a run, bit for bit: one file per rank (EST) under ``dirpath``, read by `record.Record.load`.

    Nothing waits for the device except at the steps whose state is digested. A resumed run continues the record from
    its resume point; a run that starts anew moves an old record aside.

    Args:
        dirpath: directory of the record, shared by all ranks.
        digest_every_n_steps: digest parameters, buffers and optimizer state after every so many optimizer steps.
        digest_at: and after these numbers of optimizer steps; the end of the run is always digested.
        metrics: record the logged metrics of every epoch and validation too, and, where manual optimization returns no
            tensor, those of every step.
        flush_every_n_steps: hand over to the writing thread after so many micro-batches; at the latest every two
            seconds.

    Raises:
        ValueError: for an interval below 1.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str],
        *,
        digest_every_n_steps: int | None = None,
        digest_at: Iterable[int] = (),
        metrics: bool = True,
        flush_every_n_steps: int = 32,
    ) -> None:
        super().__init__()
        for name, value in (
            ("digest_every_n_steps", digest_every_n_steps),
            ("flush_every_n_steps", flush_every_n_steps),
        ):
            if value is not None and value < 1:
                raise ValueError(f"`{name}={value}` is not an interval. HINT: give a number of steps of at least 1.")
        self._dirpath = os.fspath(dirpath)
        self._digest_every = digest_every_n_steps
        self._digest_at = frozenset(digest_at)
        self._metrics = metrics
        self._flush_every = flush_every_n_steps
        self._writer: RecordWriter | None = None
        self._unwrap: Callable[[], None] | None = None
        self._batches: int | None = None  # micro-batches of the whole job that are done; None until known
        self._stages: list[str] = []  # whose metrics were recorded since the last micro-batch
        self._calls: list[tuple[int, Any]] = []  # (global step, result) of each training_step call of this micro-batch
        self._digested = -1  # global step of the last digest decision
        self._seen_metrics: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """Where the record stands, so that a resumed run continues it where this state was taken.

        What was recorded of them is in the file when this returns: a process that is killed after the checkpoint was
        committed has lost nothing of the record that the next one goes on with.
        """
        if self._writer is not None:
            self._writer.flush(wait=True)
        return {"batches": self._batches, "stages": self._stages.copy()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the micro-batches and metrics that the checkpoint counts."""
        self._batches, self._stages = state_dict["batches"], list(state_dict["stages"])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the count of another trainer's run; a checkpoint restores its own afterwards."""
        if stage == "fit" and trainer.fit_loop.total_batch_idx < 0:
            self._batches, self._stages = None, []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the record at the resume point and start to look at `training_step`."""
        if self._batches is None:  # a fresh run, or a checkpoint of a run that was not recorded
            self._batches = trainer.fit_loop.total_batch_idx + 1
        self._seen_metrics = dict(trainer.callback_metrics)  # a resumed run shows those of its checkpoint
        step = trainer.global_step
        self._writer = RecordWriter(
            self._dirpath,
            rank=trainer.global_rank,
            num_ests=trainer.world_size,
            resume_batch=self._batches,
            resume_step=step,
            resume_stages=self._stages,
            flush_every_n_steps=self._flush_every,
        )
        self._digested = step
        self._writer.event("start", step=step, batch=self._batches, data=_circumstances(trainer))
        self._wrap_training_step(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the micro-batch and, where one is due, the digests."""
        if self._writer is None or self._batches is None:
            return
        tensors: dict[str, Tensor] = {}
        for i, (_, result) in enumerate(self._calls):
            tensors.update({name + (f"@{i}" if i else ""): t for name, t in result.items()})
        step = self._calls[0][0] if self._calls else trainer.global_step
        self._calls.clear()
        if self._metrics and not tensors and not pl_module.automatic_optimization:
            tensors = self._fresh_metrics(trainer)
        self._writer.step(step=step, batch=self._batches, tensors=tensors)
        self._batches += 1
        self._stages.clear()
        done = trainer.global_step
        if done > self._digested and self._digest_due(self._digested, done):
            self._digest(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember which metrics are old."""
        self._seen_metrics = dict(trainer.callback_metrics)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the metrics of the epoch."""
        self._record_metrics(trainer, "train")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember which metrics are not the validation's."""
        self._seen_metrics = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the metrics of a validation inside `fit`."""
        if not trainer.sanity_checking:
            self._record_metrics(trainer, "validation")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Digest the final state and finish the file."""
        if self._writer is not None:
            self._digest(trainer, pl_module)
            self._finish()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Note the exception and finish the file."""
        if self._writer is not None:
            data = {"type": type(exception).__qualname__, "message": str(exception)}
            self._writer.event("exception", step=trainer.global_step, batch=self._batches or 0, data=data)
            self._finish()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finish the file if no other hook did."""
        self._finish()

    def _finish(self) -> None:
        if self._unwrap is not None:
            self._unwrap()
            self._unwrap = None
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def _wrap_training_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        inner = pl_module.training_step
        own = vars(pl_module).get("training_step")  # an instance attribute where `torch.compile` put one

        @functools.wraps(inner)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            # cloned at once: backward hooks and optimizers may write into what was returned
            tensors = {name: t.detach().clone() for name, t in flatten_tensors(result).items()}
            self._calls.append((trainer.global_step, tensors))
            return result

        def unwrap() -> None:
            del vars(pl_module)["training_step"]
            if own is not None:
                vars(pl_module)["training_step"] = own

        vars(pl_module)["training_step"] = training_step
        self._unwrap = unwrap

    def _digest_due(self, before: int, now: int) -> bool:
        """Whether a step in ``before + 1 .. now`` is to be digested: manual optimization may take several at once."""
        every = self._digest_every
        return bool(every and now // every > before // every) or any(before < s <= now for s in self._digest_at)

    def _digest(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._writer is not None
        assert self._batches is not None
        if self._digested == trainer.global_step and trainer.global_step > 0:
            return
        self._digested = trainer.global_step
        states = digest_module(pl_module)
        # ESTs of one executor share the optimizer state of their lead, who alone can show it
        if getattr(trainer.strategy, "is_lead", True):
            states["optimizer"] = digest_optimizers(trainer.optimizers, pl_module)
        self._writer.digest(step=trainer.global_step, batch=self._batches, states=states)

    def _record_metrics(self, trainer: pl.Trainer, stage: str) -> None:
        if self._writer is not None and self._metrics and (fresh := self._fresh_metrics(trainer)):
            self._writer.metrics(stage=stage, step=trainer.global_step, batch=self._batches or 0, tensors=fresh)
            self._stages.append(stage)

    def _fresh_metrics(self, trainer: pl.Trainer) -> dict[str, Tensor]:
        """Metrics that were computed anew: Lightning keeps old ones as the same objects; a resumed run shows some."""
        now = {name: value for name, value in trainer.callback_metrics.items() if isinstance(value, Tensor)}
        fresh = {name: value for name, value in now.items() if self._seen_metrics.get(name) is not value}
        self._seen_metrics = now
        return dict(sorted(fresh.items()))


class DeterminismCallback(Callback):
    """Applies a determinism level in every rank of any strategy: this makes a stock run a reference run.

    Args:
        level: ``"D0" | "D1" | "D0+D2" | "D1+D2"``, in any case; ``"D2"`` means ``"D1+D2"``.
        threads: CPU threads per rank. Default: ``max(1, cpu_count // world_size)``, what an EasyScale job of that many
            ESTs uses. The stock launchers choose by themselves otherwise, and the count changes bits.
        pool: with D2, the device types that the job may ever run on. Where they ask for other instruction sets than
            those in force, the script is started again, once, when the callback is made.
            A pool with a CUDA type has the policy `portable`: the run computes by the kernels of `kernels`.
        allow_operations: under `portable`, operations (``aten::cumsum``) that keep torch's kernels although nothing
            vouches for their bits.
        emulate: whether ``pool`` may name emulated types; default: what ``EASYSCALE_EMULATE`` says.

    Raises:
        ValueError: if the level is unknown, ``pool`` is missing under D2 or given without it, or ``threads`` is below
        1.
    """

    def __init__(
        self,
        level: str = "D1",
        *,
        threads: int | None = None,
        pool: Sequence[str] | None = None,
        emulate: bool | None = None,
        allow_operations: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self._level = determinism.Level.parse(level)
        if threads is not None and threads < 1:
            raise ValueError(f"`threads={threads}` cannot compute anything. HINT: give at least 1, or leave it out.")
        self._threads = threads
        self._record: dict[str, Any] | None = None  # of the flags while they are in force
        self._replacements: AbstractContextManager[None] | None = None  # of kernels or of the paths to them
        if self._level.heterogeneous and not pool:
            raise ValueError(f'`level="{level}"` needs `pool`. HINT: list every device type the job may ever run on.')
        if pool and not self._level.heterogeneous:
            raise ValueError(f'`pool` has no meaning under `level="{level}"`. HINT: leave it out, or choose "D1+D2".')
        self._policy = devices.d2_policy(pool, emulate=emulate) if pool else "pinned"
        self._kernels = PortableKernels(allow_operations) if self._policy == "portable" else None
        if pool and self._policy == "pinned":
            environment = devices.pinned_environment(list(pool), emulate=emulate)
            devices.ensure_environment(environment, why=f"{level} pins the instruction set of its pool")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set the flags and the number of threads in this rank, before anything is computed."""
        self._restore()
        device_type = trainer.strategy.root_device.type
        threads = self._threads or determinism.default_threads(trainer.world_size)
        self._record = determinism.apply(self._level, threads=threads, device_type=device_type, policy=self._policy)
        if self._kernels is not None:
            self._replacements = kernels.common_paths()
        elif device_type == "cuda":
            self._replacements = determinism.deterministic_replacements()
        if self._replacements is not None:
            self._replacements.__enter__()
        if self._kernels is not None:
            self._kernels.setup(trainer, pl_module, stage)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the flags back."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the flags back."""
        self._restore()

    def _restore(self) -> None:
        if self._kernels is not None:
            self._kernels.leave()
        if self._replacements is not None:
            self._replacements.__exit__(None, None, None)
            self._replacements = None
        if self._record is not None:
            determinism.restore(self._record)
            self._record = None


def _circumstances(trainer: pl.Trainer) -> dict[str, Any]:
    """Placement and fingerprint of a run, as plain data."""
    strategy = trainer.strategy
    device = strategy.root_device
    placement = getattr(strategy, "placement", None)  # EasyScaleStrategy's; stock strategies have one rank per device
    ests = [1] * trainer.world_size if placement is None else list(placement.ests_per_executor)
    types = [device_type.name for device_type in getattr(strategy, "device_types", ())]
    data: dict[str, Any] = {
        "strategy": type(strategy).__qualname__,
        "accelerator": type(trainer.accelerator).__qualname__,
        "device": str(device),
        "placement": {
            "ests_per_executor": ests,
            "executor": getattr(strategy, "executor_index", trainer.global_rank),
            "host_device_types": types,
        },
        "threads": torch.get_num_threads(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "host": socket.gethostname(),
        "fingerprint": determinism.fingerprint(types),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = f"{properties.major}.{properties.minor}"
        data["device_identity"] = [properties.name, capability, properties.multi_processor_count]
    return data
