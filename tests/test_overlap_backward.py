"""`overlap_backward` in a Trainer: whether it takes place, and what is said where it cannot."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_easyscale import EasyScaleStrategy
from lightning_easyscale import session as sessions
from lightning_easyscale.kernels import build
from lightning_easyscale.reduction import GradientReduce
from lightning_easyscale.runtime.executor import Executor

ESTS, STEPS = 3, 3


class Net(pl.LightningModule):
    def __init__(self, recomputes: bool = False) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        self.recomputes = recomputes

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        out = checkpoint(self.net, batch, use_reentrant=False) if self.recomputes else self.net(batch)
        return out.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def switches(module: pl.LightningModule, *, overlap: bool | str, **options: Any) -> int:
    """How often the baton changed hands in a fit."""
    level = options.pop("determinism", "D1")
    pool = ["cpu", "h100"] if "D2" in level else None
    strategy = EasyScaleStrategy(
        num_ests=ESTS, threads_per_est=1, overlap_backward=overlap, determinism=level, pool=pool
    )
    trainer = pl.Trainer(
        **{"strategy": strategy, "accelerator": "cpu", "devices": 1, "max_steps": STEPS, "logger": False},
        **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, **options},
    )
    trainer.fit(module, DataLoader(torch.randn(STEPS * 2 * ESTS * 2, 4), batch_size=2))
    assert strategy.session is not None
    return strategy.session.executor.switches


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(sessions, "rank_zero_info", lines.append)
    return lines


@pytest.mark.parametrize("accumulated", [1, 2])
def test_all_backwards_but_the_first_and_the_last_ests_are_overlapped(said: list[str], accumulated: int) -> None:
    options = {"accumulate_grad_batches": accumulated}
    plain, beside = (switches(Net(), overlap=overlap, **options) for overlap in (False, True))
    # Away, back for the rest of the backward, and on: two more than one.
    assert beside - plain == 2 * (ESTS - 1) * (STEPS - 1)
    # One more is watched, to find out when there is room; where gradients accumulate there is at the end.
    watched = 2 if accumulated == 1 else 1
    assert switches(Net(), overlap="tail", **options) - plain == 2 * (ESTS - 1) * (STEPS - watched)
    assert not said


def test_data_come_beside_a_backward_and_the_forward_after_half_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Noting(Net):
        def on_train_batch_start(self, batch: Any, index: int) -> None:
            seen.append("data")

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            seen.append("forward")
            return super().training_step(batch, index)

    def until(what: str) -> None:
        deadline = time.monotonic() + 5
        while seen[-1] != what:
            assert time.monotonic() < deadline, f"no {what} beside a backward"
            time.sleep(0.001)

    begins, room, returns = Executor.step_aside, Executor.leave_room, Executor.come_back

    def step_aside(self: Executor, rank: int, *, leaves_room: bool) -> bool:
        assert not leaves_room
        seen.append("backward")
        return begins(self, rank, leaves_room=leaves_room)

    def leave_room(self: Executor, rank: int) -> None:
        until("data")
        time.sleep(0.05)
        seen.append("half")
        room(self, rank)

    def come_back(self: Executor, rank: int) -> None:
        until("forward")
        seen.append("end")
        returns(self, rank)

    for name, function in (("step_aside", step_aside), ("leave_room", leave_room), ("come_back", come_back)):
        monkeypatch.setattr(Executor, name, function)
    switches(Noting(), overlap="tail")
    *step, last = seen[-(3 + 5 * (ESTS - 1)) :]
    assert step == ["data", "forward", *["backward", "data", "half", "forward", "end"] * (ESTS - 1)]
    assert last == "backward"  # of the last EST, with none left to run beside it


def test_workspaces_are_given_back_while_no_est_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[int] = []
    monkeypatch.setattr(GradientReduce, "free_workspaces", lambda self: given_back.append(1))
    switches(Net(), overlap=False)
    assert len(given_back) == ESTS * STEPS
    switches(Net(), overlap=True)
    assert len(given_back) == 2 * ESTS * STEPS


def test_a_backward_that_calls_into_python_is_left_alone(said: list[str]) -> None:
    plain, beside = (switches(Net(recomputes=True), overlap=overlap) for overlap in (False, True))
    assert beside == plain
    assert len(said) == 1
    assert "`overlap_backward` is left out: backward calls `torch.utils.checkpoint." in said[0]


@pytest.mark.skipif(bool(build.why_unavailable()), reason=build.why_unavailable() or "available")
def test_portable_kernels_are_left_alone(said: list[str]) -> None:
    plain, beside = (switches(Net(), overlap=overlap, determinism="D1+D2") for overlap in (False, True))
    assert beside == plain
    assert said == ["EasyScale: `overlap_backward` is left out: D2's portable kernels are started from Python."]


@pytest.mark.parametrize(
    "level",
    [
        "D1",
        pytest.param("D1+D2", marks=pytest.mark.skipif(bool(build.why_unavailable()), reason="no portable kernels")),
    ],
)
def test_by_default_a_cpu_and_portable_kernels_are_left_alone_without_a_word(said: list[str], level: str) -> None:
    plain, default = (switches(Net(), overlap=overlap, determinism=level) for overlap in (False, "auto"))
    assert default == plain
    assert said == []
    assert EasyScaleStrategy()._overlap_backward == "auto"
