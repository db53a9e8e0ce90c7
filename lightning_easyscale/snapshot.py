"""The state of one EST, beyond what a Lightning checkpoint holds, and its way back.

A Lightning checkpoint is rank 0's. Each EST adds what is its own: generators, buffers, metric states, values that
`self.log` accumulates over the epoch, gradients inside an accumulation window, and its position in the data. All of it
is restored in `on_train_start`, after Lightning and DDP have set up and synchronised the module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from . import _lightning as pl
from .data.position import LoaderFollower
from .rng import Generators

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class ESTState:
    """Saves and restores one EST.

    Args:
        trainer: the EST's trainer.
        generators: the EST's generators.
        follower: follows the EST's training loaders.
    """

    def __init__(self, trainer: Trainer, generators: Generators, follower: LoaderFollower) -> None:
        self._trainer = trainer
        self._generators = generators
        self._follower = follower

    def state_dict(self, *, current: bool = True) -> dict[str, Any]:
        """Tensors, numbers, strings and plain containers; most tensors are the live ones, as in Lightning's checkpoint.

        Args:
            current: whether the process's generators are this EST's just now.
        """
        module = self._trainer.lightning_module
        if current:
            self._generators.capture()
        self._follower.keep(pl.training_loaders(self._trainer))
        return {
            "generators": self._generators.state_dict(),
            "buffers": {name: buffer.detach() for name, buffer in module.named_buffers()},
            "metrics": {name: _metric_state(metric) for name, metric in _metrics(module)},
            "logged": pl.logged_values(self._trainer),
            "shown": pl.shown_metrics(self._trainer),
            "gradients": self._gradients(module),
            "syncs_buffers": getattr(self._trainer.model, "require_forward_param_sync", True),
            "shared_workers": self._follower.shared_state_dict(pl.validation_loaders(self._trainer)),
            "data": self._follower.state_dict(
                inside_epoch=pl.inside_epoch(self._trainer), ahead=pl.batches_ahead(self._trainer)
            ),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state; called when training starts.

        Raises:
            DataStateError: if the data cannot be continued exactly.
            RuntimeError: if the module does not have the buffers or metrics of the checkpoint.
        """
        module = self._trainer.lightning_module
        buffers, metrics = dict(module.named_buffers()), dict(_metrics(module))
        for kind, mine, saved in (("buffer", buffers, state["buffers"]), ("metric", metrics, state["metrics"])):
            missing = saved.keys() - mine.keys()
            if missing:
                raise RuntimeError(
                    f"the checkpoint has the {kind} `{sorted(missing)[0]}`, the module does not."
                    " HINT: resume with the module that wrote it, or start from the weights only."
                )
        with torch.no_grad():
            for name, value in state["buffers"].items():
                buffers[name].copy_(value)
        for name, value in state["metrics"].items():
            _load_metric(metrics[name], value, module.device)
        pl.resume_logged_values(self._trainer, state["logged"])
        parameters = dict(module.named_parameters())
        for name, gradient in state["gradients"].items():
            parameters[name].grad = gradient.to(parameters[name].device)
        wrapper: Any = self._trainer.model
        if hasattr(wrapper, "require_forward_param_sync"):
            # After a forward that did not synchronise gradients, DDP's next one does not take rank 0's buffers either.
            wrapper.require_forward_param_sync = state["syncs_buffers"]
        self._follower.keep(pl.training_loaders(self._trainer))
        self._follower.resume_from(state["data"])
        self._generators.load_state_dict(self._follower.generators_after_resume(state["generators"]))
        self._generators.install()

    def _gradients(self, module: LightningModule) -> dict[str, Tensor]:
        """Gradients that wait for the rest of an accumulation window; empty at a step boundary."""
        if not pl.inside_accumulation(self._trainer):
            return {}
        return {name: p.grad.detach() for name, p in module.named_parameters() if p.grad is not None}


def _metrics(module: LightningModule) -> Iterator[tuple[str, Metric]]:
    return ((name, m) for name, m in module.named_modules() if isinstance(m, Metric))


def _metric_state(metric: Metric) -> dict[str, Any]:
    values = {
        name: [v.detach() for v in value] if isinstance(value, list) else value.detach()
        for name, value in metric.metric_state.items()
    }
    return {"values": values, "updates": metric.update_count}


def _load_metric(metric: Metric, state: dict[str, Any], device: torch.device) -> None:
    for name, value in state["values"].items():
        moved = [v.to(device) for v in value] if isinstance(value, list) else value.to(device)
        setattr(metric, name, moved)
    metric._update_count = state["updates"]
    metric._computed = None
