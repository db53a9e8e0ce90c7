"""Remembered buffers are those that `named_buffers` gives, whatever was done to the module in between."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_easyscale.reduction.module_buffers import ModuleBuffers


def module() -> nn.Sequential:
    made = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    made.register_buffer("empty", torch.zeros(0))
    made.register_buffer("none", None)
    made[1].register_buffer("again", made[0].running_mean)
    return made


def expected(made: nn.Module, ignored: set[str]) -> list[int]:
    found = [b for name, b in made.named_buffers() if name not in ignored and b.numel()]
    kinds = dict.fromkeys(b.dtype for b in found)
    return [id(b) for kind in kinds for b in found if b.dtype is kind]


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "nothing": lambda m: None,
    "buffers of another type": lambda m: m.double(),
    "a replaced buffer": lambda m: setattr(m[0], "running_mean", torch.ones(3)),
    "a new buffer where there are others": lambda m: m[0].register_buffer("new", torch.ones(2)),
    "a new buffer where there are none": lambda m: m[1][0].register_buffer("new", torch.ones(2)),
    "a deleted buffer": lambda m: delattr(m[0], "running_var"),
    "a buffer that was None": lambda m: setattr(m, "none", torch.ones(2)),
    "a replaced child": lambda m: m[1].__setitem__(1, nn.BatchNorm1d(3)),
    "a new child": lambda m: m.append(nn.BatchNorm1d(4)),
    "a child of a leaf": lambda m: m[1][0].add_module("inner", nn.BatchNorm1d(2)),
    "a removed child": lambda m: m.__delitem__(0),
}


@pytest.mark.parametrize("ignored", [set(), {"0.running_var"}], ids=["all", "some ignored"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_buffers_are_those_of_the_module_as_it_is(change: Callable[[nn.Sequential], object], ignored: set[str]) -> None:
    made = module()
    buffers = ModuleBuffers(made, ignored)
    for _ in range(2):
        assert [id(b) for group in buffers() for b in group] == expected(made, ignored)
    change(made)
    for _ in range(2):
        assert [id(b) for group in buffers() for b in group] == expected(made, ignored)
