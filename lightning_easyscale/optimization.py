"""One optimizer step per executor: the lead's optimizer steps, the others' run their closures and wait.

Every EST still goes through Lightning's `optimizer_step`, so that hooks, scheduler bookkeeping and user collectives in
hooks happen on every rank. An optimizer that runs its closure several times (LBFGS) does so on the lead; the others
follow (`Turns`). Where user code may read parameters between backward and step, all ESTs meet before the lead steps,
so that none sees stepped parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.nn import Module
from torch.optim import Optimizer

from .runtime.bulk import assign, drop, gradients

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

_MODULE_HOOKS = (
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "optimizer_step",
    "backward",
)
_CALLBACK_HOOKS = ("on_after_backward", "on_before_optimizer_step")


class Turns:
    """How often the lead ran the closure in each optimizer step, so that the other ESTs follow.

    The lead runs ahead of the others (`Executor`), so when another EST has run a closure, the lead has already either
    begun the next one or finished the step.
    """

    def __init__(self) -> None:
        self._closures: dict[tuple[int, int], int] = {}

    def announce(self, optimizer: int, step: int, closures: int) -> None:
        """The lead is about to run its `closures`-th closure of this step."""
        self._closures[optimizer, step] = closures
        self._closures.pop((optimizer, step - 2), None)

    def closures(self, optimizer: int, step: int) -> int:
        """How many closures the lead has begun in this step."""
        return self._closures[optimizer, step]


def reads_before_step(module: LightningModule | None) -> bool:
    """Whether user code may run between the reduction of gradients and the optimizer's update."""
    assert module is not None
    if not module.automatic_optimization or any(is_overridden(hook, module) for hook in _MODULE_HOOKS):
        return True
    callbacks: list[Any] = module.trainer.callbacks  # type: ignore[attr-defined]
    return any(getattr(type(c), h) is not getattr(Callback, h) for c in callbacks for h in _CALLBACK_HOOKS)


def reads_gradients(module: LightningModule | None) -> bool:
    """Whether user code may see or change an EST's reduced gradients before the update, or keep them for later."""
    assert module is not None
    callbacks: list[Any] = module.trainer.callbacks  # type: ignore[attr-defined]
    return (
        reads_before_step(module)
        or is_overridden("on_before_zero_grad", module)
        or is_overridden("optimizer_zero_grad", module)
        or any(type(c).on_before_zero_grad is not Callback.on_before_zero_grad for c in callbacks)
    )


def plain_steps(module: LightningModule, precision: Precision) -> bool:
    """Whether no code but the module's forward runs from a training step to the end of the update.

    Then Lightning's own way there, hooks that do nothing among it, may be cut short (`_lightning_steps.py`).
    """
    callbacks: list[Any] = module.trainer.callbacks  # type: ignore[attr-defined]
    return (
        not reads_gradients(module)
        and not is_overridden("on_before_backward", module)
        and all(type(c).on_before_backward is Callback.on_before_backward for c in callbacks)
        and type(module.trainer.profiler) is PassThroughProfiler  # type: ignore[attr-defined]
        and type(precision).__module__.startswith("lightning.")
        and type(precision).optimizer_step in (Precision.optimizer_step, MixedPrecision.optimizer_step)
        and getattr(precision, "scaler", None) is None
    )


class ShownGradients:
    """An EST's view of the lead's reduced gradients, shown after the update instead of copies.

    The lead runs ahead of the others, so what it kept last is what an EST that has run the same closure should see.
    Gradients that the optimizers' `zero_grad` does not drop go on accumulating and are copied.

    Args:
        kept: the lead's gradients, shared by the ESTs of an executor.
        module: the EST's module.
        optimizers: its optimizers.
    """

    def __init__(self, kept: list[Tensor | None], module: Module, optimizers: Sequence[Optimizer]) -> None:
        stock = (o for o in optimizers if type(o).zero_grad is Optimizer.zero_grad)
        dropped = {id(p) for optimizer in stock for group in optimizer.param_groups for p in group["params"]}
        self._kept = kept
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._lasting = [(i, p) for i, p in enumerate(self._parameters) if id(p) not in dropped]

    def keep(self) -> None:
        """The lead is about to update."""
        self._kept[:] = gradients(self._parameters)
        for index, parameter in self._lasting:
            if parameter.grad is not None:
                self._kept[index] = parameter.grad.clone()

    def show(self) -> None:
        """Let another EST's parameters have the lead's gradients."""
        assign(self._parameters, self._kept)

    def part(self) -> None:
        """Before a backward: what accumulates must be the EST's own."""
        for _, parameter in self._lasting:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()


def clip_where_gradients_are(precision: Precision, *, has_gradients: bool) -> None:
    """Let an EST whose gradients are the lead's leave their clipping to the lead."""
    vars(precision).pop("clip_gradients", None)
    if not has_gradients:
        precision.clip_gradients = _clip_nothing  # type: ignore[method-assign]


def _clip_nothing(*_: Any, **__: Any) -> None:
    """The lead clips."""


class LeadState(MutableMapping[Any, Any]):
    """An optimizer's ``state`` that shows the lead's, under this EST's own parameters.

    Args:
        own: the EST's optimizer.
        lead: the lead's optimizer, with the same parameter groups.
    """

    def __init__(self, own: Optimizer, lead: Optimizer) -> None:
        self._own = own
        self._lead = lead

    def _pairs(self) -> Iterator[tuple[Any, Any]]:
        for mine, theirs in zip(self._own.param_groups, self._lead.param_groups, strict=False):
            yield from zip(mine["params"], theirs["params"], strict=False)

    def _theirs(self, key: Any) -> Any:
        return next((theirs for mine, theirs in self._pairs() if mine is key), key)

    def __getitem__(self, key: Any) -> Any:
        return self._lead.state[self._theirs(key)]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._lead.state[self._theirs(key)] = value

    def __delitem__(self, key: Any) -> None:
        del self._lead.state[self._theirs(key)]

    def __iter__(self) -> Iterator[Any]:
        mine = {id(theirs): own for own, theirs in self._pairs()}
        return iter([mine.get(id(key), key) for key in self._lead.state])

    def __len__(self) -> int:
        return len(self._lead.state)


def follow_lead(
    optimizer: Optimizer,
    index: int,
    turns: Turns,
    *,
    is_lead: bool,
    meet: Callable[[], None] | None,
    reduced: Callable[[], None] | None,
    watching_writes: Callable[[bool], AbstractContextManager[None]],
    watches_closure: Callable[[], bool],
) -> None:
    """Make an optimizer's `step` take its part among the ESTs of an executor.

    Args:
        optimizer: as `configure_optimizers` returned it; learning rate schedulers may already track its steps.
        index: its position among the optimizers.
        turns: shared by the executor's ESTs.
        is_lead: whether this EST's optimizer is the one that updates.
        meet: waits for the executor's ESTs before the update; None where nothing can tell the difference.
        reduced: called when a closure has run, before the update; None where there is nothing to do.
        watching_writes: guards the shared parameters against writes, or does not, inside a block.
        watches_closure: whether code of the user's may run in a closure.
    """
    steps = 0
    original = optimizer.step

    def lead_step(closure: Callable[[], Any] | None = None) -> Any:
        nonlocal steps
        step, closures = steps, 0
        steps += 1
        if closure is None:
            if meet is not None:
                meet()
            with watching_writes(False):
                return original()

        def counted() -> Any:
            nonlocal closures
            closures += 1
            turns.announce(index, step, closures)
            with watching_writes(watches_closure()):
                result = closure()
            if reduced is not None:
                reduced()
            if meet is not None:
                meet()
            return result

        with watching_writes(False):
            return original(counted)

    def other_step(closure: Callable[[], Any] | None = None) -> Any:
        nonlocal steps
        step, closures, result = steps, 0, None
        steps += 1
        if closure is None:
            if meet is not None:
                meet()
        else:
            while closures == 0 or turns.closures(index, step) > closures:
                with nullcontext() if torch.is_grad_enabled() else torch.enable_grad():
                    value = closure()
                if reduced is not None:
                    with watching_writes(False):
                        reduced()
                result = value if closures == 0 else result
                closures += 1
                if meet is not None:
                    meet()
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what a scheduler checks
        return result

    step = lead_step if is_lead else other_step
    # Schedulers made later must not wrap it again: they expect a method.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = step  # type: ignore[method-assign,assignment]
    if type(optimizer).zero_grad is Optimizer.zero_grad:
        clear = optimizer.zero_grad

        def zero_grad(set_to_none: bool = True) -> None:
            # It writes gradients alone, and each access to one would be looked at.
            with watching_writes(False):
                if not set_to_none:
                    clear(set_to_none)
                    return
                marked = record_function if torch.autograd._profiler_enabled() else nullcontext
                with marked(optimizer._zero_grad_profile_name):  # type: ignore[attr-defined]
                    for group in optimizer.param_groups:
                        drop(group["params"])

        optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
