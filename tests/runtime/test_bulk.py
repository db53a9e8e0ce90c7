"""What is done to many gradients at once is what Python would do one by one."""

from __future__ import annotations

import torch
from torch.nn import Parameter

from lightning_easyscale.runtime import bulk


def test_gradients_are_read_set_and_dropped() -> None:
    parameters = [Parameter(torch.zeros(n)) for n in (1, 2, 3)]
    assert bulk.gradients(parameters) == [None, None, None]
    assert not bulk.any_gradient(parameters)
    grads = [torch.ones(1), None, torch.zeros(3)]
    bulk.assign(parameters, grads)
    assert all(p.grad is g for p, g in zip(parameters, grads, strict=True))
    assert bulk.any_gradient(parameters)
    assert bulk.has_none(bulk.gradients(parameters))
    # A tensor is compared by identity, never by its elements.
    assert not bulk.has_none([torch.zeros(3), torch.zeros(0)])
    bulk.drop(parameters)
    assert not bulk.any_gradient(parameters)


def test_nothing_is_recorded_below_autograd() -> None:
    weight, memory = torch.ones(2, requires_grad=True), torch.zeros(4)
    with bulk.below_autograd():
        product = weight * 2
        first, second = memory.split(2)
        first.add_(1)
    assert product.grad_fn is None
    assert not second._is_view()
    assert memory.tolist() == [1, 1, 0, 0]
    assert memory._version == 0
    assert (weight * 2).grad_fn is not None
