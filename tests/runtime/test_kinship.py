"""Between two calls the clones get what the script changed, and keep what is their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_easyscale.runtime.kinship import Kinship


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(1))
        self.rate = 0.1
        self.names = ["a"]
        self.counts = {"x": 1}
        self.kept: Any = None


def pair() -> tuple[Kinship, Model, Model]:
    kinship, model = Kinship(lambda _: False), Model()
    (clone,) = kinship.clone([model])
    kinship.settle()
    return kinship, model, clone


def test_a_clone_is_kept_and_shares_parameters() -> None:
    kinship, model, clone = pair()
    (again,) = kinship.clone([model])
    assert again is clone
    assert clone is not model
    assert clone.linear.weight.data_ptr() == model.linear.weight.data_ptr()
    assert clone.seen.data_ptr() != model.seen.data_ptr()


def test_what_the_script_changes_reaches_the_clone() -> None:
    kinship, model, clone = pair()
    model.rate = 0.5
    model.names.append("b")
    model.counts["y"] = 2
    model.new = nn.Linear(1, 1)  # type: ignore[assignment]
    del model.kept
    model.seen += 3
    kinship.clone([model])
    assert (clone.rate, clone.names, clone.counts) == (0.5, ["a", "b"], {"x": 1, "y": 2})
    assert clone.names is not model.names
    assert clone.new.weight.data_ptr() == model.new.weight.data_ptr()  # type: ignore[union-attr]
    assert not hasattr(clone, "kept")
    assert torch.equal(clone.seen, torch.tensor([3.0]))


def test_what_an_est_did_to_its_own_stays() -> None:
    kinship, model, clone = pair()
    clone.rate, clone.kept = 0.7, "mine"
    clone.names.append("own")
    clone.seen += 9
    model.counts["z"] = 3  # something else has changed
    kinship.clone([model])
    assert (clone.rate, clone.kept, clone.names) == (0.7, "mine", ["a", "own"])
    assert torch.equal(clone.seen, torch.tensor([9.0]))
    assert clone.counts == {"x": 1, "z": 3}
