"""What this strategy cannot be combined with, refused by name before anything starts."""

from __future__ import annotations

import sys
from typing import Any

from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn import Module

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
