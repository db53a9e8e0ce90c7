"""Lightning's training steps, without what does nothing.

Like `_lightning.py`, and only for it, this file touches underscored Lightning names. Between a training step and the
end of the update Lightning calls eight hooks, and what most modules and callbacks have there is empty. Each call costs
Python as much as a small operation, and an EST, which has a step of its own, makes all of them where an accumulated
batch makes two. What is left out is decided once (`optimization.plain_steps`); counters advance as they would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.nn.modules.module import _has_any_global_hook

from ._lightning import StockForwardRedirection
from .reduction.collector import ESTDataParallel

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class _PlainOptimization:
    trainer: Any
    optim_progress: Any

    def _make_zero_grad_fn(self, batch_idx: int, optimizer: Any) -> Callable[[], None] | None:
        with_hooks: Callable[[], None] | None = super()._make_zero_grad_fn(batch_idx, optimizer)  # type: ignore[misc]
        if with_hooks is None or not self.trainer.strategy.plain_steps:
            return with_hooks
        progress = self.optim_progress.optimizer.zero_grad

        def without() -> None:
            progress.increment_ready()
            progress.increment_started()
            optimizer.zero_grad()
            progress.increment_completed()

        return without

    def _optimizer_step(self, batch_idx: int, train_step_and_backward_closure: Callable[[], Any]) -> None:
        strategy = self.trainer.strategy
        if not strategy.only_follows:
            super()._optimizer_step(batch_idx, train_step_and_backward_closure)  # type: ignore[misc]
            return
        progress = self.optim_progress.optimizer.step
        progress.increment_ready()
        strategy.follow(train_step_and_backward_closure)
        progress.increment_completed()


class ForwardRedirection(StockForwardRedirection):
    """Sends a step through the wrapper; under manual optimization, gradients are reduced in `manual_backward`."""

    def __call__(self, wrapper_module: Any, original_module: Any, method_name: str, *args: Any, **kwargs: Any) -> Any:
        """The step, called by the wrapper at once where nobody would see `forward` called in its place."""
        plain = original_module.automatic_optimization and _has_no_hooks(wrapper_module, original_module)
        if plain and isinstance(wrapper_module, ESTDataParallel):
            return wrapper_module.run(getattr(original_module, method_name), *args, **kwargs)
        return super().__call__(wrapper_module, original_module, method_name, *args, **kwargs)

    def on_after_inner_forward(self, wrapper_module: Any, original_module: Any) -> None:
        """The forward inside must not announce a reduction."""
        if wrapper_module is not original_module and not original_module.automatic_optimization:
            wrapper_module.require_backward_grad_sync = False

    def on_after_outer_forward(self, wrapper_module: Any, original_module: Any) -> None:
        """Back to normal."""
        if wrapper_module is not original_module and not original_module.automatic_optimization:
            wrapper_module.require_backward_grad_sync = True


def shorten_steps(trainer: Trainer) -> None:
    """Let the automatic optimization of `trainer` leave out hooks where its strategy says that nobody would notice."""
    loop: Any = trainer.fit_loop.epoch_loop.automatic_optimization
    if not isinstance(loop, _PlainOptimization):
        loop.__class__ = type(type(loop).__name__, (_PlainOptimization, type(loop)), {})


def _has_no_hooks(*modules: Any) -> bool:
    """Whether calling a module is calling its `forward`."""
    return not _has_any_global_hook() and not any(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or m._compiled_call_impl is not None
        for m in modules
    )
