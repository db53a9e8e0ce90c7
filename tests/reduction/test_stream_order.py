"""What is enqueued beside training keeps an order with it, whatever a GPU runs at the same time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_easyscale.reduction import inputs, tree
from lightning_easyscale.reduction.bucket import LocalGradients
from lightning_easyscale.reduction.host import Aside

from .streams import RaceError, Stream, Streams
from .waiting import reduce_gradients, train


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
