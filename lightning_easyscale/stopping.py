"""How an EST stops on a signal, and how an elastic run goes on.

Every EST reaches the same boundaries (`_lightning_loops.py`) and sees the same agreed value there, so all of them stop
at the same one. They save one checkpoint, wait until it is committed, and each raises `TrainingStopped`, which ends the
process with `STOPPED` after the usual ``on_exception`` hooks and teardown.

A validation may be longer than the time that is left. In an elastic run its ESTs keep what a checkpoint of the moment
before it would hold, meet from time to time, and stop between two of its batches: the next process does the whole
validation again, from the same state. A validation that took less than `SHORT_VALIDATION` seconds the last time is
waited for instead.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from . import _lightning_loggers as logs
from . import _lightning_loops as loops
from .elastic.cadence import BUDGET, Cadence, Every, check_interval
from .elastic.control import FOLDER_VARIABLE
from .elastic.events import report
from .elastic.folder import CheckpointFolder
from .elastic.host_copy import HostCopy, HostMemory
from .elastic.notice import STOPPED
from .elastic.pace import Pace
from .elastic.replication import ReplicaError, Replication
from .elastic.snapshots import warn_of_copies
from .elastic.workers import ShieldedInit

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from .session import Session
    from .strategy import EasyScaleStrategy

SHORT_VALIDATION = 5.0
"""Seconds of a validation that a stop waits for."""


class TrainingStopped(SIGTERMException):
    """A stop signal has ended training in good order; the process ends with exit code `STOPPED` (75)."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


def stop_signals(environment: ClusterEnvironment) -> list[int]:
    """Signals that stop a `fit`: SIGTERM, SIGUSR1, and what Slurm sends before it requeues a job.

    Args:
        environment: what has started the processes.
    """
    requeue = requeue_signal(environment)
    return sorted({int(signal.SIGTERM), int(signal.SIGUSR1), *([requeue] if requeue is not None else [])})


def requeue_signal(environment: ClusterEnvironment) -> int | None:
    """What Slurm sends to a job that is to be put back into the queue; None where nobody does that."""
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return int(environment.requeue_signal or signal.SIGUSR1)
    return None


def shield_workers(loader: Any, rank: int) -> None:
    """Let the worker processes of `loader` outlive a stop signal (`elastic.workers`)."""
    if not isinstance(loader, DataLoader) or loader.num_workers == 0 or isinstance(loader.worker_init_fn, ShieldedInit):
        return
    inner = loader.worker_init_fn
    if inner is None and int(os.environ.get("PL_SEED_WORKERS", 0)):
        inner = partial(pl_worker_init_function, rank=rank)  # as Lightning does where there is none
    loader.worker_init_fn = ShieldedInit(inner)


class Boundaries:
    """What one EST does where all of its state is known.

    Args:
        strategy: the EST's strategy.
        elastic_dir: folder of an elastic run; None: a stop saves under the Trainer's ``default_root_dir``, and nothing
            is resumed by itself.
        snapshot_every_n_steps: how often a snapshot is committed in an elastic run; ``"auto"``: as `Cadence` says.
        snapshot_budget: share of training time that snapshots may cost then.
        snapshot_replicas: how many other hosts get each checkpoint where hosts have folders of their own.

    Raises:
        ValueError: for an interval below 1, or one without a folder; for no budget; for less than no copies.

    Attributes:
        resumed_before: the boundary of the checkpoint that training has started from, while it has not got further.
    """

    _finished: ClassVar[dict[str, int]] = {}  # folder -> fits that this process has finished in it

    def __init__(
        self,
        strategy: EasyScaleStrategy,
        elastic_dir: str | os.PathLike[str] | None,
        snapshot_every_n_steps: Every = None,
        snapshot_budget: float = BUDGET,
        snapshot_replicas: int = 1,
    ) -> None:
        given = elastic_dir if elastic_dir is not None else os.environ.get(FOLDER_VARIABLE)
        self.elastic_dir = Path(given).absolute() if given else None
        has_folder = self.elastic_dir is not None
        check_interval(snapshot_every_n_steps, snapshot_budget, folder=has_folder, variable=FOLDER_VARIABLE)
        if snapshot_replicas < 0:
            raise ValueError(
                f"`snapshot_replicas={snapshot_replicas}` is not a number of copies. HINT: give 0 or more."
            )
        self._snapshot_every, self._snapshot_budget = snapshot_every_n_steps, snapshot_budget
        self._cadence: Cadence | None = None  # on the rank that writes
        self._snapshots_seen = 0
        self._replicas = snapshot_replicas
        self._looked_at = 0
        self.resumed_before: str | None = None
        self._strategy = strategy
        self._begun = False
        self._start: tuple[int, int] = (0, 0)
        self._sanity_steps: int | float | None = None
        self._forget_pace()
        self._leaves_validation = False  # a stop does, in the validation that goes on
        self._before_validation: HostCopy | None = None  # its checkpoint, on the rank that writes
        self._memory = HostMemory()  # for that copy
        self._validation_began = 0.0

    def _forget_pace(self) -> None:
        """Executors that were there before and those that are new must meet equally often."""
        self._training, self._validation = Pace(4), Pace(1)
        self._validation_seconds: float | None = None

    @property
    def _trainer(self) -> Trainer:
        module = self._strategy.lightning_module
        assert module is not None
        return module.trainer

    @property
    def _session(self) -> Session:
        session = self._strategy.session
        assert session is not None
        return session

    # -- the run -------------------------------------------------------------------------------------------------
    def prepare(
        self, trainer: Trainer, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Called on the lead before a `fit`: let it start from the newest good checkpoint of the elastic folder.

        Returns:
            The arguments of the trainer's function.

        Raises:
            OSError: if the folder cannot be written.
        """
        self._restore_sanity_steps()
        self._begun, self.resumed_before, self._start = False, None, (0, 0)
        self._leaves_validation, self._before_validation = False, None
        self._forget_pace()
        if self.elastic_dir is None:
            return args, kwargs
        peers = self._session.peers
        copies = self._session.copies = Replication(self._folder(), peers, replicas=self._replicas)
        found = copies.open(_log_versions, rank_zero_warn)
        if found is None:
            return args, kwargs
        path, versions = str(found[0]), found[1]
        # Its place in the run is past, and Lightning repeats it where an epoch has just ended.
        self._sanity_steps, trainer.num_sanity_val_steps = trainer.num_sanity_val_steps, 0
        logs.continue_logs(trainer, versions, writes=peers.index == 0)
        args, kwargs, given = loops.with_checkpoint(function, args, kwargs, path)
        instead = f" (and not from `ckpt_path={str(given)!r}`)" if given else ""
        rank_zero_info(f"EasyScale: going on from `{path}`{instead}")
        return args, kwargs

    def finish(self) -> None:
        """Called on the lead when a `fit` has ended by itself: nobody has to go on from its checkpoints."""
        self._restore_sanity_steps()
        copies = self._session.copies
        if copies is None:
            return
        # An executor that is lost before it has torn down goes on from them.
        self._session.peers.agree("end of training")
        if self._session.peers.index == 0:
            self._session.snapshots.wait()
        copies.clear()
        key = str(self.elastic_dir)
        self._finished[key] = self._finished.get(key, 0) + 1

    def close(self) -> None:
        """Called on the lead when a `fit` has ended, however it did."""
        self._session.snapshots.close()
        self._before_validation = None
        self._memory.free()
        if self._session.copies is not None:
            self._session.copies.close()
            self._session.copies = None

    def _restore_sanity_steps(self) -> None:
        if self._sanity_steps is not None:
            self._trainer.num_sanity_val_steps, self._sanity_steps = self._sanity_steps, None

    def begin(self, boundary: Mapping[str, Any] | None, before: str | None) -> None:
        """Called when training starts.

        Args:
            boundary: what the checkpoint that it starts from knows of its boundary, if it was taken at one.
            before: which one.
        """
        trainer = self._trainer
        if boundary is not None and before is not None:
            loops.load_unsaved_state(trainer, boundary["unsaved"])
            loops.continue_with(trainer, before)
            self.resumed_before = before
        self._start = loops.position(trainer)
        self._looked_at = self._start[0]
        self._snapshots_seen = self._session.executor.snapshots_agreed
        if self._snapshot_every is not None and self._strategy.is_global_zero:
            self._session.snapshots.start()
            if self._snapshot_every == "auto":
                self._cadence = Cadence(self._snapshot_budget, tell=rank_zero_info)
        self._strategy.barrier("start of training")  # a signal that came in start-up is known to all from here
        self._begun = True

    def starting_up(self) -> None:
        """Called where all ESTs have met: before the first step there is nothing to save."""
        if not self._begun and self._trainer.state.fn == TrainerFn.FITTING and self._session.executor.stop_agreed:
            rank_zero_info("EasyScale: stopped by a signal before the first step; there is nothing new to save.")
            raise TrainingStopped

    # -- in training ---------------------------------------------------------------------------------------------
    def reached(self, following: str) -> None:
        """All of the EST's state is known.

        Args:
            following: ``"validation"``, ``"next_batch"`` or ``"next_epoch"``.
        """
        if not self._begun:
            return
        if self._leaves_validation:
            self._leaves_validation, self._before_validation = False, None
            self._validation_seconds = time.monotonic() - self._validation_began
        if self._cadence is not None:
            writing = self._session.snapshots.busy
            if self._cadence.reached(loops.position(self._trainer)[0], following, writing=writing):
                self._session.executor.snapshot_requested = True
        if following == "next_batch":
            self._meet_if_due(self._training)
        long = following == "validation" and self._may_be_long()
        if self._session.executor.stop_agreed:
            self._stop(lambda: self._checkpoint(following))
        if long:
            checkpoint = self._checkpoint("validation")
            self._before_validation = HostCopy(checkpoint, self._memory) if self._strategy.is_global_zero else None
            self._leaves_validation = True
            self._validation_began = time.monotonic()
            self._validation.start(self._session.executor.world_meetings)
        if following != "validation" and self._snapshot_due():
            self._snapshot(following)
        self.resumed_before = None

    def in_validation(self) -> None:
        """A batch of a validation is complete, and there are more."""
        if not self._begun:
            self.starting_up()
        elif self._leaves_validation:
            self._meet_if_due(self._validation)
            if self._session.executor.stop_agreed:
                kept = self._before_validation
                self._stop(lambda: kept.wait() if kept is not None else {})

    def _snapshot_due(self) -> bool:
        every, (step, _) = self._snapshot_every, loops.position(self._trainer)
        before, self._looked_at = self._looked_at, step
        if every == "auto":
            seen, self._snapshots_seen = self._snapshots_seen, self._session.executor.snapshots_agreed
            return seen < self._snapshots_seen
        return every is not None and step // every > before // every

    def _snapshot(self, following: str) -> None:
        checkpoint = self._checkpoint(following)
        if self._strategy.is_global_zero:
            step, batch = loops.position(self._trainer)
            assert self._session.copies is not None
            began = time.perf_counter()
            self._session.snapshots.submit(self._session.copies, checkpoint, step=step, batch=batch)
            if self._cadence is not None:
                self._cadence.took(time.perf_counter() - began)

    def _meet_if_due(self, pace: Pace) -> None:
        session = self._session
        if pace.due(session.executor.world_meetings):
            seconds = session.groups[self._strategy.global_rank].collect(pace.seconds, "stop?")
            pace.adapt(seconds, session.placement.ranges)
            pace.start(session.executor.world_meetings)

    def _may_be_long(self) -> bool:
        """Whether the ESTs will have to meet inside the validation that follows; a rendezvous."""
        if self.elastic_dir is None:
            return False
        session, rank = self._session, self._strategy.global_rank
        mine = loops.validation_batches(self._trainer), self._validation_seconds
        everyone = session.groups[rank].collect(mine, "validation")
        batches = [b for b, _ in everyone]
        if any(b != batches[0] or b is None or float("inf") in b for b in batches):
            return False  # they could not: an EST may have ended its validation when another one asks
        seconds = [s for _, s in everyone]
        if None in seconds:
            return True
        return max(sum(seconds[r] for r in ests) for ests in session.placement.ranges) >= SHORT_VALIDATION

    # -- saving --------------------------------------------------------------------------------------------------
    def _checkpoint(self, following: str) -> dict[str, Any]:
        """A checkpoint of this boundary, whole on rank 0; a collective."""
        checkpoint = loops.dump_checkpoint(self._trainer)
        boundary = {"unsaved": loops.unsaved_state(self._trainer), "loggers": logs.log_versions(self._trainer)}
        self._strategy.checkpointing.complete(checkpoint, following=following, boundary=boundary)
        return checkpoint

    def _stop(self, checkpoint: Callable[[], dict[str, Any]]) -> None:
        """Save, if there is anything new, and end training; all ESTs call it at the same boundary."""
        began = time.monotonic()
        step, batch = loops.position(self._trainer)
        what = "there is nothing new to save"
        if self._strategy.is_global_zero:
            report("agreed", step=step)
        if self._start != (step, batch):
            content = checkpoint()
            if self._strategy.is_global_zero:
                self._session.snapshots.wait()
                path = self._commit(content, step=step, batch=batch)
                report("saved", step=step, seconds=round(time.monotonic() - began, 3))
                what = f"saved `{path}` in {time.monotonic() - began:.2f} s; {self._how_to_go_on(path)}"
        self._strategy.barrier("stop")
        rank_zero_info(f"EasyScale: stopped by a signal after step {step}; {what}.")
        raise TrainingStopped

    def _commit(self, content: dict[str, Any], *, step: int, batch: int) -> Path:
        copies = self._session.copies
        if copies is None:
            return self._folder().commit(content, step=step, batch=batch)
        try:
            return copies.commit(content, step=step, batch=batch)
        except ReplicaError as error:
            warn_of_copies(error)
            return error.path

    def _how_to_go_on(self, path: Path) -> str:
        if self.elastic_dir is not None:
            return "the same command goes on from there"
        return f"go on with `trainer.fit(..., ckpt_path={str(path)!r})`, or set `elastic_dir` to have that done"

    def _folder(self) -> CheckpointFolder:
        if self.elastic_dir is None:
            return CheckpointFolder(Path(self._trainer.default_root_dir) / "easyscale", keep=2)
        number = self._finished.get(str(self.elastic_dir), 0) + 1
        return CheckpointFolder(self.elastic_dir / "checkpoints", prefix=f"fit{number}-" if number > 1 else "")


def _log_versions(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a checkpoint knows of the loggers, if it was taken at a boundary."""
    versions: list[dict[str, Any]] = (entry["boundary"] or {}).get("loggers", [])
    return versions
