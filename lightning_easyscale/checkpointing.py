"""Checkpoints of an EST's strategy: what goes into the ``easyscale`` entry, and what comes out of it.

A collective of all ESTs while they run; between trainer calls the lead does it for all ESTs of its executor.
"""

from __future__ import annotations

import os
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from . import _lightning as pl
from . import checkpoint as ckpt
from . import determinism as det
from .data.position import LoaderFollower
from .reduction.layout import BucketLayout
from .seed import current_seed, resume_seed

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from .strategy import EasyScaleStrategy


class EasyScaleCheckpointIO(TorchCheckpointIO):
    """Commits atomically and verifies on load; remote paths are left to Lightning."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write `checkpoint` so that `path` never holds half of it."""
        if _is_local(path):
            ckpt.save(checkpoint, path)
        else:
            super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            CheckpointError: if it is damaged.
        """
        if _is_local(path):
            return ckpt.load(path, weights_only=weights_only, map_location=map_location)
        loaded = super().load_checkpoint(path, map_location)
        ckpt.verify(loaded, str(path))
        return loaded


class Checkpointing:
    """Saves and restores for one EST's strategy.

    Args:
        strategy: the strategy.
        allow: fingerprint fields in which a checkpoint may differ.
    """

    def __init__(self, strategy: EasyScaleStrategy, *, allow: tuple[str, ...]) -> None:
        self._strategy = strategy
        self._allow = allow
        self._entry: dict[str, Any] | None = None
        self._history: list[dict[str, Any]] = []
        self._follower: LoaderFollower | None = None
        self._written: dict[str, int] = {}  # path -> the trainer call in which it was saved

    @property
    def follower(self) -> LoaderFollower:
        """Follows this EST's training loaders."""
        if self._follower is None:
            session = self._strategy.session
            assert session is not None
            rank = self._strategy.global_rank
            unwatched = partial(session.watching_writes, rank, False)
            generators = session.contexts[rank].generators
            self._follower = LoaderFollower(generators, session.member(rank), session.pools, unwatched)
        return self._follower

    def leave_session(self) -> None:
        """The executors of the job have changed: loaders belong to the ESTs of the session that comes next."""
        if self._follower is not None:
            self._follower.release()
            self._follower = None

    @property
    def saved_layout(self) -> BucketLayout | None:
        """The bucket layout of the checkpoint that is being resumed."""
        layout = self._entry["buckets"] if self._entry is not None else None
        return BucketLayout.from_state(layout) if layout is not None else None

    @property
    def _trainer(self) -> Trainer:
        module = self._strategy.lightning_module
        assert module is not None
        return module.trainer

    def note_written(self, path: Any) -> None:
        """Remember that this trainer call saves to `path`."""
        assert self._strategy.session is not None
        self._written[str(path)] = self._strategy.session.calls

    def complete(
        self, checkpoint: dict[str, Any], *, following: str | None = None, boundary: dict[str, Any] | None = None
    ) -> None:
        """Add the ``easyscale`` entry, not yet sealed; a collective while ESTs run.

        Args:
            checkpoint: rank 0's Lightning checkpoint; others stay as they are.
            following: what comes next, where the caller knows (`_lightning_loops.py`).
            boundary: what else is known then, as plain data.
        """
        strategy = self._strategy
        session = strategy.session
        assert session is not None
        # Between trainer calls the process's generators are the lead's; the other ESTs left theirs when they ended.
        states = session.gather(
            strategy.global_rank,
            lambda r: session.strategies[r].est_state().state_dict(current=session.running or r == session.lead),
            "save_checkpoint",
        )
        if not strategy.is_global_zero:
            return
        layout = session.gradients.layout if session.gradients is not None else None
        checkpoint[ckpt.KEY] = {
            "format": ckpt.FORMAT,
            "job": strategy.identity.to_state(),
            "fingerprint": self._fingerprint(),
            "placement": list(strategy.placement.ests_per_executor),
            "seed": current_seed(),
            "buckets": layout.to_state() if layout is not None else None,
            "history": list(self._history),
            "pending": following or pl.pending_after_batch(self._trainer),
            "boundary": boundary,
            "ests": states,
        }

    def load(self, path: Any, weights_only: bool | None) -> dict[str, Any]:
        """Read a checkpoint once per executor and, before a `fit`, check that this job may resume it."""
        strategy = self._strategy
        session = strategy.session

        def read() -> dict[str, Any]:
            keywords = {} if weights_only is None else {"weights_only": weights_only}
            return strategy.checkpoint_io.load_checkpoint(path, **keywords)

        if session is not None and session.running:
            checkpoint = session.once(strategy.global_rank, f"load_checkpoint({path})", read)
        else:
            checkpoint = read()
        checkpoint = _copy_containers(checkpoint)
        self._entry = None
        trainer = strategy.lightning_module.trainer if strategy.lightning_module is not None else None
        # What one call saves and loads again (a tuner does) is no resumption: stock DDP's generators and loaders go on.
        rollback = session is not None and session.running and self._written.get(str(path)) == session.calls
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING and not rollback:
            self._accept(checkpoint.get(ckpt.KEY))
            if self._entry is not None:
                pl.resume_at_pending(checkpoint["loops"], self._entry["pending"])
                pl.forget_loader_states(checkpoint["loops"])
                # Lightning cannot know that this package continues inside the epoch.
                warnings.filterwarnings("ignore", message=".*ended before the epoch ended and your dataloader is not")
        return checkpoint

    def resume_shown_metrics(self) -> None:
        """Restore what callbacks can see of logged values; before any hook of theirs is called."""
        if self._entry is not None:
            pl.resume_shown_metrics(self._trainer, self._entry["ests"][self._strategy.global_rank]["shown"])

    def resume(self) -> None:
        """Restore this EST from the checkpoint that was loaded, if any, and begin to look for boundaries."""
        entry, self._entry = self._entry, None
        if entry is None:
            self._strategy.boundaries.begin(None, None)
            return
        self._strategy.est_state().load_state_dict(entry["ests"][self._strategy.global_rank])
        pl.continue_epoch(self._trainer, entry["pending"])
        self._strategy.boundaries.begin(entry["boundary"], entry["pending"])

    def _accept(self, entry: dict[str, Any] | None) -> None:
        if entry is None:
            rank_zero_warn(
                "The checkpoint was not written under EasyScale: generators, per-rank buffers and the position in the"
                " data are not restored, and the run is a new job from here on."
            )
            return
        strategy = self._strategy
        differences = ckpt.check_resumable(entry, strategy.identity, self._fingerprint(), allow=self._allow)
        resume_seed(entry["seed"])
        for difference in differences:
            rank_zero_warn(f"Resuming: {difference}.")
        event = {"placement": list(strategy.placement.ests_per_executor), "warnings": differences}
        self._history = [*entry["history"], event]
        self._entry = entry
        own = entry["ests"][strategy.global_rank]
        pending = entry["pending"] is not None
        self.follower.expect_resume(own["data"], own["shared_workers"], own["generators"], epoch_over=pending)

    def _fingerprint(self) -> dict[str, Any]:
        types = sorted({t.name for t in self._strategy.device_types})
        fingerprint = dict(det.fingerprint(types))
        if self._strategy.level.heterogeneous:
            # Under D2 the pool speaks for the devices.
            del fingerprint["device_types"]
        return fingerprint


def _is_local(path: Any) -> bool:
    return "://" not in os.fspath(path) or os.fspath(path).startswith("file://")


def _copy_containers(value: Any) -> Any:
    """New dicts and lists around the same leaves, so that one EST's changes do not reach another's."""
    if type(value) is dict:
        return {k: _copy_containers(v) for k, v in value.items()}
    return [_copy_containers(v) for v in value] if type(value) is list else value
