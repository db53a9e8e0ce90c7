"""Steps of ESTs that share a device, and what of them waits on the host."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor

from lightning_easyscale.placement import Placement
from lightning_easyscale.reduction.bucket_gradients import BucketGradients
from lightning_easyscale.reduction.exchange import RingReduction
from lightning_easyscale.reduction.host import Aside
from lightning_easyscale.reduction.inputs import InputTurns
from lightning_easyscale.reduction.orders import ring_fold, tree_fold
from lightning_easyscale.reduction.tree import TreeFold

WIDTH = 100
Streams = AbstractContextManager[Any]
"""What a device does is done inside; may be entered again."""


def train(streams: Streams, ests: int, steps: int, device: str = "cpu") -> None:
    """Steps of ESTs whose inputs and partial sums wait on the host: each one's values are what they would be."""
    turns, aside = InputTurns(), Aside()
    held = [turns.of(rank) for rank in range(ests)]
    fold = TreeFold(range(ests), ests, aside=aside)
    waiting: list[ExitStack] = [ExitStack() for _ in range(ests)]
    batches: dict[int, Tensor] = {}
    expected: dict[int, Tensor] = {}
    results = []
    for _ in range(steps):
        given = [torch.randn(2, WIDTH) for _ in range(ests)]
        grads = []
        with streams:
            for rank in range(ests):
                waiting[rank].close()
                if rank in batches:
                    # As a callback may.
                    results.append((batches.pop(rank).clone(), expected.pop(rank)))
                batch = torch.zeros(2, WIDTH, device=device).copy_(given[rank])
                held[rank].hold(given[rank], batch)
                activations = [batch * 2, batch.add_(1)]
                grad = activations[0].sum(0) * torch.ones(WIDTH, device=device)
                grads.append(grad.clone())
                if rank == ests - 1:
                    fold.fetch(2 * grad.nbytes)
                fold.push(rank, grad)
                del grad, activations
                batches[rank], expected[rank] = batch, given[rank] + 1
                del batch
                waiting[rank].enter_context(held[rank].away())
            blocks = fold.partials()
            aside.join()
            total = blocks[0].total.clone()
            del blocks
        assert torch.equal(total.cpu(), tree_fold([grad.cpu() for grad in grads]))
    with streams:
        for stack in waiting:
            stack.close()
    assert all(torch.equal(found.cpu(), wanted) for found, wanted in results)
    assert all(torch.equal(batches[rank].cpu(), expected[rank]) for rank in range(ests))


def reduce_gradients(streams: Streams, ests: int, steps: int, device: str = "cpu") -> None:
    """Steps in the `ddp` order whose gradients wait on the host; after the first, in two buckets."""
    reduce = BucketGradients(RingReduction(Placement((ests,)), 0, None, ests), offload="host", bucket_cap_mb=5e-4)
    shapes = [(10, 20), (7,), (100,), (3, 50)]
    parameters = [[torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes] for _ in range(ests)]
    for rank in range(ests):
        reduce.register(rank, parameters[rank])
    for step in range(steps):
        data = [[torch.randn(shape) for shape in shapes] for _ in range(ests)]
        forms = reduce._forms
        assert len(forms) == (2 if step else 1)
        with streams:
            for rank in range(ests):
                for index in (3, 2, 1, 0):
                    activation = torch.ones(shapes[index], device=device)
                    parameters[rank][index].grad = activation * data[rank][index].to(device)
                    del activation
                    reduce.deposit(rank, index)
                reduce.finish(rank)
            # As an optimizer does.
            found = [parameter.grad.clone() for parameter in parameters[0] if parameter.grad is not None]
            for parameter in parameters[0]:
                parameter.grad = None
        assert all(parameter.grad is None for row in parameters[1:] for parameter in row[1:])
        for form in forms:
            rows = [torch.cat([own[i].flatten() for i in form.members]) * (1.0 / ests) for own in data]
            assert torch.equal(torch.cat([found[i].flatten().cpu() for i in form.members]), ring_fold(rows))
