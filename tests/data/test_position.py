"""The position in the data: what comes after a resume is what would have come, and no sample is loaded twice."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_easyscale.data.identity import index_bytes
from lightning_easyscale.data.position import DataStateError, LoaderFollower
from lightning_easyscale.rng import Generators


class Noisy(Dataset):
    """Counts what it loads and draws a number each time."""

    def __init__(self, samples: int = 12) -> None:
        self.samples = samples
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        self.loaded.append(index)
        return torch.tensor([index + 0.5 * torch.rand(1).item()])


def follow(dataset: Any, **options: Any) -> tuple[LoaderFollower, DataLoader, Generators]:
    generators = Generators([])
    follower = LoaderFollower(generators)
    loader = DataLoader(dataset, batch_size=2, **{"shuffle": True, **options})
    follower.attach(loader)
    return follower, loader, generators


@pytest.mark.parametrize("consumed", [1, 3, 5])
def test_the_rest_of_an_epoch_and_the_next_are_the_same(consumed: int) -> None:
    torch.manual_seed(1)
    follower, loader, generators = follow(Noisy())
    batches = iter(loader)
    for _ in range(consumed):
        next(batches)
    generators.capture()
    state, position = generators.state_dict(), follower.state_dict(inside_epoch=True)
    expected = [*batches, *loader]

    torch.manual_seed(2)
    dataset = Noisy()
    follower, loader, generators = follow(dataset)
    follower.resume_from(position)
    generators.load_state_dict(state)
    generators.install()
    rest = list(loader)
    assert len(dataset.loaded) == 2 * (6 - consumed), "samples that were skipped are not loaded"
    got = [*rest, *loader]
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_between_epochs_nothing_is_skipped() -> None:
    follower, loader, _ = follow(Noisy())
    list(loader)
    position = follower.state_dict(inside_epoch=False)
    follower, loader, _ = follow(Noisy())
    follower.resume_from(position)
    assert len(list(loader)) == 6


def test_index_batches_are_told_apart() -> None:
    batches: list[Any] = [
        [1, 2],
        [2, 1],
        [1],
        [1, 2, 0],
        [(1, 2)],
        {1: 2},
        {1: 3},
        "12",
        ["1", "2"],
        [1.5],
        [2**70],
        [-1],
    ]
    assert len({index_bytes(batch) for batch in batches}) == len(batches)
    # One after the other too: each says how many there are.
    assert index_bytes([1, 2]) + index_bytes([3]) != index_bytes([1]) + index_bytes([2, 3])
    assert index_bytes(torch.tensor([4, 5]).numpy().tolist()) == index_bytes([4, 5])


def test_a_batch_is_read_inside_what_was_given() -> None:
    inside: list[bool] = []
    now = False

    @contextmanager
    def reading() -> Any:
        nonlocal now
        now = True
        yield
        now = False

    class Looking(Noisy):
        def __getitem__(self, index: int) -> Tensor:
            inside.append(now)
            return super().__getitem__(index)

    loader = DataLoader(Looking(4), batch_size=2)
    follower = LoaderFollower(Generators([]), reading=reading)
    follower.attach(loader)
    for _ in loader:
        assert not now
    assert inside == [True] * 4


def test_a_second_attachment_changes_nothing() -> None:
    follower, loader, _ = follow(Noisy())
    kind = type(loader)
    follower.attach(loader)
    assert type(loader) is kind
    assert kind.__name__ == "DataLoader"
    assert isinstance(loader, DataLoader)


def test_shorter_data_is_refused_by_its_length() -> None:
    follower, loader, _ = follow(Noisy())
    batches = iter(loader)
    next(batches)
    position = follower.state_dict(inside_epoch=True)
    follower, _, _ = follow(Noisy(10))
    with pytest.raises(DataStateError, match=r"samples was 12 and is 10. HINT: "):
        follower.resume_from(position)


def test_a_foreign_iterable_is_left_alone_and_refused_inside_an_epoch() -> None:
    follower = LoaderFollower(Generators([]))
    foreign = [torch.zeros(1)]
    follower.attach(foreign)
    position = follower.state_dict(inside_epoch=True)
    follower.resume_from(position)  # it had not begun
    position[0]["epoch_start"] = {}
    with pytest.raises(DataStateError, match="it is a `list`, not a `torch.utils.data.DataLoader`"):
        follower.resume_from(position)
