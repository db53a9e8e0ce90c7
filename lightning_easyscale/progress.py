"""What the progress bar shows of a job: the ESTs on each device, and how fast all of them together train."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.utils._pytree import tree_leaves

from .placement import Placement

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_WINDOW_S = 10.0


class Rates:
    """How fast counters grow, over the last ten seconds or so."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, tuple[float, ...]]] = deque()

    def __call__(self, *counts: float, now: float) -> list[float]:
        """What each counter gains in a second; nothing as long as there is only one look at them.

        Args:
            counts: the counters, as many at every call.
            now: seconds on a clock that never goes back.
        """
        self._seen.append((now, counts))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _WINDOW_S:
            self._seen.popleft()
        then, before = self._seen[0]
        return [(count - old) / (now - then) for count, old in zip(counts, before, strict=True)] if now > then else []


def split_by_type(placement: Placement, types: Sequence[str]) -> str:
    """The ESTs of each device, devices of one type together: ``"v100:2+1 p100:1"``.

    Args:
        placement: where the ESTs run.
        types: the device type of each executor. Where only those of one host are known, types are left out.
    """
    if len(types) < placement.num_executors:
        return "+".join(str(len(ests)) for ests in placement.ranges)
    splits: dict[str, list[str]] = {}
    for name, ests in zip(types, placement.ranges, strict=True):
        splits.setdefault(name, []).append(str(len(ests)))
    return " ".join(f"{name}:{'+'.join(split)}" for name, split in splits.items())


def show_job(trainer: Trainer, placement: Placement, types: Sequence[str]) -> None:
    """Let the trainer's progress bar, if it has one, show the job while it trains, besides what it shows anyway.

    It is ``ESTs`` (`split_by_type`), ``steps/s`` (optimizer steps) and, where the loader says how large its batches
    are, ``samples/s`` of all ESTs.
    """
    bar: Any = trainer.progress_bar_callback
    if bar is None or "get_metrics" in vars(bar):
        return
    own, rates, split = bar.get_metrics, Rates(), split_by_type(placement, types)

    def get_metrics(trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        items = dict(own(trainer, pl_module))
        if trainer.training:
            items["ESTs"] = split
            batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
            samples = batches * placement.num_ests * (_batch_size(trainer.train_dataloader) or 0)
            found = rates(trainer.global_step, samples, now=time.monotonic())
            items |= {name: f"{rate:.3g}" for name, rate in zip(("steps/s", "samples/s"), found, strict=False) if rate}
        return items

    bar.get_metrics = get_metrics


def hide_job(trainer: Trainer) -> None:
    """Let the progress bar be as it was before `show_job`."""
    if trainer.progress_bar_callback is not None:
        vars(trainer.progress_bar_callback).pop("get_metrics", None)


def _batch_size(loaders: Any) -> int | None:
    sizes = [getattr(loader, "batch_size", None) for loader in tree_leaves(loaders)]
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], int) else None
