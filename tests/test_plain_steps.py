"""Hooks between a training step and the update: left out only where nobody has any, and counted all the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.precision import Precision
from torch.utils.data import DataLoader

from lightning_easyscale import EasyScaleStrategy

N, STEPS = 3, 4
MODULE_HOOKS = (
    "on_before_zero_grad",
    "optimizer_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "optimizer_step",
    "backward",
)
CALLBACK_HOOKS = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")


class Model(BoringModel):
    """Notes what its EST's strategy leaves out, and what gradients and counters are after each step."""

    left_out: dict[int, tuple[bool, bool]] = {}
    shown: list[Any] = []
    progress: dict[int, Any] = {}
    calls: Counter[int] = Counter()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.randn(N * STEPS, 32))  # type: ignore[arg-type]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        strategy = self.trainer.strategy
        if isinstance(strategy, EasyScaleStrategy):
            self.left_out[self.global_rank] = strategy.plain_steps, strategy.only_follows
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.shown.append(self.layer.weight.grad)

    def on_train_end(self) -> None:
        loop = self.trainer.fit_loop.epoch_loop.automatic_optimization
        self.progress[self.global_rank] = loop.optim_progress.state_dict()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def counting(base: type[Any], hook: str, rank: Any) -> type[Any]:
    """A subclass that counts the calls of a hook by rank."""
    original = getattr(base, hook)

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        Model.calls[rank(self, *args)] += 1
        return original(self, *args, **kwargs)

    return type("Counting", (base,), {hook: counted})


def fit(model: Model, strategy: Any = None, **options: Any) -> pl.Trainer:
    Model.left_out, Model.shown, Model.progress, Model.calls = {}, [], {}, Counter()
    trainer = pl.Trainer(
        strategy=strategy or EasyScaleStrategy(num_ests=N, reduction="tree"),
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model)
    return trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_where_nobody_has_a_hook_they_are_left_out(precision: str) -> None:
    fit(Model(), precision=precision, gradient_clip_val=0.5)
    assert Model.left_out == {0: (True, False), 1: (True, True), 2: (True, True)}
    assert len(Model.shown) == N * STEPS
    # Every EST sees each step's reduced gradients: the lead's, and the same ones.
    assert all(grad is not None for grad in Model.shown)
    for step in zip(*(Model.shown[rank::N] for rank in range(N)), strict=True):
        assert len({grad.data_ptr() for grad in step}) == 1


@pytest.mark.filterwarnings("error:Detected call of `lr_scheduler.step")
def test_counters_advance_as_in_stock_lightning() -> None:
    fit(Model())
    ours = dict(Model.progress)
    fit(Model(), strategy="auto")
    assert ours == dict.fromkeys(range(N), Model.progress[0])


@pytest.mark.parametrize("hook", MODULE_HOOKS)
def test_a_hook_of_the_module_is_called_on_every_est(hook: str) -> None:
    fit(counting(Model, hook, lambda module, *args: module.global_rank)())
    assert Model.calls == dict.fromkeys(range(N), STEPS)
    assert set(Model.left_out.values()) == {(False, False)}


@pytest.mark.parametrize("hook", CALLBACK_HOOKS)
def test_a_hook_of_a_callback_is_called_on_every_est(hook: str) -> None:
    fit(Model(), callbacks=[counting(pl.Callback, hook, lambda callback, trainer, *args: trainer.global_rank)()])
    assert Model.calls == dict.fromkeys(range(N), STEPS)
    assert set(Model.left_out.values()) == {(False, False)}


class Adding(pl.Callback):
    """Adds a callback when training starts."""

    def __init__(self, added: type[pl.Callback]) -> None:
        self.added = added

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.callbacks.append(self.added())  # type: ignore[attr-defined]


def test_a_hook_that_is_added_late_is_called_on_every_est() -> None:
    added = counting(pl.Callback, "on_before_zero_grad", lambda callback, trainer, *args: trainer.global_rank)
    fit(Model(), callbacks=[Adding(added)])
    assert Model.calls == dict.fromkeys(range(N), STEPS)
    assert set(Model.left_out.values()) == {(False, False)}


class Plugin(Precision):
    """A precision plugin of the user's."""


@pytest.mark.parametrize("options", [{"profiler": "simple"}, {"plugins": [Plugin()]}], ids=["profiler", "plugin"])
def test_nothing_is_left_out_for_who_may_look(options: dict[str, Any]) -> None:
    fit(Model(), **options)
    assert set(Model.left_out.values()) == {(False, False)}


@pytest.mark.parametrize("watched", ["module", "all"])
def test_hooks_on_the_module_see_its_steps(watched: str) -> None:
    model = Model()

    def note(module: Any, args: Any, output: Any) -> None:
        if isinstance(module, Model):
            Model.calls[module.global_rank] += 1

    register = torch.nn.modules.module.register_module_forward_hook if watched == "all" else model.register_forward_hook
    handle = register(note)
    try:
        fit(model)
    finally:
        handle.remove()
    # As under DDP, which calls the module with its training step in place of `forward`; that calls `forward`.
    assert Model.calls == dict.fromkeys(range(N), 2 * STEPS)
