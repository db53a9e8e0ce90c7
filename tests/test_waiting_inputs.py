"""`input_offload="host"`: batches of ESTs that wait leave the device; those that somebody else may read do not."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.core import hooks
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_easyscale import EasyScaleStrategy
from lightning_easyscale.reduction.inputs import WORTH

N, STEPS = 3, 4


class Model(BoringModel):
    """Notes which ESTs' batches are there during a step, and whether a batch is what it was after it."""

    on_device: dict[int, Tensor] = {}
    seen: list[tuple[int, list[int]]] = []
    intact: list[bool] = []

    def train_dataloader(self) -> DataLoader[Any]:
        rows = WORTH // 4 // 32
        return DataLoader(torch.randn(N * STEPS * rows, 32), batch_size=rows)  # type: ignore[arg-type]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.on_device[self.global_rank] = batch
        self.sum = batch.sum()
        there = [rank for rank, held in sorted(self.on_device.items()) if held.untyped_storage().nbytes()]
        self.seen.append((self.global_rank, there))
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.intact.append(torch.equal(batch.sum(), self.sum))


class Preparing(Model):
    """What it does is done before the batch is moved."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


class Moving(Model):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


class Data(pl.LightningDataModule):
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch.clone()

    train_dataloader = Model.train_dataloader

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.randn(2, 32))  # type: ignore[arg-type]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(
        cls: type[Model], option: str | None = "input_offload", datamodule: Any = None, overlap: bool = False
    ) -> list[tuple[int, list[int]]]:
        cls.on_device, cls.seen, cls.intact = {}, [], []
        # As if the device were another.
        monkeypatch.setattr(hooks, "move_data_to_device", lambda batch, _: batch.clone())
        trainer = pl.Trainer(
            strategy=EasyScaleStrategy(
                num_ests=N, reduction="tree", overlap_backward=overlap, **({option: "host"} if option else {})
            ),
            accelerator="cpu",
            devices=1,
            max_steps=STEPS,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(cls(), datamodule=datamodule)
        assert len(cls.intact) == N * STEPS
        assert all(cls.intact)
        return cls.seen

    return run


@pytest.mark.parametrize("option", ["input_offload", "gradient_offload"])
@pytest.mark.parametrize("cls", [Model, Preparing])
def test_one_batch_is_on_the_device_at_a_time(train: Any, cls: Any, option: str) -> None:
    assert train(cls, option) == [(rank, [rank]) for _ in range(STEPS) for rank in range(N)]


def test_beside_a_backward_another_batch_is_there(train: Any) -> None:
    # From the second step on: the first backward is watched, not overlapped.
    assert train(Model, overlap=True)[N:] == [
        (rank, [rank - 1, rank] if rank else [0]) for _ in range(STEPS - 1) for rank in range(N)
    ]


@pytest.mark.parametrize(
    ("cls", "options"),
    [(Model, {"option": None}), (Moving, {}), (Model, {"datamodule": Data()})],
    ids=["without", "a hook of the module", "a hook of the data module"],
)
def test_batches_stay_where_they_are(train: Any, cls: Any, options: Any) -> None:
    assert train(cls, **options)[-N:] == [(rank, list(range(N))) for rank in range(N)]
