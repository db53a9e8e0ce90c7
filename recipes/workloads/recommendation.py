"""Recommendation with NeuMF: which items will a user like?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torchmetrics.retrieval import RetrievalHitRate

from ._common import Loaders
from .ratings import CANDIDATES, Candidates, Pairs, Rated, movielens_100k, movielens_csv, random_ratings, split

TOP = 10


def build(workload: Mapping[str, Any], directory: Path) -> tuple[Recommender, Loaders]:
    """The recommender and its data; the numbers of users and items are the data's."""
    net = dict(workload["net"])
    negatives, users, items = net.pop("negatives", 4), net.pop("users", 1000), net.pop("items", 1000)
    if workload["data"] == "small":
        ratings = movielens_100k()
    elif workload["data"] == "synthetic":
        ratings = random_ratings(users, items, workload["samples"])
    else:
        ratings = movielens_csv(Path(workload["path"]))
    rated, (train, held_out) = Rated(ratings), split(ratings)
    data = Loaders(
        Pairs(train, rated, negatives=negatives),
        Candidates(held_out, rated),
        batch_size=workload["batch_size"],
        validation_batch_size=64,
        collate=_as_read,
    )
    return Recommender(NeuMF(*ratings.counts, **net), lr=workload["lr"]), data


def _as_read(batch: Any) -> Any:
    """A batch is read whole."""
    return batch


class NeuMF(nn.Module):
    """Neural matrix factorisation (He et al. 2017, arXiv 1708.05031, section 3.4).

    Args:
        users: how many.
        items: how many.
        factors: size of the embeddings that are multiplied.
        layers: widths of the perceptron; its embeddings have half of the first.
    """

    def __init__(self, users: int, items: int, *, factors: int = 8, layers: Sequence[int] = (64, 32, 16, 8)) -> None:
        super().__init__()
        half = layers[0] // 2
        self.user_factors, self.item_factors = nn.Embedding(users, factors), nn.Embedding(items, factors)
        self.user_inputs, self.item_inputs = nn.Embedding(users, half), nn.Embedding(items, half)
        pairs = zip(layers[:-1], layers[1:], strict=True)
        self.perceptron = nn.Sequential(*(m for a, b in pairs for m in (nn.Linear(a, b), nn.ReLU())))
        self.out = nn.Linear(factors + layers[-1], 1)
        for table in (self.user_factors, self.item_factors, self.user_inputs, self.item_inputs):
            nn.init.normal_(table.weight, std=0.01)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Logits of ``items`` for ``users``, of their common shape."""
        product = self.user_factors(users) * self.item_factors(items)
        deep = self.perceptron(torch.cat([self.user_inputs(users), self.item_inputs(items)], -1))
        out: Tensor = self.out(torch.cat([product, deep], -1)).squeeze(-1)
        return out


class Recommender(pl.LightningModule):
    """Binary cross-entropy of rated and sampled pairs, Adam; hit rate among the ten best of 100 candidates.

    Args:
        net: the network.
        lr: learning rate.
    """

    metric = "val_hit_rate"
    chance = TOP / CANDIDATES

    def __init__(self, net: NeuMF, *, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr
        self.hit_rate = RetrievalHitRate(top_k=TOP)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        users, items, labels = batch
        return functional.binary_cross_entropy_with_logits(self.net(users, items), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """Logs loss and hit rate over all ranks."""
        users, items, labels = batch
        logits = self.net(users, items)
        self.log("val_loss", functional.binary_cross_entropy_with_logits(logits, labels), sync_dist=True)
        # Of equal logits the earliest would win, and the held-out item is the first.
        self.hit_rate(logits.flip(1), labels.flip(1).long(), indexes=users)
        self.log("val_hit_rate", self.hit_rate, on_epoch=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)
