"""Where batches come from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, WeightedRandomSampler

from ..models import Model, Points, loader, train_data, train_val_data
from ..scenario import Script, feature, note

GROUP = "Data"


class Notes(Model):
    """Notes every batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        note(self.global_rank, "batch", batch)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        note(self.global_rank, f"val {dataloader_idx}", batch)
        loss = self.loss(batch)
        self.log("val", loss, sync_dist=True)
        return loss


@feature("several validation loaders", GROUP)
def several_val(config: dict[str, Any], root: Path) -> Script:
    data = {"train_dataloaders": loader(), "val_dataloaders": [loader(20, shuffle=False), loader(13, shuffle=False)]}
    return Script(Notes(), data, {"max_epochs": 2})


class Combined(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        note(self.global_rank, "batch", batch)
        parts = [part for part in batch.values() if part is not None]
        return sum(self.loss(part) for part in parts)


@feature("CombinedLoader, min_size", GROUP, mode="min_size")
@feature("CombinedLoader, max_size_cycle", GROUP, mode="max_size_cycle")
def combined(config: dict[str, Any], root: Path) -> Script:
    both = CombinedLoader({"a": loader(48, noise=True), "b": loader(30)}, mode=config["mode"])
    return Script(Combined(), {"train_dataloaders": both}, {"max_epochs": 2})


class Stream(IterableDataset):
    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rank = size = None
        if torch.distributed.is_initialized():
            rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        points = Points(self.n)
        for index in range(rank or 0, self.n - self.n % (size or 1), size or 1):
            x, y = points[index]
            yield x + 0.1 * torch.randn(x.shape), y


@feature("iterable dataset sharded by rank", GROUP, sized=False)
def iterable(config: dict[str, Any], root: Path) -> Script:
    data = {"train_dataloaders": DataLoader(Stream(48), batch_size=4)}
    return Script(Notes(), data, {"max_epochs": 2})


class EveryThird(Sampler):
    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.n).tolist()
        return iter(order[::3] + order[1::3] + order[2::3])

    def __len__(self) -> int:
        return self.n


class OwnBatches(BatchSampler):
    def __init__(self, sampler: Any, batch_size: int, drop_last: bool) -> None:
        super().__init__(sampler, batch_size, drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield batch[::-1]


@feature("custom sampler", GROUP, kind="sampler")
@feature("weighted sampling", GROUP, kind="weighted")
@feature("custom batch sampler", GROUP, kind="batch")
@feature("use_distributed_sampler=False", GROUP, kind="own")
def samplers(config: dict[str, Any], root: Path) -> Script:
    points = Points(40)
    made: dict[str, Any] = {
        "sampler": lambda: DataLoader(points, batch_size=4, sampler=EveryThird(40)),
        "weighted": lambda: DataLoader(points, 4, sampler=WeightedRandomSampler(torch.arange(1.0, 41.0), 40)),
        "batch": lambda: DataLoader(points, batch_sampler=OwnBatches(RandomSampler(points), 4, False)),
        "own": lambda: DataLoader(points, batch_size=4, shuffle=True),
    }
    trainer = {"max_epochs": 2, "use_distributed_sampler": config["kind"] not in ("own", "weighted")}
    return Script(Notes(), {"train_dataloaders": made[config["kind"]]()}, trainer)


class EveryHook(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.prepare_data_per_node = True

    def prepare_data(self) -> None:
        self.calls.append("prepare")

    def setup(self, stage: str) -> None:
        self.calls.append(f"setup {stage} {self.trainer.global_rank}")
        self.train = Points(40, noise=True)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=4, shuffle=True)

    def val_dataloader(self) -> Any:
        return loader(20, shuffle=False)

    def test_dataloader(self) -> Any:
        return loader(12, shuffle=False)

    def predict_dataloader(self) -> Any:
        return loader(12, shuffle=False)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 2, batch[1]]

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer.training:
            batch[0] = batch[0] + 0.1 * torch.randn_like(batch[0])
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"calls": len(self.calls)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls.append("load")

    def teardown(self, stage: str) -> None:
        note(self.trainer.global_rank, "calls", self.calls)


def _fit_and_test(trainer: Any, script: Script, make_trainer: Any) -> None:
    datamodule = script.data["datamodule"]
    trainer.fit(script.module, datamodule=datamodule)
    trainer.test(script.module, datamodule=datamodule)
    trainer.predict(script.module, datamodule=datamodule)


@feature("DataModule with every hook, fit, test and predict", GROUP, worlds=(2, 3))
def datamodule(config: dict[str, Any], root: Path) -> Script:
    return Script(Model(), {"datamodule": EveryHook()}, {"max_epochs": 2}, main=_fit_and_test)


class TransferHooks(Notes):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return (x + torch.rand_like(x) if self.training else x), y


@feature("batch-transfer hooks with random augmentation", GROUP)
def transfer(config: dict[str, Any], root: Path) -> Script:
    return Script(TransferHooks(), train_val_data(), {"max_epochs": 2})


@feature("drop_last, length not divisible by N", GROUP, loader={"n": 47, "drop_last": True})
@feature("length not divisible by N or the batch size", GROUP, loader={"n": 43})
@feature("random augmentation in the main process", GROUP, loader={"n": 40, "noise": True})
@feature("num_workers=1 at a fixed placement", GROUP, loader={"n": 40, "noise": True, "num_workers": 1})
@feature("num_workers=2, persistent", GROUP, loader={"n": 40, "num_workers": 2, "persistent_workers": True})
def lengths(config: dict[str, Any], root: Path) -> Script:
    return Script(Notes(), {"train_dataloaders": loader(**config["loader"])}, {"max_epochs": 2})


class Reloads(Notes):
    def train_dataloader(self) -> Any:
        return loader(20 + 4 * self.current_epoch)

    def val_dataloader(self) -> Any:
        return loader(20, shuffle=False)


@feature("overfit_batches", GROUP, trainer={"overfit_batches": 2, "max_epochs": 3})
@feature("limit_*_batches", GROUP, trainer={"limit_train_batches": 3, "limit_val_batches": 1, "max_epochs": 2})
@feature("limit_train_batches as a fraction", GROUP, trainer={"limit_train_batches": 0.5, "max_epochs": 2})
@feature("val_check_interval inside the epoch", GROUP, trainer={"val_check_interval": 2, "max_epochs": 2})
@feature("val_check_interval as a fraction", GROUP, trainer={"val_check_interval": 0.5, "max_epochs": 2})
@feature("check_val_every_n_epoch", GROUP, trainer={"check_val_every_n_epoch": 2, "max_epochs": 4})
@feature(
    "val_check_interval over epochs",
    GROUP,
    trainer={"val_check_interval": 5, "check_val_every_n_epoch": None, "max_steps": 12, "max_epochs": None},
)
def limits(config: dict[str, Any], root: Path) -> Script:
    return Script(Notes(), train_val_data(), config["trainer"])


@feature("reload_dataloaders_every_n_epochs", GROUP)
def reloads(config: dict[str, Any], root: Path) -> Script:
    return Script(Reloads(), {}, {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3})


@feature("max_steps inside an epoch", GROUP, trainer={"max_steps": 5, "max_epochs": None})
@feature("min_epochs, max_steps over epochs", GROUP, trainer={"min_epochs": 2, "max_steps": 7, "max_epochs": None})
def steps(config: dict[str, Any], root: Path) -> Script:
    return Script(Notes(), train_data(), config["trainer"])
