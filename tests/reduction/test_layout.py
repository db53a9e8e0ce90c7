"""Bucket layouts against what a real DDP hands to its communication hook."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_easyscale.reduction.layout import BucketLayout, initial_layout, rebuilt_layout


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = Path(tmp_path_factory.mktemp("store")) / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Crossed(nn.Module):
    """Uses its layers in another order than it defines them, twice one of them, in two types, one frozen."""

    def __init__(self, width: int, mixed: bool = False) -> None:
        super().__init__()
        self.late = nn.Linear(width, width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.early = nn.Linear(8, width)
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.head = nn.Linear(width, 4).bfloat16() if mixed else nn.Linear(width, 4)
        self.alias = self.late

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.late(self.late(self.frozen(self.early(x))))
        image = self.conv(x.view(len(x), 2, 2, 2).repeat(1, 1, 2, 2)).sum()
        return self.head(h.to(self.head.weight.dtype)).float().sum() + image


def observed(model: nn.Module, steps: int = 3, **options: object) -> tuple[list[BucketLayout], list[list[int]]]:
    """Per step the layout that DDP used and the order in which gradients became ready."""
    ddp = DistributedDataParallel(model, **options)  # type: ignore[arg-type]
    parameters = [p for p in model.parameters() if p.requires_grad]
    index = {id(p): i for i, p in enumerate(parameters)}
    seen: list[list[tuple[int, bool, tuple[int, ...], int]]] = []
    ready: list[list[int]] = []

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations, which are strings here
        members = tuple(index[id(p)] for p in bucket.parameters())
        seen[-1].append((bucket.index(), bucket.is_last(), members, bucket.buffer().numel()))
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    ddp.register_comm_hook(None, hook)
    for i, p in enumerate(parameters):
        p.register_post_accumulate_grad_hook(lambda _, i=i: ready[-1].append(i))
    for _ in range(steps):
        seen.append([])
        ready.append([])
        ddp(torch.randn(2, 8)).backward()
        assert [i for i, *_ in seen[-1]] == list(range(len(seen[-1])))
        assert [last for _, last, *_ in seen[-1]] == [False] * (len(seen[-1]) - 1) + [True]
        assert all(numel == sum(parameters[i].numel() for i in members) for *_, members, numel in seen[-1])
    return [BucketLayout(tuple(members for *_, members, _ in step)) for step in seen], ready


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("cap", [None, 1, 0.05, 0.3])
@pytest.mark.parametrize("width", [16, 200, 700])
def test_layouts_equal_those_of_a_real_ddp(world: None, width: int, cap: float | None, mixed: bool) -> None:
    model = Crossed(width, mixed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    layouts, ready = observed(model, bucket_cap_mb=cap)
    assert layouts[0] == initial_layout(parameters, cap)
    assert layouts[1] == layouts[2] == rebuilt_layout(ready[0], parameters, cap)
    assert layouts[0] != layouts[1]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("cap", [None, 1, 0.05])
def test_a_search_for_unused_parameters_keeps_the_bounded_initial_layout(
    world: None, cap: float | None, mixed: bool
) -> None:
    model = Crossed(700, mixed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    layouts, _ = observed(model, bucket_cap_mb=cap, find_unused_parameters=True)
    assert layouts[0] == layouts[1] == layouts[2] == initial_layout(parameters, cap, find_unused_parameters=True)
    assert len(layouts[0].buckets) > 1


def test_a_static_graph_is_rebuilt_one_step_later(world: None) -> None:
    model = Crossed(700)
    parameters = [p for p in model.parameters() if p.requires_grad]
    layouts, ready = observed(model, steps=4, static_graph=True)
    assert layouts[0] == layouts[1] == initial_layout(parameters, None, True, static_graph=True)
    assert layouts[2] == layouts[3] == rebuilt_layout(ready[1], parameters)


def test_state_is_plain_and_comes_back() -> None:
    layout = BucketLayout(((2, 0), (1,)))
    assert layout.to_state() == [[2, 0], [1]]
    assert BucketLayout.from_state(layout.to_state()) == layout


def test_what_is_no_layout_is_refused() -> None:
    for bad in (((0, 2),), ((0, 0),), ((0,), ())):
        with pytest.raises(ValueError, match="does not hold every parameter index once"):
            BucketLayout(bad)
    with pytest.raises(ValueError, match="is not a permutation of the 2 parameter indices"):
        rebuilt_layout([0, 0], [torch.ones(1), torch.ones(1)])
