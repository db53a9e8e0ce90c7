"""Who rated what: MovieLens-100k as the package `recbole` brings it, random pairs, or the user's ``ratings.csv``.

Ratings are taken as implicit feedback (He et al. 2017, arXiv 1708.05031): rated is 1, anything else may be 0. The
latest rating of each user is held out, and ranked among 99 items that the user has not rated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ._common import existing, package_file

CANDIDATES = 100
"""Items that are ranked for a user: the held-out one and 99 others."""


@dataclass(frozen=True)
class Ratings:
    """Who rated what, oldest first.

    Args:
        users: int64, n, from 0 without gaps.
        items: int64, n, from 0 without gaps.
    """

    users: np.ndarray
    items: np.ndarray

    @property
    def counts(self) -> tuple[int, int]:
        """Number of users and of items."""
        return int(self.users.max()) + 1, int(self.items.max()) + 1


def movielens_100k() -> Ratings:
    """All 100,000 ratings, read where the package keeps them: the terms of MovieLens forbid to hand on copies.

    Raises:
        ImportError: if `recbole` is missing.
    """
    hint = "`make install-workloads`, or `pip install --no-deps recbole==1.2.1`"
    file = package_file("recbole", "dataset_example/ml-100k/ml-100k.inter", hint=hint)
    table = pd.read_csv(file, sep="\t")
    return _ratings(table.rename(columns=lambda name: name.partition(":")[0]), "user_id", "item_id")


def movielens_csv(path: Path) -> Ratings:
    """A ``ratings.csv`` with columns userId, movieId, rating, timestamp, as MovieLens distributes it.

    Args:
        path: the file, or the folder it is in.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if a column is missing.
    """
    file = existing(path / "ratings.csv" if path.is_dir() else path)
    table = pd.read_csv(file)
    if missing := {"userId", "movieId", "timestamp"} - set(table.columns):
        raise ValueError(f"{file} lacks the column {sorted(missing)[0]!r}. HINT: give MovieLens' `ratings.csv`.")
    return _ratings(table, "userId", "movieId")


def random_ratings(users: int, items: int, length: int) -> Ratings:
    """At least ``length`` random pairs beside one for each user, which is held out; every item occurs."""
    generator = np.random.default_rng(0)
    length = users + max(length, items)
    who = np.concatenate([np.arange(users), generator.integers(0, users, length - users)])
    what = np.concatenate([np.arange(items), generator.integers(0, items, length - items)])
    return Ratings(generator.permutation(who), what)


def _ratings(table: pd.DataFrame, user: str, item: str) -> Ratings:
    table = table.sort_values("timestamp", kind="stable")
    users, items = (np.unique(table[name].to_numpy(), return_inverse=True)[1] for name in (user, item))
    return Ratings(users.astype(np.int64), items.astype(np.int64))


class Rated:
    """Tells whether pairs have been rated.

    Args:
        ratings: all of them, held-out ones included.
    """

    def __init__(self, ratings: Ratings) -> None:
        self.items = ratings.counts[1]
        self.keys = np.unique(ratings.users * self.items + ratings.items)

    def __call__(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """For each pair, whether it is among the ratings."""
        wanted = users * self.items + items
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        found: np.ndarray = self.keys[at] == wanted
        return found

    def others(self, users: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        """One item for each user that the user has not rated, drawn with torch; after 100 tries any item."""
        items = _draw(self.items, len(users), generator)
        for _ in range(100):
            again = np.flatnonzero(self(users, items))
            if not len(again):
                break
            items[again] = _draw(self.items, len(again), generator)
        return items


def _draw(below: int, number: int, generator: torch.Generator | None) -> np.ndarray:
    drawn: np.ndarray = torch.randint(0, below, (number,), generator=generator).numpy()
    return drawn


class Pairs(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Ratings with label 1, each followed by ``negatives`` pairs of its user with label 0, drawn when they are read.

    A batch is read at once (``__getitems__``): users, items, labels.

    Args:
        ratings: for training.
        rated: what may not be drawn as a negative.
        negatives: of each rating.
    """

    def __init__(self, ratings: Ratings, rated: Rated, *, negatives: int) -> None:
        self.users, self.items = ratings.users, ratings.items
        self.rated, self.each = rated, 1 + negatives

    def __len__(self) -> int:
        """Ratings and their negatives."""
        return len(self.users) * self.each

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """A batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Users, items and labels; draws from torch's default generator."""
        rating, number = np.divmod(np.asarray(indices), self.each)
        users, items, negative = self.users[rating], self.items[rating].copy(), number > 0
        items[negative] = self.rated.others(users[negative], None)
        return torch.from_numpy(users), torch.from_numpy(items), torch.from_numpy(~negative).float()


class Candidates(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """For each user the held-out item, and 99 others in an order of their own: users, items, labels, n x 100.

    Args:
        held_out: one rating of each user.
        rated: all ratings.
    """

    def __init__(self, held_out: Ratings, rated: Rated) -> None:
        users = np.repeat(held_out.users, CANDIDATES).reshape(-1, CANDIDATES)
        items = rated.others(users.reshape(-1), torch.Generator().manual_seed(0)).reshape(users.shape)
        items[:, 0] = held_out.items
        self.users, self.items = torch.from_numpy(users), torch.from_numpy(items)

    def __len__(self) -> int:
        """Number of users."""
        return len(self.users)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """One user's candidates."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The candidates of several users."""
        users, items = self.users[indices], self.items[indices]
        labels = torch.zeros(items.shape)
        labels[:, 0] = 1.0
        return users, items, labels


def split(ratings: Ratings) -> tuple[Ratings, Ratings]:
    """All ratings but each user's latest, and those."""
    _, from_end = np.unique(ratings.users[::-1], return_index=True)
    last = np.zeros(len(ratings.users), dtype=bool)
    last[len(ratings.users) - 1 - from_end] = True
    return Ratings(ratings.users[~last], ratings.items[~last]), Ratings(ratings.users[last], ratings.items[last])
