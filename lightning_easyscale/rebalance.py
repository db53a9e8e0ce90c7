"""Moves ESTs between devices while a job trains, by what the devices really need for a step.

Speeds drift: a device gets hot, a neighbour takes its cores, a profile was wrong. Every executor measures how long it
computes per EST and leaves out what it waits for the others. Every so many steps all of them compare, and where the
exact planner finds a split that saves more until the end than a restart costs, the job writes a checkpoint and a plan,
and training stops; started again, it goes on under the plan. Placement decides no bits (levels D1 and D1+D2), so the
result is that of a job that never moved.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from .planning import plan, worth_moving

if TYPE_CHECKING:
    from .strategy import EasyScaleStrategy

PLAN_FILE = "plan.json"
CHECKPOINT_FILE = "plan.ckpt"


@dataclass(frozen=True)
class Move:
    """A split of the ESTs that was found to be faster.

    Args:
        step: optimizer steps done when it was found.
        ests_per_executor: the new split, in executor order.
        before: the split until then.
        est_seconds: measured seconds of one EST's step on each executor.
        step_seconds: predicted seconds per global step under the new split, waiting left out.
        step_seconds_before: the same under the old one.
    """

    step: int
    ests_per_executor: tuple[int, ...]
    before: tuple[int, ...]
    est_seconds: tuple[float, ...]
    step_seconds: float
    step_seconds_before: float


def find_move(
    step: int,
    before: Sequence[int],
    est_seconds: Sequence[float],
    *,
    steps_left: float,
    cost_seconds: float,
    max_ests: Sequence[int | None] | None = None,
) -> Move | None:
    """The split to move to, or None where none pays.

    Args:
        step: optimizer steps done.
        before: ESTs per executor now.
        est_seconds: seconds of one EST's step on each executor.
        steps_left: global steps until the end of training; may be infinite.
        cost_seconds: what a restart costs.
        max_ests: ESTs that fit into each executor's memory; None: no limit.
    """
    names = [str(i) for i in range(len(before))]
    speeds = dict(zip(names, est_seconds, strict=True))
    fit = max_ests or [None] * len(names)
    limits = {name: limit for name, limit in zip(names, fit, strict=True) if limit is not None}
    found = plan(sum(before), names, speeds, previous=before, max_ests=limits, use_every_device=True)
    now = max(a * t for a, t in zip(before, est_seconds, strict=True))
    if not worth_moving(now, found.step_seconds, steps_left, cost_seconds):
        return None
    return Move(step, found.ests_per_device, tuple(before), tuple(est_seconds), found.step_seconds, now)


class StepSeconds:
    """How long this executor computes per micro-batch, from the lead's view of the last few.

    A micro-batch lasts from its start on the lead to the start of the next one: every EST's turn lies in between. Time
    spent waiting for other executors is taken off.

    Args:
        window: micro-batches that are kept.
    """

    def __init__(self, window: int) -> None:
        self._busy: deque[float] = deque(maxlen=window)
        self._began: tuple[float, float] | None = None

    def mark(self, waited_s: float) -> None:
        """A micro-batch begins; `waited_s` counts the seconds of waiting so far."""
        now = time.perf_counter()
        if self._began is not None:
            self._busy.append(now - self._began[0] - (waited_s - self._began[1]))
        self._began = now, waited_s

    def pause(self) -> None:
        """What comes until the next mark (validation, a checkpoint) is no part of a step."""
        self._began = None

    def clear(self) -> None:
        """Forget all."""
        self._busy.clear()

    @property
    def seconds(self) -> float | None:
        """The median, which a single hiccup does not move; None without a measurement."""
        return median(self._busy) if self._busy else None


class Rebalance(Checkpoint):
    """Re-plans the split of ESTs from measured speeds while training; for `EasyScaleStrategy` only.

    A script that uses it is started again while it ends with `moved`::

        rebalance = Rebalance("rebalance")
        strategy = EasyScaleStrategy(num_ests=4, ests_per_executor=rebalance.ests_per_executor)
        trainer = Trainer(strategy=strategy, devices=2, callbacks=[rebalance])
        trainer.fit(model, ckpt_path=rebalance.checkpoint)
        sys.exit(75 if rebalance.moved else 0)

    Args:
        dirpath: where plan and checkpoint are kept; removed when training has come to its end.
        every_n_steps: optimizer steps between two comparisons, and the steps that a measurement looks at.
        cost_seconds: what a restart costs: a move has to save more until the end of training.

    Raises:
        ValueError: for an interval below 2 or a negative cost.
    """

    def __init__(self, dirpath: str | os.PathLike[str], *, every_n_steps: int = 50, cost_seconds: float = 30.0) -> None:
        super().__init__()
        if every_n_steps < 2:
            raise ValueError(f"`every_n_steps={every_n_steps}` measures nothing. HINT: give at least 2 steps.")
        if not 0 <= cost_seconds < float("inf"):
            raise ValueError(f"`cost_seconds={cost_seconds}` is no cost. HINT: finite seconds, zero or more.")
        self._directory = Path(dirpath)
        self._every = every_n_steps
        self._cost = cost_seconds
        self._measured = StepSeconds(every_n_steps)
        self._compared = -1
        self._max_steps: int | None = None
        self.moved = False

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint to resume from; None before the first move."""
        file = self._directory / CHECKPOINT_FILE
        return str(file) if (self._directory / PLAN_FILE).exists() else None

    @property
    def ests_per_executor(self) -> tuple[int, ...] | None:
        """The split of the last move; None before the first."""
        file = self._directory / PLAN_FILE
        return tuple(json.loads(file.read_text())["ests_per_executor"]) if file.exists() else None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse strategies whose workers cannot move.

        Raises:
            TypeError: if the strategy is not an `EasyScaleStrategy`.
        """
        if not hasattr(trainer.strategy, "placement"):
            raise TypeError(
                f"`Rebalance` needs `EasyScaleStrategy`, but the Trainer has `{type(trainer.strategy).__name__}`."
                ' HINT: set `strategy="easyscale"`, or remove the callback.'
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start to measure."""
        self.moved = False
        self._compared = trainer.global_step
        self._measured = StepSeconds(self._every * trainer.accumulate_grad_batches)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A micro-batch begins."""
        strategy = cast("EasyScaleStrategy", trainer.strategy)
        if strategy.is_lead and strategy.session is not None:
            self._measured.mark(strategy.session.peers.waited_s)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """No part of a step."""
        self._measured.pause()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare speeds where it is time to, and stop where moving pays."""
        step = trainer.global_step
        strategy = cast("EasyScaleStrategy", trainer.strategy)
        if step < self._compared + self._every or strategy.placement.num_executors == 1:
            return
        self._compared = step
        move = self._find(trainer, strategy, step)
        self._measured.clear()
        self._measured.pause()
        if move is None:
            return
        trainer.save_checkpoint(self._directory / CHECKPOINT_FILE)
        if trainer.is_global_zero:
            file = self._directory / PLAN_FILE
            temporary = file.with_suffix(".tmp")
            temporary.write_text(json.dumps(asdict(move)))
            temporary.replace(file)
        rank_zero_info(
            f"EasyScale: {list(move.before)} -> {list(move.ests_per_executor)} ESTs per device: a step should take"
            f" {move.step_seconds:.3f} s instead of {move.step_seconds_before:.3f} s. Start the script again."
        )
        self.moved = True
        # Ends the loop at this step without a validation, which an undisturbed run would not have here.
        loop = trainer.fit_loop.epoch_loop
        self._max_steps, loop.max_steps = loop.max_steps, step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the job's own end nothing is left to go on from."""
        if self.moved and self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps = self._max_steps
        elif trainer.is_global_zero:
            for name in (PLAN_FILE, CHECKPOINT_FILE):
                (self._directory / name).unlink(missing_ok=True)

    def _find(self, trainer: pl.Trainer, strategy: EasyScaleStrategy, step: int) -> Move | None:
        """The move that all ESTs find alike, from every executor's measurement."""
        session, placement = strategy.session, strategy.placement
        assert session is not None
        own = (self._measured.seconds if strategy.is_lead else None, strategy.topology.max_ests)
        gathered = session.gather(strategy.global_rank, lambda _: own, "rebalance")
        busy, limits = zip(*(gathered[ests[0]] for ests in placement), strict=True)
        if any(seconds is None or seconds <= 0 for seconds in busy):
            return None
        accumulated = trainer.accumulate_grad_batches
        speeds = [s * accumulated / len(ests) for s, ests in zip(busy, placement, strict=True)]
        left = trainer.estimated_stepping_batches - step
        return find_move(
            step,
            placement.ests_per_executor,
            speeds,
            steps_left=left,
            cost_seconds=self._cost,
            max_ests=limits,
        )
