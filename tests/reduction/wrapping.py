"""A small module in the wrapper, as the wrapper's tests have it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_easyscale.placement import Placement
from lightning_easyscale.reduction.collector import ESTDataParallel
from lightning_easyscale.reduction.tree_gradients import TreeGradients


def executor(k: int, **options: object) -> TreeGradients:
    return TreeGradients(Placement((k,)), 0, None, **options)  # type: ignore[arg-type]


def wrap(module: nn.Module, reduce: TreeGradients, rank: int = 0, **options: object) -> ESTDataParallel:
    return ESTDataParallel(module, rank=rank, n=reduce.n, reduce=reduce, **options)  # type: ignore[arg-type]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 1)
        self.b = nn.Linear(3, 1)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, which: str = "ab") -> Tensor:
        return sum((getattr(self, name)(x).sum() for name in which), torch.zeros(()))


def told(model: ESTDataParallel, *losses: Tensor) -> None:
    """Run backwards as the strategy does."""
    for loss in losses:
        model.begin_backward(loss)
        loss.backward()
        model.end_backward()


def hooks(model: ESTDataParallel) -> int:
    return len(model._hooks.listening)


def listened(model: ESTDataParallel) -> set[int]:
    names = {model._names[i].split(".")[0] for i in model._hooks.listening}
    return {id(p) for name in names for p in model.module.get_submodule(name).parameters()}
