"""What the pool's processes run: real collectives on one side, the package on the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_easyscale.placement import Placement
from lightning_easyscale.reduction.bucket import BucketForm, FlatGradients, LocalGradients
from lightning_easyscale.reduction.exchange import Finish, NativeReduction, RingReduction, TreeReduction
from lightning_easyscale.reduction.orders import ring_fold, ring_sum, tree_fold
from lightning_easyscale.reduction.wire import Wire

OPS = {
    "sum": dist.ReduceOp.SUM,
    "product": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}
SMALL = (1, 2, 3, 7, 64, 1000, 4099)


def inputs(n: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * n + size)
    # Magnitudes differ so that nearly every element shows a wrong order.
    scale = torch.randint(-8, 9, (n, size), generator=generator).double()
    return list((torch.randn(n, size, generator=generator, dtype=torch.float64) * 2.0**scale).to(dtype))


def compositions(n: int) -> Iterator[tuple[int, ...]]:
    for cuts in itertools.product((False, True), repeat=n - 1):
        bounds = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), n]
        yield tuple(b - a for a, b in itertools.pairwise(bounds))


def ring_differs(
    group: dist.ProcessGroup, rank: int, sizes: tuple[int, ...], dtypes: tuple[str, ...], ops: tuple[str, ...]
) -> list[str]:
    """Cases in which `ring_fold` is not what gloo's all-reduce leaves on this rank."""
    n, wrong = group.size(), []
    for size, name, op in itertools.product(sizes, dtypes, ops):
        parts = inputs(n, size, getattr(torch, name))
        expected = parts[rank].clone()
        dist.all_reduce(expected, OPS[op], group=group)
        kept = [part.clone() for part in parts]
        got = ring_fold(parts, op)
        untouched = all(torch.equal(a, b) for a, b in zip(parts, kept, strict=True))
        consumed = ring_fold(parts, OPS[op], consume=True)
        if not (torch.equal(got, expected) and untouched and torch.equal(consumed, expected)):
            wrong.append(f"N={n} size={size} {name} {op}")
        if op == "sum":
            parts = [part.clone() for part in kept]
            ring_sum(parts, apart := torch.empty_like(parts[0]))
            untouched = all(torch.equal(a, b) for a, b in zip(parts, kept, strict=True))
            ring_sum(parts, parts[0])
            if not (torch.equal(apart, expected) and untouched and torch.equal(parts[0], expected)):
                wrong.append(f"N={n} size={size} {name} {op} at once")
    return wrong


def extremes_differ(group: dist.ProcessGroup, rank: int) -> list[str]:
    """Cases with NaN, infinities and both zeros in which minimum or maximum has other bits than gloo's."""
    n, wrong = group.size(), []
    values = torch.tensor([float("nan"), 0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf")])
    parts = [column.contiguous() for column in torch.cartesian_prod(*[values] * n).T]
    for op, name in itertools.product(("min", "max"), ("float32", "float64", "bfloat16")):
        typed = [part.to(getattr(torch, name)) for part in parts]
        expected = typed[rank].clone()
        dist.all_reduce(expected, OPS[op], group=group)
        if not torch.equal(ring_fold(typed, op).view(torch.uint8), expected.view(torch.uint8)):
            wrong.append(f"{op} {name}")
    return wrong


def local_gradients(parts: list[Tensor], device: str = "cpu") -> LocalGradients:
    """One EST's gradient each, as three parameters' of unlike lengths, already scaled."""
    size = parts[-1].numel()
    lengths = [n for n in (size // 7, size // 3, size - size // 7 - size // 3) if n]
    form = BucketForm(range(len(lengths)), [torch.empty(n, dtype=parts[-1].dtype, device=device) for n in lengths])
    pieces = [part.split(lengths) if part.device.type == device else part for part in parts]
    return LocalGradients(form, pieces, None)


class ForcedRing(RingReduction):
    """The general path also where the backend's own all-reduce would do."""

    def _one_est_each(self) -> bool:
        return False


class FlatRing(ForcedRing):
    """The same over flat copies of the gradients, as on a device."""

    def _ring(self, wire: Wire, local: LocalGradients | FlatGradients, out: Tensor) -> Tensor:
        assert isinstance(local, LocalGradients)
        return super()._ring(wire, local.flat(), out)


class ApartRing(ForcedRing):
    """All ESTs' gradients but the last one's in one tensor each, as they come from host memory."""

    def start(self, index: int, local: LocalGradients) -> Finish:
        *waiting, last = local.pieces
        local.pieces = [*(torch.cat(list(own)) for own in waiting), last]
        return super().start(index, local)


def reduced_by(
    reduction: RingReduction | TreeReduction | NativeReduction, index: int, parts: list[Tensor], device: str = "cpu"
) -> Callable[[], Tensor]:
    """Start a reduction; the returned function waits for its result."""
    if isinstance(reduction, TreeReduction):
        return reduction.start(index, parts).wait
    local = local_gradients(parts, device)
    finish = reduction.start(index, local)

    def wait() -> Tensor:
        finish()
        return torch.cat(local.results)

    return wait


def exchange_differs(
    group: dist.ProcessGroup, rank: int, placement: tuple[int, ...], sizes: tuple[int, ...], dtypes: tuple[str, ...]
) -> list[str]:
    """Cases in which a reduction over this placement is not the fold of all N parts; several buckets at once."""
    where = Placement(placement)
    n, wrong = where.num_ests, []
    mine = where.ranges[rank]
    alone = group if group.size() > 1 else None
    rings = (RingReduction, ForcedRing, FlatRing, ApartRing)
    for kind, fold in (*((ring, ring_fold) for ring in rings), (TreeReduction, tree_fold)):
        reduction = kind(where, rank, alone, n)
        cases = list(itertools.product(sizes, dtypes))
        waits = []
        for i, (size, name) in enumerate(cases):
            parts = [part.clone() for part in inputs(n, size, getattr(torch, name))[mine.start : mine.stop]]
            waits.append(reduced_by(reduction, i, parts))
        flags = torch.zeros(n, dtype=torch.int32)
        flags[mine.start : mine.stop] = 1
        shared = reduction.share(flags)
        for (size, name), wait in zip(cases, waits, strict=True):
            if not torch.equal(wait(), fold(inputs(n, size, getattr(torch, name)))):
                wrong.append(f"{kind.__name__} {placement} size={size} {name}")
        if int(shared.wait().sum()) != n:
            wrong.append(f"{kind.__name__} {placement} flags")
        reduction.close()
    return wrong


def native(group: dist.ProcessGroup, rank: int, placement: tuple[int, ...]) -> bool:
    """D0 is the local sum in rank order, then the backend's all-reduce."""
    where = Placement(placement)
    parts = inputs(where.num_ests, 1000, torch.float32)
    mine = where.ranges[rank]
    expected = parts[mine.start].clone()
    for part in parts[mine.start + 1 : mine.stop]:
        expected += part
    dist.all_reduce(expected, group=group)
    reduction = NativeReduction(where, rank, group, where.num_ests)
    got = reduced_by(reduction, 0, [part.clone() for part in parts[mine.start : mine.stop]])()
    reduction.close()
    return torch.equal(got, expected)
