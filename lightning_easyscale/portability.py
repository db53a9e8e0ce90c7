"""Puts D2's `portable` kernels in force for a Trainer's run: in every rank, from `setup` to `teardown`.

The policy belongs to a thread, so under EasyScale each EST's clone of the callback has its own. Stock DDP gets it
through `DeterminismCallback` at the same point of the run, so that both call the same operations under it.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn

from . import kernels
from .kernels import build


class PortableKernels(Callback):
    """Computes by D2's format while a trainer function runs; the caller sees to `kernels.common_paths`.

    Args:
        allow: operations (``aten::cumsum``) that keep torch's kernels although nothing vouches for their bits.
    """

    def __init__(self, allow: Iterable[str] = ()) -> None:
        super().__init__()
        self._allow = tuple(allow)
        self._active: AbstractContextManager[Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the kernels in force in this thread.

        Raises:
            RuntimeError: where the CPU kernels cannot run, with the cure, and for compiled modules.
        """
        self.leave()
        if trainer.strategy.root_device.type == "cpu":
            build.load(build.default_width())
        _refuse_compiled(pl_module)
        self._active = kernels.put_in_force(allow=self._allow)
        self._active.__enter__()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Torch's kernels again."""
        self.leave()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Torch's kernels again."""
        self.leave()

    def leave(self) -> None:
        """Torch's kernels again in this thread, however the run ended."""
        if self._active is not None:
            active, self._active = self._active, None
            active.__exit__(None, None, None)


def _refuse_compiled(module: Any) -> None:
    compiled = [name or "the module" for name, part in module.named_modules() if _is_compiled(part)]
    if compiled:
        raise RuntimeError(
            f"`{compiled[0]}` is compiled by `torch.compile`, whose kernels D2's `portable` policy cannot replace."
            " HINT: leave `torch.compile` out under D2."
        )


def _is_compiled(part: nn.Module) -> bool:
    return hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None
