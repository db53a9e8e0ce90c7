"""What is enqueued beside training keeps an order with it, whatever a GPU runs at the same time."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_easyscale.placement import Placement
from lightning_easyscale.reduction import inputs, tree
from lightning_easyscale.reduction.bucket import LocalGradients
from lightning_easyscale.reduction.bucket_gradients import BucketGradients
from lightning_easyscale.reduction.exchange import RingReduction
from lightning_easyscale.reduction.host import Aside
from lightning_easyscale.reduction.inputs import InputTurns
from lightning_easyscale.reduction.orders import ring_fold, tree_fold
from lightning_easyscale.reduction.tree import TreeFold

from .streams import RaceError, Stream, Streams

WIDTH = 100


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    monkeypatch.setattr(tree, "_AT_ONCE", 30)
    monkeypatch.setattr(inputs, "WORTH", 1)
    return Streams(monkeypatch)


def test_the_simulation_sees_races(streams: Streams) -> None:
    beside = Stream()
    with streams:
        x = torch.ones(4)
        torch.cuda.set_stream(beside)
        with pytest.raises(RaceError):
            x + 1
        beside.wait_stream(streams.main)
        y = x + 1
        torch.cuda.set_stream(streams.main)
        with pytest.raises(RaceError):
            x.add_(1)
        with pytest.raises(RaceError):
            y * 2
        streams.main.wait_stream(beside)
        y = x.add_(1) * 2
        # Memory that one stream still reads, and its home hands out again.
        torch.cuda.set_stream(beside)
        beside.wait_stream(streams.main)
        z = y + 1
        torch.cuda.set_stream(streams.main)
        del y
        with pytest.raises(RaceError):
            torch.zeros(4)
        streams.main.wait_stream(beside)
        y = torch.zeros(4)
        torch.cuda.set_stream(beside)
        beside.wait_stream(streams.main)
        z = y + 1
        y.record_stream(beside)  # type: ignore[arg-type]
        torch.cuda.set_stream(streams.main)
        del y
        torch.zeros(4)
    assert z.tolist() == [1.0] * 4


def train(streams: Streams, ests: int, steps: int) -> None:
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
                batch = torch.zeros(2, WIDTH).copy_(given[rank])
                held[rank].hold(given[rank], batch)
                activations = [batch * 2, batch.add_(1)]
                grad = activations[0].sum(0) * torch.ones(WIDTH)
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
        assert torch.equal(total, tree_fold(grads))
    with streams:
        for stack in waiting:
            stack.close()
    assert all(torch.equal(found, wanted) for found, wanted in results)
    assert all(torch.equal(batches[rank], expected[rank]) for rank in range(ests))


@pytest.mark.parametrize("ests", [2, 4, 8])
def test_inputs_and_sums_that_wait_on_the_host_are_in_order(streams: Streams, ests: int) -> None:
    train(streams, ests, steps=4)


@pytest.mark.parametrize("flat", [False, True], ids=["by spans", "flat"])
@pytest.mark.parametrize("spare", [0, 1 << 30], ids=["late", "early"])
@pytest.mark.parametrize("ests", [2, 3, 4])
def test_gradients_that_wait_on_the_host_are_in_order(
    streams: Streams, ests: int, spare: int, flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Aside, "spare", staticmethod(lambda device: spare))
    if flat:
        monkeypatch.setattr(LocalGradients, "gathered", LocalGradients.flat)
    reduce_gradients(streams, ests, steps=4)


def reduce_gradients(streams: Streams, ests: int, steps: int) -> None:
    """Steps in the `ddp` order whose gradients wait on the host; after the first, in two buckets."""
    reduce = BucketGradients(RingReduction(Placement((ests,)), 0, None, ests), offload="host", bucket_cap_mb=5e-4)
    shapes = [(10, 20), (7,), (100,), (3, 50)]
    parameters = [[torch.nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(ests)]
    for rank in range(ests):
        reduce.register(rank, parameters[rank])
    for step in range(steps):
        data = [[torch.randn(shape) for shape in shapes] for _ in range(ests)]
        forms = reduce._forms
        assert len(forms) == (2 if step else 1)
        with streams:
            for rank in range(ests):
                for index in (3, 2, 1, 0):
                    activation = torch.ones(shapes[index])
                    parameters[rank][index].grad = activation * data[rank][index]
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
            assert torch.equal(torch.cat([found[i].flatten() for i in form.members]), ring_fold(rows))


def unread(self: Aside, event: Any, done: Any) -> Any:
    return before(self, None, done)


before = Aside.before


@pytest.mark.parametrize(
    ("run", "where", "name", "value"),
    [
        (train, Aside, "before", unread),
        (train, Aside, "join", lambda self: None),
        (train, Streams, "_record", lambda self, tensor, stream: None),
        (train, Stream, "wait_event", lambda self, event: None),
        (reduce_gradients, Aside, "join", lambda self: None),
        (reduce_gradients, Streams, "_record", lambda self, tensor, stream: None),
        (reduce_gradients, Stream, "wait_event", lambda self, event: None),
    ],
    ids=[
        *("memory beside is not waited for", "no join", "memory is not recorded", "no event"),
        *("gradients: no join", "gradients: memory is not recorded", "gradients: no event"),
    ],
)
def test_what_keeps_the_order_is_missed_when_it_is_left_out(
    run: Any, where: Any, name: str, value: Any, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Aside, "spare", staticmethod(lambda device: 1 << 30))
    monkeypatch.setattr(where, name, value)
    with pytest.raises(RaceError):
        run(streams, 4, steps=3)
