"""A parcel carries tensors of several types bit for bit, and is used again only when every EST has read it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_easyscale.runtime import parcels
from lightning_easyscale.runtime.bulk import below_autograd
from lightning_easyscale.runtime.parcels import Parcel, Parcels


def groups(start: int = 0) -> list[list[Tensor]]:
    """Of several types, with odd numbers of elements, one of them strided."""
    return [
        [torch.tensor([True, start > 0, False])],
        [torch.arange(start, start + 5.0), torch.full((), start - 0.5), torch.arange(6.0).add(start).view(2, 3).t()],
        [torch.arange(start, start + 3.0).bfloat16()],
        [torch.tensor(start), torch.tensor([start, -start])],
    ]


def flat(tensors: list[list[Tensor]]) -> list[Tensor]:
    return [tensor for group in tensors for tensor in group]


def test_a_parcel_carries_every_type_in_one_message() -> None:
    sent, got = Parcel(groups()), Parcel(groups())
    assert len(sent.messages) == 1
    sent.pack(groups(7))
    got.messages[0].copy_(sent.messages[0])
    here = groups()
    got.read(here)
    assert all(map(torch.equal, flat(here), flat(groups(7))))
    assert here[1][2].stride() == (1, 3)


def test_a_parcel_is_used_again_when_all_have_read_it() -> None:
    pool = Parcels(2)
    first = pool.take(groups())
    first.pack(groups(1))
    pool.done(first)
    second = pool.take(groups())
    assert second is not first
    second.pack(groups(2))
    here = groups()
    first.read(here)
    assert all(map(torch.equal, flat(here), flat(groups(1))))
    pool.done(first)
    assert pool.take(groups()) is first


@pytest.mark.parametrize("change", ["a size", "a type", "one more"])
def test_a_parcel_is_not_used_for_other_tensors(change: str) -> None:
    pool = Parcels(1)
    kept = groups()
    first = pool.take(kept)
    pool.done(first)
    if change == "a size":
        kept[1][0].resize_(4)
    elif change == "a type":
        kept[2] = [kept[2][0].half()]
    else:
        kept[3].append(torch.tensor(1))
    second = pool.take(kept)
    assert second is not first
    second.pack(kept)
    here = [[torch.zeros_like(tensor) for tensor in group] for group in kept]
    second.read(here)
    assert all(map(torch.equal, flat(here), flat(kept)))


def test_a_large_parcel_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parcels, "_KEPT_BYTES", 8)
    pool = Parcels(1)
    first = pool.take(groups())
    pool.done(first)
    assert pool.take(groups()) is not first


def test_a_parcel_made_in_inference_serves_training() -> None:
    pool = Parcels(1)
    with torch.inference_mode(), below_autograd():
        first = pool.take(groups())
        first.pack(groups(3))
        pool.done(first)
    assert pool.take(groups()) is first
    first.pack(groups(4))
    here = groups()
    first.read(here)
    assert all(map(torch.equal, flat(here), flat(groups(4))))


def test_a_graph_that_saved_a_buffer_stays_valid() -> None:
    parcel, here = Parcel(groups()), groups(2)
    parcel.pack(groups(5))
    weight = torch.ones(5, requires_grad=True)
    out = (weight * here[1][0]).sum()
    with below_autograd():
        parcel.read(here)
    out.backward()
    assert torch.equal(weight.grad, groups(5)[1][0])
