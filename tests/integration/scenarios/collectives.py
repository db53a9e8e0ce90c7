"""Collectives that user code calls inside a step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.data import DataLoader

from ..models import Model, Points, train_data
from ..scenario import Script, feature, note

GROUP = "Collectives"


class Contrastive(Model):
    def __init__(self, sync_grads: bool) -> None:
        super().__init__()
        self.sync_grads = sync_grads

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mine = F.normalize(self(batch[0]), dim=-1)
        everyone = self.all_gather(mine, sync_grads=self.sync_grads)
        logits = mine @ everyone.reshape(-1, mine.shape[-1]).T / 0.1
        target = torch.arange(len(mine)) + self.global_rank * len(mine)
        note(self.global_rank, "gathered", everyone)
        return F.cross_entropy(logits, target)


@feature("self.all_gather(sync_grads=True), contrastive loss", GROUP, sync_grads=True, worlds=(2, 3))
@feature("self.all_gather without gradients", GROUP, sync_grads=False)
def contrastive(config: dict[str, Any], root: Path) -> Script:
    return Script(Contrastive(config["sync_grads"]), train_data(drop_last=True), {"max_epochs": 1})


class Calls(Model):
    def __init__(self, call: str, dtype: Any = None) -> None:
        super().__init__()
        self.call = call

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        rank, size = dist.get_rank(), dist.get_world_size()
        values = torch.randn(7) + rank
        getattr(self, self.call)(rank, size, values)
        return loss

    def _note(self, name: str, value: Any) -> None:
        note(self.global_rank, name, value)

    def all_reduce(self, rank: int, size: int, values: Tensor) -> None:
        for n in (1, 3, 1001, 70_001):
            wide = torch.randn(n)
            dist.all_reduce(wide)
            self._note(f"sum {n}", wide)
        for op in (dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.PRODUCT):
            copy = values.clone()
            dist.all_reduce(copy, op=op)
            self._note(str(op), copy)
        whole = torch.tensor([rank, 2])
        work = dist.all_reduce(whole, async_op=True)
        work.wait()
        self._note("whole", whole)
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            other = values.to(dtype)
            dist.all_reduce(other)
            self._note(str(dtype), other)
        strided = torch.randn(4, 6).t()
        dist.all_reduce(strided.contiguous())
        self._note("strided", strided)

    def broadcast(self, rank: int, size: int, values: Tensor) -> None:
        for root in range(size):
            copy = values + root
            dist.broadcast(copy, src=root)
            self._note(f"from {root}", copy)
        objects = [{"rank": rank, "list": [rank] * rank}, "text"]
        dist.broadcast_object_list(objects, src=size - 1)
        self._note("objects", objects)

    def gather(self, rank: int, size: int, values: Tensor) -> None:
        everyone = [torch.zeros(7) for _ in range(size)]
        dist.all_gather(everyone, values)
        self._note("all_gather", everyone)
        flat = torch.zeros(7 * size)
        dist.all_gather_into_tensor(flat, values)
        self._note("into tensor", flat)
        objects: list[Any] = [None] * size
        dist.all_gather_object(objects, {"rank": rank, "values": values[:rank]})
        self._note("objects", objects)
        lists = [torch.zeros(7) for _ in range(size)] if rank == 1 else None
        dist.gather(values, lists, dst=1)
        self._note("gather", lists)
        some: list[Any] | None = [None] * size if rank == 0 else None
        dist.gather_object(rank, some, dst=0)
        self._note("gather_object", some)

    def scatter(self, rank: int, size: int, values: Tensor) -> None:
        mine = torch.zeros(3)
        dist.scatter(mine, [torch.full((3,), float(i)) + values[:3] for i in range(size)] if rank == 1 else None, src=1)
        self._note("scatter", mine)
        box: list[Any] = [None]
        dist.scatter_object_list(box, [f"for {i}" for i in range(size)] if rank == 0 else None, src=0)
        self._note("objects", box)

    def reduce(self, rank: int, size: int, values: Tensor) -> None:
        for root in range(size):
            copy = values.clone()
            dist.reduce(copy, dst=root)
            if rank == root:
                self._note(f"to {root}", copy)

    def reduce_scatter(self, rank: int, size: int, values: Tensor) -> None:
        mine = torch.zeros(5)
        dist.reduce_scatter(mine, [torch.randn(5) + i for i in range(size)])
        self._note("list", mine)
        dist.reduce_scatter_tensor(mine, torch.randn(5 * size))
        self._note("tensor", mine)

    def all_to_all(self, rank: int, size: int, values: Tensor) -> None:
        flat = torch.zeros(2 * size)
        dist.all_to_all_single(flat, torch.arange(2.0 * size) + 100 * rank)
        self._note("single", flat)

    def new_group(self, rank: int, size: int, values: Tensor) -> None:
        first, last = dist.new_group([0, size - 1]), dist.new_group([size - 1])
        alone = [dist.new_group([r]) for r in range(size)]
        if rank in (0, size - 1):
            copy = values.clone()
            dist.all_reduce(copy, group=first)
            self._note("pair", [copy, dist.get_rank(first), dist.get_world_size(first)])
        if rank == size - 1:
            dist.barrier(group=last)
        dist.all_reduce(values, group=alone[rank])
        self._note("alone", values)

    def strategy(self, rank: int, size: int, values: Tensor) -> None:
        strategy = self.trainer.strategy
        strategy.barrier("here")
        self._note("broadcast", strategy.broadcast({"rank": rank, "x": values}))
        self._note("from 1", strategy.broadcast(rank, src=1))
        self._note("mean", strategy.reduce(values.clone()))
        self._note("sum", strategy.reduce(values.clone(), reduce_op="sum"))
        self._note("any", strategy.reduce_boolean_decision(rank == 1, all=False))
        self._note("all", strategy.reduce_boolean_decision(rank == 1))
        self._note("ranks", [strategy.global_rank, strategy.local_rank, strategy.world_size, strategy.node_rank])
        self._note("trainer", [self.trainer.global_rank, self.trainer.world_size, self.trainer.is_global_zero])

    def functional(self, rank: int, size: int, values: Tensor) -> None:
        from torch.distributed import nn as dnn

        leaf = values.requires_grad_()
        dnn.functional.all_reduce(leaf * (rank + 1)).pow(2).sum().backward()
        self._note("gradient", leaf.grad)


CALLS = (
    "all_reduce",
    "broadcast",
    "gather",
    "scatter",
    "reduce",
    "reduce_scatter",
    "all_to_all",
    "new_group",
    "strategy",
    "functional",
)


def calls(config: dict[str, Any], root: Path) -> Script:
    trainer = {"max_epochs": 1, "limit_train_batches": 3, "precision": config.get("precision", "32-true")}
    return Script(Calls(config["call"]), train_data(), trainer)


for _call in CALLS:
    feature(
        f"torch.distributed: {_call}" if _call != "strategy" else "strategy.barrier/broadcast/reduce", GROUP, call=_call
    )(calls)
feature("collectives under 64-true", GROUP, call="all_reduce", precision="64-true")(calls)
feature("collectives under bf16-true", GROUP, call="gather", precision="bf16-true")(calls)


class ReadsEnvironment(Points):
    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x, y, torch.tensor([int(os.environ[name]) for name in ("LOCAL_RANK", "WORLD_SIZE")])


class EnvironmentModel(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        note(self.global_rank, "in the worker", batch[2])
        note(self.global_rank, "in the step", {n: os.environ.get(n) for n in ("LOCAL_RANK", "WORLD_SIZE")})
        return super().training_step(batch[:2], batch_idx)


@feature("LOCAL_RANK and WORLD_SIZE in the environment, in the step and in data workers", GROUP, workers=0)
@feature("the environment in data workers", GROUP, workers=1)
def environment(config: dict[str, Any], root: Path) -> Script:
    data = DataLoader(ReadsEnvironment(24), batch_size=4, num_workers=config["workers"])
    return Script(EnvironmentModel(), {"train_dataloaders": data}, {"max_epochs": 1})
