"""What each collective computes, as pure functions of all members' deposits in group order.

`every[i]` is what member i brought (a list of tensors); the result holds one entry per member. Nothing here depends on
where the members run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Fold = Callable[[Sequence[Tensor], str], Tensor]
"""Folds equal-length flat tensors, one per member in group order; by sum, product, min or max."""

_ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}


def all_reduce(every: list[list[Tensor]], op: dist.ReduceOp, fold: Fold, *, coalesced: bool = False) -> list[Any]:
    """The reduced tensors, for every member.

    Raises:
        RuntimeError: for a reduction that no CPU backend of `torch.distributed` has.
    """
    if coalesced and len(every[0]) > 1:
        flats = [[torch.cat([t.reshape(-1) for t in tensors])] for tensors in every]
        flat = all_reduce(flats, op, fold)[0][0]
        sizes = [t.numel() for t in every[0]]
        result = [part.view(t.shape) for part, t in zip(flat.split(sizes), every[0], strict=True)]
    else:
        result = [_reduce([tensors[i] for tensors in every], op, fold) for i in range(len(every[0]))]
    return [result] * len(every)


def _reduce(parts: list[Tensor], op: dist.ReduceOp, fold: Fold) -> Tensor:
    name = str(op.op if hasattr(op, "op") else op).rsplit(".", 1)[-1].lower()
    device, shape = parts[0].device, parts[0].shape
    flats = [p.to(device).reshape(-1) for p in parts]
    if name in _ELEMENTWISE:
        result = flats[0].clone()
        for flat in flats[1:]:
            result = _ELEMENTWISE[name](result, flat)
    elif name == "avg":
        # NCCL, the only backend that averages, cuts integers.
        rounding = None if flats[0].is_floating_point() or flats[0].is_complex() else "trunc"
        result = fold(flats, "sum").div_(len(flats), rounding_mode=rounding)
    elif name in ("sum", "product", "min", "max"):
        result = fold(flats, name)
    else:
        raise RuntimeError(f"`ReduceOp.{name.upper()}` is not supported in the virtual world. HINT: use SUM.")
    return result.view(shape)


def gather_all(every: list[list[Tensor]]) -> list[Any]:
    """Everything, for every member."""
    return [every] * len(every)


def scatter(every: list[list[list[Tensor]]], root: int) -> list[Any]:
    """Member i gets the i-th tensor of the root's list."""
    return list(every[root][0])


def reduce_scatter(every: list[list[Tensor]], op: dist.ReduceOp, fold: Fold) -> list[Any]:
    """Member i gets the reduction of everyone's i-th tensor; gloo reduces each tensor of the list by itself."""
    return list(all_reduce(every, op, fold)[0])


def reduce_scatter_single(every: list[list[Tensor]], op: dist.ReduceOp, fold: Fold) -> list[Any]:
    """Member i gets the i-th chunk of the reduction of everyone's one tensor; gloo reduces the tensor as a whole."""
    (whole,) = all_reduce(every, op, fold)[0]
    return list(whole.chunk(len(every)))


def all_to_all(every: list[list[Tensor]]) -> list[Any]:
    """Member i gets everyone's i-th tensor."""
    return [[tensors[i] for tensors in every] for i in range(len(every))]


def detached(deposit: Any) -> Any:
    """A deposit whose tensors carry no graph."""
    if isinstance(deposit, Tensor):
        return deposit.detach()
    return [detached(v) for v in deposit] if isinstance(deposit, (list, tuple)) else deposit


def on_host(deposit: Any) -> Any:
    """A deposit whose tensors are in host memory, to be sent to other executors."""
    if isinstance(deposit, Tensor):
        return deposit.cpu()
    if isinstance(deposit, dict):
        return {k: on_host(v) for k, v in deposit.items()}
    return [on_host(v) for v in deposit] if isinstance(deposit, (list, tuple)) else deposit
