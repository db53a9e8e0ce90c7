"""What this strategy cannot be combined with, refused by name before anything starts."""

from __future__ import annotations

import sys
from typing import Any

from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn import Module
from torch.optim import Optimizer

from .determinism import check_conflicts

_SHARDING_PRECISIONS = ("FSDPPrecision", "DeepSpeedPrecision", "XLAPrecision")


def check_trainer(flags: dict[str, Any], precision: object) -> None:
    """Refuse what the Trainer was given and no determinism level allows.

    Args:
        flags: the Trainer's `benchmark` and `deterministic`.
        precision: its precision plugin.

    Raises:
        ValueError: with the argument, its value and the cure.
    """
    check_conflicts(benchmark=flags.get("benchmark"), deterministic=flags.get("deterministic"))
    name = type(precision).__name__
    if name in _SHARDING_PRECISIONS:
        raise ValueError(
            f"`plugins={name}(...)` belongs to a strategy that shards the module, and `strategy='easyscale'` is"
            " data parallel: every EST has the whole module. HINT: leave the plugin out and set `precision=...`."
        )


def check_module(module: Module) -> None:
    """Refuse a module that another kind of parallelism has already taken apart.

    Raises:
        ValueError: naming the part.
    """
    for name, part in module.named_modules():
        if isinstance(part, (FullyShardedDataParallel, FSDPModule)) or type(part).__name__ == "DeepSpeedEngine":
            raise ValueError(
                f"`{name or 'the module'}` is wrapped by `{type(part).__name__}`, and `strategy='easyscale'` is data"
                " parallel: it needs whole modules. HINT: pass the module unwrapped, or use the strategy made for it."
            )
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"the parameter `{name}` is a `DTensor` of {parameter.device_mesh}, and `strategy='easyscale'` is data"
                " parallel: it needs whole parameters. HINT: pass the module before it is sharded."
            )


class DriftCheck:
    """An optimizer's hook that refuses to train parameters whose gradients DDP does not reduce.

    DDP reduces the gradients of the parameters that it finds, and that require gradients, when it wraps the module.
    Others may be thawed or added later; each rank then steps them by its own gradient, and the replicas, which the ESTs
    of an executor share, would drift apart.

    Args:
        module: as it was wrapped.
    """

    def __init__(self, module: Module) -> None:
        self._module = module
        self._reduced = {id(p) for p in module.parameters() if p.requires_grad}
        self._frozen = [p for p in module.parameters() if not p.requires_grad]
        self._counts: dict[int, int] = {}

    def watch(self, optimizer: Optimizer) -> None:
        """Look at every step from now on."""
        self._counts[id(optimizer)] = _count(optimizer)
        optimizer.register_step_pre_hook(self)

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        """Called before a step."""
        count = _count(optimizer)
        if count == self._counts.get(id(optimizer)) and not any(p.requires_grad for p in self._frozen):
            return
        self._counts[id(optimizer)] = count
        names = {id(p): name for name, p in self._module.named_parameters()}
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if parameter.requires_grad and id(parameter) not in self._reduced:
                raise RuntimeError(
                    f"the parameter `{names.get(id(parameter), 'without a name')}` was frozen, or not there, when DDP"
                    " took note of the parameters, and is trained now: DDP does not reduce its gradient, and the ranks'"
                    " copies drift apart. HINT: let it require a gradient until set-up is over and freeze it in"
                    " `on_train_start`, with `find_unused_parameters=True`."
                )


def _count(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def refuse_in_pytorch_lightning(names: tuple[str, ...]) -> None:
    """Let the old package say what is wrong when its Trainer is asked for one of our strategies.

    Args:
        names: the names of our strategies.
    """
    old: Any = sys.modules.get("pytorch_lightning.strategies")
    if old is None:
        return

    def refuse(**_: Any) -> Any:
        raise TypeError(
            "this Trainer is `pytorch_lightning.Trainer`, and lightning_easyscale supports `lightning.pytorch.Trainer`:"
            " the two packages have classes of their own. HINT: `import lightning.pytorch as pl` in place of"
            " `import pytorch_lightning as pl`, also for modules and callbacks."
        )

    for name in names:
        old.StrategyRegistry.register(name, refuse, description="Needs lightning.pytorch", override=True)


def check_arguments(num_ests: Any, reduction: Any, threads: Any, gradients: Any, inputs: Any, overlap: Any) -> None:
    """Refuse arguments of the strategy that cannot be honoured.

    Raises:
        ValueError: with the value and the cure.
    """
    if num_ests is not None and num_ests < 1:
        raise ValueError(f"`num_ests={num_ests}` is not a number of workers. HINT: give at least 1.")
    if reduction not in ("auto", "ddp", "tree"):
        raise ValueError(f"`reduction={reduction!r}` is unknown. HINT: choose 'auto', 'ddp' or 'tree'.")
    if threads is not None and threads < 1:
        raise ValueError(f"`threads_per_est={threads}` is not a number of threads. HINT: give at least 1.")
    for name, place in (("gradient_offload", gradients), ("input_offload", inputs)):
        if place not in (None, "host"):
            raise ValueError(f"`{name}={place!r}` is unknown. HINT: choose None or 'host'.")
    if overlap not in (False, True, "auto", "tail"):
        raise ValueError(f"`overlap_backward={overlap!r}` is unknown. HINT: choose False, True, 'auto' or 'tail'.")
