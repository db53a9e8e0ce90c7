"""What the pool's processes run: the same user code over real gloo ranks, and over ESTs on one or two executors."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_easyscale.placement import Placement
from lightning_easyscale.reduction.orders import ring_fold, tree_fold
from lightning_easyscale.runtime.channel import Channel
from lightning_easyscale.runtime.executor import Executor
from lightning_easyscale.runtime.header import STOP
from lightning_easyscale.runtime.peers import Peers
from lightning_easyscale.runtime.process_group import VirtualProcessGroup
from lightning_easyscale.runtime.world import WorldState, install, set_world, uninstall

Op = dist.ReduceOp
# torch 2.13 has renamed them.
all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
SIZES = (1, 3, 64, 1000, 4099)


def values(rank: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(31 * size + rank)
    # Magnitudes differ so that nearly every element shows a wrong order.
    scale = torch.randint(-8, 9, (size,), generator=generator).double()
    return (torch.randn(size, generator=generator, dtype=torch.float64) * 2.0**scale).to(dtype)


# -- user code -------------------------------------------------------------------------------------------------------
def all_reduce(rank: int, n: int, group: Any) -> list[Tensor]:
    out = []
    for size, op, dtype in itertools.product(
        SIZES, (Op.SUM, Op.PRODUCT, Op.MIN, Op.MAX), (torch.float32, torch.bfloat16, torch.float64)
    ):
        out.append(values(rank, size, dtype))
        dist.all_reduce(out[-1], op, group=group)
    for op in (Op.SUM, Op.BAND, Op.BOR, Op.BXOR):
        out.append(torch.arange(20) * (rank + 3))
        dist.all_reduce(out[-1], op, group=group)
    return out


def all_reduce_coalesced(rank: int, n: int, group: Any) -> list[Tensor]:
    out = [values(rank, 5), values(rank, 300).view(30, 10), values(rank, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        dist.all_reduce_coalesced(out, group=group)
    return out


def shapes_and_views(rank: int, n: int, group: Any) -> list[Tensor]:
    whole, scalar = values(rank, 60).view(6, 10), values(rank, 1)[0]
    dist.all_reduce(whole.T.contiguous()[2], group=group)
    dist.all_reduce(scalar, group=group)
    dist.broadcast(whole[1], 0, group=group)
    return [whole, scalar]


def reduce(rank: int, n: int, group: Any) -> list[Tensor]:
    out = []
    for size, root in itertools.product(SIZES, range(n)):
        out.append(values(rank, size))
        dist.reduce(out[-1], root, group=group)
        if rank != root:
            out.pop()  # undefined by contract
    return out


def broadcast(rank: int, n: int, group: Any) -> list[Tensor]:
    out = []
    for root in range(n):
        out.append(values(rank, 50))
        dist.broadcast(out[-1], root, group=group)
    return out


def all_gather(rank: int, n: int, group: Any) -> list[Tensor]:
    parts = [torch.empty(7) for _ in range(n)]
    dist.all_gather(parts, values(rank, 7), group=group)
    whole = torch.empty(n * 6)
    all_gather_single(whole, values(rank, 6), group=group)
    stacked = torch.empty(2 * n, 3)
    all_gather_single(stacked, values(rank, 6).view(2, 3), group=group)
    return [*parts, whole, stacked]


def gather_and_scatter(rank: int, n: int, group: Any) -> list[Tensor]:
    out = []
    for root in range(n):
        gathered = [torch.empty(4) for _ in range(n)] if rank == root else None
        dist.gather(values(rank, 4), gathered, root, group=group)
        mine = torch.empty(5)
        parts = [values(10 * root + i, 5) for i in range(n)] if rank == root else None
        dist.scatter(mine, parts, root, group=group)
        out += [*(gathered or []), mine]
    return out


def reduce_scatter(rank: int, n: int, group: Any) -> list[Tensor]:
    out = []
    for size in (1, 3, 64, 1000):
        chunk = torch.empty(size)
        dist.reduce_scatter(chunk, [values(rank + 10 * i, size) for i in range(n)], group=group)
        single = torch.empty(size)
        reduce_scatter_single(single, values(rank, n * size), group=group)
        out += [chunk, single]
    return out


def all_to_all(rank: int, n: int, group: Any) -> list[Tensor]:
    even = torch.empty(2 * n)
    dist.all_to_all_single(even, values(rank, 2 * n), group=group)
    sizes = [[(i + j) % 3 for j in range(n)] for i in range(n)]  # rank i sends sizes[i][j] to j
    incoming = [sizes[i][rank] for i in range(n)]
    uneven = torch.empty(sum(incoming))
    dist.all_to_all_single(uneven, values(rank, sum(sizes[rank])), incoming, sizes[rank], group=group)
    return [even, uneven]


def objects(rank: int, n: int, group: Any) -> list[Any]:
    everyone: list[Any] = [None] * n
    dist.all_gather_object(everyone, {"rank": rank, "text": "x" * rank}, group=group)
    shared = [("from", rank), rank]
    dist.broadcast_object_list(shared, 0, group=group)
    dist.barrier(group=group)
    return [everyone, shared]


def asynchronous(rank: int, n: int, group: Any) -> list[Tensor]:
    first, second = values(rank, 9), values(rank, 8)
    works = [dist.all_reduce(t, group=group, async_op=True) for t in (first, second)]
    for work in works:
        work.wait()
        assert work.is_completed()
    return [first, second]


EXACT: dict[str, Callable[..., list[Any]]] = {
    f.__name__: f
    for f in (
        all_reduce,
        all_reduce_coalesced,
        shapes_and_views,
        reduce,
        broadcast,
        all_gather,
        gather_and_scatter,
        reduce_scatter,
        all_to_all,
        objects,
        asynchronous,
    )
}


# -- where it runs ---------------------------------------------------------------------------------------------------
def real(group: Any, rank: int, name: str) -> list[Any]:
    return plain(EXACT[name](rank, group.size(), group))


def virtual(group: Any, rank: int, name: str, placement: tuple[int, ...]) -> dict[int, list[Any]]:
    """The results of this executor's ESTs."""
    n = sum(placement)
    return {r: plain(out) for r, out in ests(group, rank, placement, lambda r: EXACT[name](r, n, None)).items()}


def plain(results: list[Any]) -> list[Any]:
    return [
        (str(r.dtype), tuple(r.shape), bytes(r.contiguous().reshape(-1).view(torch.uint8).tolist()))
        if isinstance(r, Tensor)
        else r
        for r in results
    ]


class Context:
    """Puts the EST's world in force, as the session does."""

    def __init__(self, world: WorldState) -> None:
        self.world = world

    def enter(self) -> None:
        set_world(self.world)

    def leave(self) -> None:
        pass

    def prepare(self) -> None:
        pass

    def thread(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def ests(
    group: Any,
    index: int,
    placement: tuple[int, ...],
    function: Callable[[int], Any],
    *,
    fold: str = "ddp",
    store: dist.Store | None = None,
    control: Any = None,
) -> dict[int, Any]:
    """Run `function(rank)` in every EST of this executor; headers go over `control`, if it is given."""
    where = Placement(placement)
    mine = where.ranges[index]
    peers = Peers(index, len(placement), control or group, group, store) if len(placement) > 1 else Peers(0, 1)
    worlds = {r: WorldState() for r in mine}
    executor = Executor({r: Context(world) for r, world in worlds.items()}, peers, timeout=20)

    def folds(parts: Any, op: str) -> Tensor:
        return tree_fold(parts) if fold == "tree" and op == "sum" else ring_fold(parts, op)

    channel = Channel("world", range(where.num_ests), executor, where, peers, folds)
    install()
    try:
        for r, world in worlds.items():
            world.default_pg = VirtualProcessGroup(r, channel, world)
            world.add(world.default_pg, channel.name, channel.ranks, "gloo")
        return executor.run({r: lambda r=r: function(r) for r in mine})
    finally:
        set_world(None)
        uninstall()


# -- executors that do not agree -------------------------------------------------------------------------------------
def disagree(group: Any, rank: int, what: str, store: str = "") -> tuple[str, str]:
    """The error that each of two executors with one EST each ends with."""

    def est(r: int) -> None:
        dist.barrier()
        if what == "calls":
            dist.all_reduce(torch.zeros(3)) if r == 0 else dist.broadcast(torch.zeros(3), 1)
        elif what == "shapes":
            dist.all_reduce(torch.zeros(3 + r))
        elif what == "failure":
            if r == 1:
                raise ZeroDivisionError("the cause")
            if store:
                dist.recv(torch.zeros(1), 1)
            dist.barrier()

    try:
        ests(group, rank, (1, 1), est, store=dist.FileStore(store, 2) if store else None)
    except BaseException as error:
        return type(error).__name__, str(error)
    return "", ""


def agree(group: Any, rank: int) -> list[Any]:
    """Stop flags and objects of three executors."""
    peers = Peers(rank, 3, group, group)
    flags = [peers.agree("a"), peers.agree("b", asked=STOP if rank == 2 else 0), peers.agree("c")]
    return [*flags, peers.all_gather_object("x" * rank), peers.physical_collectives]


def stop_is_agreed(group: Any, rank: int, placement: tuple[int, ...]) -> dict[int, list[bool]]:
    """At which collective each EST learns of a request that came to the last executor."""

    def est(r: int) -> list[bool]:
        seen = []
        executor: Any = dist.group.WORLD.executor  # type: ignore[union-attr]
        for step in range(3):
            if step == 1 and r == sum(placement) - 1:
                executor.stop_requested = True
            dist.all_reduce(torch.zeros(1))
            seen.append(executor.stop_agreed)
        return seen

    return ests(group, rank, placement, est)


MEMBERS = ([0, 1], [0, 2], [1, 2, 4], [3])


def use_subgroups(rank: int) -> list[Any]:
    out = []
    for members in MEMBERS:
        sub = dist.new_group(members)
        tensor = values(rank, 100)
        if rank in members:
            dist.all_reduce(tensor, group=sub)
            dist.broadcast(tensor, members[-1], group=sub)
            out.append((dist.get_rank(sub), dist.get_world_size(sub), dist.get_global_rank(sub, 0)))
        out.append(tensor)
    return plain(out)


def real_subgroups(group: Any, rank: int) -> list[Any]:
    return use_subgroups(rank)


def subgroups(group: Any, rank: int, placement: tuple[int, ...]) -> dict[int, Any]:
    """Collectives of subgroups that lie within and across executors."""
    return ests(group, rank, placement, use_subgroups)


class OnDevice(Tensor):
    """A tensor that says it lies on a GPU."""

    device = torch.device("cuda", 0)  # type: ignore[assignment]


def share_between_kinds(group: Any, rank: int) -> list[float]:
    """What an executor on a CPU and one on a GPU hold after each has shared a small tensor with the other."""
    peers = Peers(rank, 2, group, group)
    mine = torch.full((3,), float(rank))
    tensors = [(mine.as_subclass(OnDevice) if rank == 1 else mine).clone() for _ in range(2)]
    for source, tensor in enumerate(tensors):
        peers.share("x", [tensor], source)
    return [tensor.sum().item() for tensor in tensors]
