"""Messages between ranks, subgroups, and the other spellings of collectives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as traced
from torch import Tensor
from torch.distributed import nn as dnn
from torch.distributed.device_mesh import init_device_mesh

from ..models import Model, train_data
from ..scenario import Script, feature, note
from .collectives import GROUP


class Calls(Model):
    def __init__(self, call: str) -> None:
        super().__init__()
        self.call = call

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        rank, size = dist.get_rank(), dist.get_world_size()
        getattr(self, self.call)(rank, size, torch.randn(7) + rank)
        return super().training_step(batch, batch_idx)

    def _note(self, name: str, value: Any) -> None:
        note(self.global_rank, name, value)

    def blocking(self, rank: int, size: int, values: Tensor) -> None:
        """A ring: the first rank sends first, the others hand on what they got."""
        after, before = (rank + 1) % size, (rank - 1) % size
        got = torch.zeros(7)
        if rank == 0:
            dist.send(values, dst=after)
            dist.recv(got, src=before, tag=0)
        else:
            dist.recv(got, src=before)
            dist.send(got + values, dst=after)
        self._note("ring", got)

    def nonblocking(self, rank: int, size: int, values: Tensor) -> None:
        """Everyone waits for everyone, having sent afterwards; two messages by tag, taken in the other order."""
        others = [r for r in range(size) if r != rank]
        got = {(r, tag): torch.zeros(7) for r in others for tag in (1, 2)}
        waits = [dist.irecv(got[r, tag], src=r, tag=tag) for r in others for tag in (2, 1)]
        sends = [dist.isend(values * tag, dst=r, tag=tag) for r in others for tag in (1, 2)]
        for work in [*waits, *sends]:
            work.wait()
        self._note("everyone's", got)

    def batched(self, rank: int, size: int, values: Tensor) -> None:
        after, before, got = (rank + 1) % size, (rank - 1) % size, torch.zeros(7)
        messages = [dist.P2POp(dist.irecv, got, before), dist.P2POp(dist.isend, values, after)]
        for work in dist.batch_isend_irecv(messages):
            work.wait()
        self._note("before", got)

    def message_objects(self, rank: int, size: int, values: Tensor) -> None:
        last = size - 1
        if rank == last:
            dist.send_object_list([{"from": rank, "values": values}, "text"], dst=0)
        elif rank == 0:
            got: list[Any] = [None, None]
            self._note("sender", dist.recv_object_list(got, src=last))
            self._note("objects", got)

    def any_source(self, rank: int, size: int, values: Tensor) -> None:
        got = torch.zeros(7)
        if rank == 1:
            dist.send(values, dst=0)
        elif rank == 0:
            self._note("sender", dist.recv(got))
            self._note("got", got)

    def subgroups(self, rank: int, size: int, values: Tensor) -> None:
        inner = [list(range(1, size - 1))] if size > 2 else []
        mine, every = dist.new_subgroups_by_enumeration([[0, size - 1], *inner])
        self._note("groups", [dist.get_process_group_ranks(g) for g in every if isinstance(g, dist.ProcessGroup)])
        members = dist.get_process_group_ranks(mine)
        place, n = dist.get_rank(mine), dist.get_world_size(mine)
        self._note("place", [place, n, dist.get_group_rank(mine, rank), dist.get_backend(mine)])
        dist.all_reduce(values, group=mine)
        self._note("sum", values)
        parts = [torch.zeros(7) for _ in members]
        dist.all_gather(parts, values + rank, group=mine)
        self._note("parts", parts)
        dist.broadcast(values, src=members[-1], group=mine)
        dist.barrier(group=mine)
        objects: list[Any] = [None] * n
        dist.all_gather_object(objects, f"of {rank}", group=mine)
        self._note("objects", [values, objects])
        if n > 1:
            got = torch.zeros(7)
            if place == 0:
                dist.send(values, dst=members[1], group=mine)
            elif place == 1:
                dist.recv(got, src=members[0], group=mine)
            self._note("within", got)

    def traceable(self, rank: int, size: int, values: Tensor) -> None:
        world = dist.group.WORLD
        self._note("sum", traced.all_reduce(values, "sum", world) + 0)
        self._note("gathered", traced.all_gather_tensor(values, 0, world) + 0)
        self._note("scattered", traced.reduce_scatter_tensor(torch.randn(2 * size), "sum", 0, world) + 0)
        self._note("exchanged", traced.all_to_all_single(torch.arange(2.0 * size) + rank, None, None, world) + 0)
        self._note("broadcast", traced.broadcast(values, 1, world) + 0)

    def differentiable(self, rank: int, size: int, values: Tensor) -> None:
        forms = {
            "all_gather": lambda x: torch.cat(dnn.functional.all_gather(x)),
            "reduce_scatter": lambda x: dnn.functional.reduce_scatter(torch.empty(7), [x * i for i in range(size)]),
            "all_to_all_single": lambda x: dnn.functional.all_to_all_single(torch.empty(2 * size), x[:2].repeat(size)),
            "broadcast": lambda x: dnn.functional.broadcast(x, 1),
            "all_reduce": lambda x: dnn.functional.all_reduce(x * rank),
        }
        for name, form in forms.items():
            leaf = values.clone().requires_grad_()
            result = form(leaf)
            result.pow(2).sum().backward()
            self._note(name, [result, leaf.grad])

    def mesh(self, rank: int, size: int, values: Tensor) -> None:
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("data",))
        dist.all_reduce(values, group=mesh.get_group("data"))
        self._note("sum", [values, mesh.get_local_rank("data"), mesh.size()])

    def barriers(self, rank: int, size: int, values: Tensor) -> None:
        dist.barrier()
        dist.monitored_barrier()
        dist.barrier(async_op=True).wait()
        self._note("world", [dist.is_initialized(), dist.get_backend(), dist.get_rank(), dist.get_world_size()])

    def coalesced(self, rank: int, size: int, values: Tensor) -> None:
        several = [values[:3].clone(), values[3:].clone()]
        dist.all_reduce_coalesced(several)
        self._note("sum", several)
        lists = [[torch.zeros(3), torch.zeros(4)] for _ in range(size)]
        dist.all_gather_coalesced(lists, [values[:3].clone(), values[3:].clone()])
        self._note("parts", lists)

    def bitwise(self, rank: int, size: int, values: Tensor) -> None:
        for op in (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR):
            whole = torch.randint(0, 1000, (9,)) + rank
            dist.all_reduce(whole, op=op)
            self._note(str(op), whole)
        flags = torch.tensor([rank == 1, True])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        self._note("flags", flags)

    def uneven(self, rank: int, size: int, values: Tensor) -> None:
        """As a mixture of experts does: every rank another amount for every other."""
        sent = [(rank + i) % 3 for i in range(size)]
        got = [(i + rank) % 3 for i in range(size)]
        output = torch.zeros(sum(got), 2)
        dist.all_to_all_single(output, torch.randn(sum(sent), 2) + rank, got, sent)
        self._note("exchanged", output)


CALLS = {
    "blocking": "send, recv",
    "nonblocking": "isend, irecv, tags",
    "batched": "batch_isend_irecv",
    "message_objects": "send_object_list",
    "any_source": "recv from any rank",
    "subgroups": "collectives and messages in subgroups",
    "traceable": "functional collectives",
    "differentiable": "torch.distributed.nn",
    "mesh": "device mesh",
    "barriers": "barrier, monitored_barrier",
    "coalesced": "coalesced collectives",
    "bitwise": "all_reduce of integers and flags",
    "uneven": "all_to_all_single, uneven",
}


def calls(config: dict[str, Any], root: Path) -> Script:
    return Script(Calls(config["call"]), train_data(), {"max_epochs": 1, "limit_train_batches": 2})


for _call, _name in CALLS.items():
    feature(f"torch.distributed: {_name}", GROUP, call=_call)(calls)
