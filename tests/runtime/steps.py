"""What the pool's processes run: ESTs that exchange what training steps exchange, and then something else."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from lightning_easyscale.placement import Placement
from lightning_easyscale.reduction.exchange import RingReduction
from tests.reduction.tasks import local_gradients

from .tasks import ests

STEPS = 6
ELEMENTS = 300  # too many for a header


_calls: Counter[int] = Counter()


def new_group(name: str, size: int, rank: int) -> dist.ProcessGroup:
    """A group for one task: the reduction of a bucket that another executor never joins stays in it."""
    store = dist.PrefixStore(f"{name}/{size}/{_calls[size]}", c10d._get_default_store())
    gloo = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=20))
    group = dist.ProcessGroup(store, rank, size)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
    return group


def run_ests(rank: int, placement: tuple[int, ...], function: Callable[[int], Any]) -> dict[int, Any]:
    """Run `function(rank)` in every EST of executor `rank`, with groups of its own for tensors and for headers."""
    size = len(placement)
    _calls[size] += 1
    data, control = (new_group(name, size, rank) for name in ("data", "control"))
    return ests(data, rank, placement, function, control=control)


class Steps:
    """The steps of one EST."""

    def __init__(self, rank: int, placement: tuple[int, ...]) -> None:
        self.rank = rank
        self.group: Any = dist.group.WORLD
        self.executor = self.group.executor
        self.peers = self.executor.peers
        self.placement = Placement(placement)
        self.reduction = RingReduction(
            self.placement, self.peers.index, self.peers.data, self.placement.num_ests, before=self.peers.settle
        )
        self.step = 0

    def buffers(self, rank: int) -> list[list[Tensor]]:
        """Those of EST `rank` at this step: of several types, with odd numbers of elements."""
        value = 10 * self.step + rank
        flags = torch.tensor([value % 2 == 0, True, False])
        return [
            [flags],
            [torch.full((ELEMENTS,), value + 0.5), torch.full((3, 5), value - 0.25)],
            [torch.full((7,), value, dtype=torch.bfloat16)],
            [torch.tensor(value), torch.tensor([value, -value])],
        ]

    def forward(self) -> bool:
        """Whether the buffers are those of EST 0 afterwards, to the bit."""
        mine = self.buffers(self.rank)
        self.group.broadcast_coalesced(mine)
        expected = self.buffers(0)
        return all(map(torch.equal, sum(mine, []), sum(expected, [])))

    def gradients(self) -> None:
        """The rendezvous at the end of a step, after a bucket of the last local EST."""

        def complete(deposits: dict[int, Any]) -> dict[int, None]:
            parts = [torch.full((1000,), 1.0 + rank) for rank in self.placement.ranges[self.peers.index]]
            finish = self.reduction.start(0, local_gradients(parts))
            self.group._channel.agree("gradients", ahead=True)
            finish()
            return dict.fromkeys(deposits)

        self.executor.meet(self.rank, self.group.next_key(), "gradients", None, complete)

    def run(self, steps: int = STEPS) -> list[tuple[bool, int]]:
        """For each step, whether the buffers were right, and how many messages it took."""
        seen = []
        for _ in range(steps):
            before = self.peers.physical_collectives
            right = self.forward()
            self.gradients()
            seen.append((right, self.peers.physical_collectives - before))
            self.step += 1
        return seen


def alike(group: Any, rank: int, placement: tuple[int, ...]) -> dict[int, Any]:
    """Steps, something else on all executors, and steps again."""

    def est(r: int) -> Any:
        steps = Steps(r, placement)
        first = steps.run()
        total = torch.ones(1)
        dist.all_reduce(total)
        return first, total.item(), steps.run()

    return run_ests(rank, placement, est)


def break_off(group: Any, rank: int, what: str) -> tuple[str, str]:
    """What each of two executors ends with, of which one does something else after some steps."""
    others: dict[str, Callable[[Steps], Any]] = {
        "executor 1 reduces": lambda steps: dist.all_reduce(torch.ones(1)) if steps.rank else steps.run(),
        "executor 0 reduces": lambda steps: steps.run() if steps.rank else dist.all_reduce(torch.ones(1)),
        "executor 1 leaves out a forward": lambda steps: steps.gradients() if steps.rank else steps.run(),
        "executor 0 leaves out a forward": lambda steps: steps.run() if steps.rank else steps.gradients(),
        "executor 1 fails": lambda steps: 1 / (1 - steps.rank) and steps.run(),
        "executor 0 fails": lambda steps: 1 / steps.rank and steps.run(),
        "executor 1 sends other buffers": _other_buffers,
    }

    def est(r: int) -> None:
        steps = Steps(r, (1, 1))
        steps.run()
        others[what](steps)

    found = "", ""
    try:
        run_ests(rank, (1, 1), est)
    except Exception as error:
        found = type(error).__name__, str(error)
    # The group too, now: later it would hold up another task until that bucket has timed out.
    gc.collect()
    return found


def _other_buffers(steps: Steps) -> None:
    if steps.rank:
        steps.group.broadcast_coalesced([[torch.zeros(ELEMENTS + 1)]])
    steps.run()


def end_early(group: Any, rank: int) -> tuple[str, str]:
    """Executor 0 runs one more forward than executor 1; what both find afterwards."""
    kept: list[Steps] = []

    def est(r: int) -> None:
        kept.append(Steps(r, (1, 1)))
        kept[0].run()
        if r == 0:
            kept[0].forward()

    run_ests(rank, (1, 1), est)
    group.barrier().wait()  # of neither's making: executor 0 comes here although executor 1 exchanges nothing more
    try:
        kept[0].peers.agree("barrier")
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""
