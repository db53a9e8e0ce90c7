"""Batches made by loader workers: every source of randomness, and what a worker can see of itself."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, get_worker_info

from ..models import Model, Points
from ..scenario import Script, feature, note

GROUP = "Loader workers"


class Augmented(Dataset):
    """Draws from every generator whenever a point is read, and says what the worker knows of itself."""

    def __init__(self, n: int, counts: bool = False) -> None:
        self.points = Points(n, seed=n)
        self.rng = np.random.default_rng(5)
        self.calls = 0
        self.counts = counts
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Any:
        x, y = self.points[index]
        drawn = torch.rand(()), random.random(), np.random.randn(), np.random.rand(), self.rng.random()
        self.calls += 1
        info = get_worker_info()
        who = [-1] if info is None else [info.id, info.num_workers, info.seed, info.dataset is self, self.epoch]
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else -1
        who += [rank, int(os.environ["RANK"] if "RANK" in os.environ else os.environ.get("LOCAL_RANK", "0"))]
        x = x + 0.1 * sum(float(d) for d in drawn)
        return x, y, [float(d) for d in drawn], who, self.calls if self.counts else 0


def draws_at_start(worker: int) -> None:
    """A `worker_init_fn` that moves every generator and configures the dataset."""
    torch.rand(worker + 1)
    random.random()
    np.random.rand(2 * worker + 1)
    info = get_worker_info()
    assert info is not None
    if isinstance(info.dataset, Augmented):
        info.dataset.calls = 100 * worker


def stack_and_jitter(samples: list[Any]) -> Any:
    """A collate function that draws."""
    x = torch.stack([sample[0] for sample in samples]) + 0.01 * torch.randn(()) + 0.01 * random.random()
    return x, torch.stack([sample[1] for sample in samples]), [sample[2:] for sample in samples]


class Seen(Model):
    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch[:2])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        note(self.global_rank, "batch", batch)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        note(self.global_rank, "val batch", batch)
        return super().validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])


class SetsEpoch(Seen):
    """Changes its dataset between epochs, which workers that are started later see."""

    def on_train_epoch_start(self) -> None:
        self.trainer.train_dataloader.dataset.epoch = 10 * self.current_epoch + self.global_rank


def augmented(n: int = 40, *, counts: bool = False, **options: Any) -> DataLoader:
    given = {"batch_size": 4, "shuffle": True, "num_workers": 2, **options}
    return DataLoader(Augmented(n, counts), **given)


@feature("every generator, worker information, mutated datasets", GROUP, worlds=(2, 3), loader={"counts": True})
@feature("worker_init_fn, 3 workers, prefetch_factor=1", GROUP, loader={"num_workers": 3, "prefetch_factor": 1}, init=1)
@feature("persistent_workers", GROUP, loader={"persistent_workers": True}, init=1)
@feature("generator=, not sharded", GROUP, generator=11, trainer={"use_distributed_sampler": False})
@feature(
    "collate_fn that draws, drop_last, timeout", GROUP, collate=1, loader={"drop_last": True, "timeout": 30, "n": 43}
)
@feature("limited", GROUP, trainer={"limit_train_batches": 3}, loader={"num_workers": 3})
@feature(
    "limit_train_batches, persistent", GROUP, trainer={"limit_train_batches": 3}, loader={"persistent_workers": True}
)
@feature("a worker each", GROUP, worlds=(3,), loader={"num_workers": 1, "counts": True})
def randomness(config: dict[str, Any], root: Path) -> Script:
    return Script(Seen(), {"train_dataloaders": _loader(config)}, {"max_epochs": 3, **config.get("trainer", {})})


def _loader(config: dict[str, Any]) -> DataLoader:
    options = dict(config.get("loader", {}))
    if config.get("init"):
        options["worker_init_fn"] = draws_at_start
    if config.get("collate"):
        options["collate_fn"] = stack_and_jitter
    if config.get("generator"):
        options["generator"] = torch.Generator().manual_seed(config["generator"])
    return augmented(**options)


class Fails(Augmented):
    def __getitem__(self, index: int) -> Any:
        if index == 9:
            raise LookupError(f"no sample {index}")
        return super().__getitem__(index)


@feature("an error in a worker", GROUP, worlds=(2,), same_error="LookupError")
def failing(config: dict[str, Any], root: Path) -> Script:
    return Script(Seen(), {"train_dataloaders": DataLoader(Fails(20), batch_size=2, num_workers=1)})


@feature("dataset changed between epochs", GROUP)
def between_epochs(config: dict[str, Any], root: Path) -> Script:
    return Script(SetsEpoch(), {"train_dataloaders": augmented()}, {"max_epochs": 3})


class Shuffled(BatchSampler):
    """A batch sampler with a generator of its own."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.rng = random.Random(3)

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.n):
            yield [self.rng.randrange(40) for _ in range(4)]

    def __len__(self) -> int:
        return self.n


@feature("batch sampler with its own generator", GROUP, kind="batch sampler")
@feature("batch_size=None", GROUP, kind="no batches")
def batching(config: dict[str, Any], root: Path) -> Script:
    if config["kind"] == "batch sampler":
        made = DataLoader(Augmented(40), batch_sampler=Shuffled(10), num_workers=2)
    else:
        made = DataLoader(Batches(), batch_size=None, sampler=RandomSampler(range(24)), num_workers=2)
    return Script(Seen(), {"train_dataloaders": made}, {"max_epochs": 2, "use_distributed_sampler": False})


class Batches(Dataset):
    """Items that are batches already."""

    def __init__(self) -> None:
        self.points = Points(24)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        x, y = self.points[index]
        return x[None] + 0.1 * torch.randn(2, 1), y[None].expand(2), index


@feature("validation loaders", GROUP, worlds=(2, 3))
@feature("persistent validation workers", GROUP, persistent=True)
def validation(config: dict[str, Any], root: Path) -> Script:
    persistent = config.get("persistent", False)
    data = {
        "train_dataloaders": augmented(24, persistent_workers=persistent),
        "val_dataloaders": [augmented(16, shuffle=False, persistent_workers=persistent), augmented(12, shuffle=False)],
    }
    return Script(Seen(), data, {"max_epochs": 2})


class Stream(IterableDataset):
    """Sharded over ranks and workers; workers end at different times."""

    def __init__(self, n: int = 61) -> None:
        self.points = Points(n)

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        ranks, rank = 1, 0
        if torch.distributed.is_initialized():
            ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        length = len(self.points.x) // ranks
        for index in range(worker, length, workers):
            x, y = self.points[rank * length + index]
            yield x + 0.1 * torch.randn(x.shape) + 0.1 * random.random() + 0.1 * np.random.randn(), y, index


class Resumable(Stream):
    """The same, with a state."""

    def __init__(self, n: int = 61) -> None:
        super().__init__(n)
        self.passed = 0
        self.skip = 0

    def __iter__(self) -> Iterator[Any]:
        self.passed, skip, self.skip = self.skip, self.skip, 0
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        length = len(self.points.x) // ranks
        for index in list(range(worker, length, workers))[skip:]:
            self.passed += 1
            x, y = self.points[rank * length + index]
            yield x + 0.1 * torch.randn(x.shape) + 0.1 * random.random(), y, index

    def state_dict(self) -> dict[str, Any]:
        return {"passed": self.passed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skip = state["passed"]


@feature("iterable dataset", GROUP, kind="stream", workers=3)
@feature("iterable dataset with a state", GROUP, kind="state", workers=2)
@feature("iterable dataset, persistent", GROUP, kind="stream", workers=2, persistent=True)
@feature("iterable dataset with a state, no workers", GROUP, kind="state", workers=0)
@feature("StatefulDataLoader", GROUP, kind="torchdata", workers=2, skip_without="torchdata")
@feature("StatefulDataLoader, iterable", GROUP, kind="torchdata stream", workers=2, skip_without="torchdata")
@feature("StatefulDataLoader, no workers", GROUP, kind="torchdata", workers=0, skip_without="torchdata")
def streams(config: dict[str, Any], root: Path) -> Script:
    kind, workers = config["kind"], config["workers"]
    options = {"num_workers": workers, "batch_size": 3, "persistent_workers": config.get("persistent", False)}
    if kind.startswith("torchdata"):
        from torchdata.stateful_dataloader import StatefulDataLoader

        if kind == "torchdata":
            data: Any = StatefulDataLoader(Augmented(40), shuffle=True, **options)
        else:
            data = StatefulDataLoader(Stream(), **options)
    else:
        data = DataLoader(Resumable() if kind == "state" else Stream(), **options)
    return Script(Seen(norm=False), {"train_dataloaders": data}, {"max_epochs": 3})
