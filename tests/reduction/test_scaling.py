"""Gradients in one flat buffer: long ones are scaled on their way there, short ones together."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from lightning_easyscale.placement import Placement
from lightning_easyscale.reduction import tree_gradients
from lightning_easyscale.reduction.tree_gradients import TreeGradients

N = 3
SHAPES = [(2, 3), (40,), (5, 8), (1,), (0,), (3,), (64,), (2, 3, 4, 4)]


@pytest.mark.parametrize("long", [1, 2, 7, 33, 64, 10**6])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("grouped", [False, True])
def test_sums_have_the_same_bits_whatever_is_long(
    long: int, layout: torch.memory_format, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree_gradients, "_LONG", {"cpu": long, "cuda": long})
    generator = torch.Generator().manual_seed(1)
    reduce = TreeGradients(Placement.even(N, 1), 0, None)
    models = []
    for rank in range(N):
        own = [Parameter(torch.zeros(shape)) for shape in SHAPES]
        own[-1] = Parameter(own[-1].detach().contiguous(memory_format=layout))
        reduce.register(rank, own)
        models.append(own)
    grads = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(N)]
    # Strided unlike its parameter, which is one that DDP copies.
    grads[1][2] = grads[1][2].t().contiguous().t()
    for rank, own in enumerate(models):
        for parameter, grad in zip(own, grads[rank], strict=True):
            parameter.grad = grad.clone(memory_format=torch.preserve_format)
        if grouped:
            for number, members in enumerate(reduce.groups):
                reduce.deposit_group(rank, number, [own[i].grad for i in members])
        else:
            for index in range(len(own)):
                if (rank, index) == (2, 1):
                    own[index].grad = None
                reduce.deposit(rank, index)
        reduce.finish(rank)
    if not grouped:
        grads[2][1] = torch.zeros(SHAPES[1])
    scaled = [[grad * (1.0 / N) for grad in own] for own in grads]
    for parameter, a, b, c in zip(models[0], *scaled, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, (a + b) + c)
        assert parameter.grad.stride() == parameter.stride()
