"""Runs trainer calls in the ESTs of this executor, in one world of executors after another.

The first call connects the executors. When devices change in place (`elastic/membership.py`), a `fit` that has stopped
and saved goes on in the same process: to the script's hooks it is a stop and a resumption, as after a relaunch, but the
process, its device and what the script has built stay.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.distributed.constants import default_pg_timeout

from . import _lightning as pl
from . import determinism as det
from . import kernels
from .compatibility import check_module
from .devices import refuse_shared_gpus
from .elastic.events import report
from .elastic.membership import World, enter, generation, is_member, next_world
from .elastic.notice import StopNotice
from .elastic.requeue import requeue_job
from .elastic.spare import Spares
from .portability import PortableKernels
from .runtime.peers import connect, disconnect
from .seed import agree_on_seed
from .session import Session
from .stopping import TrainingStopped, requeue_signal
from .warm_up import warm_up

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from .strategy import EasyScaleStrategy


class Execution:
    """Runs trainer calls.

    Args:
        strategy: the lead's strategy.
        backend: between executors; None: gloo where the job uses CPUs, else NCCL.
        allow_operations: what D2's `portable` policy lets pass besides the operations it knows.
    """

    def __init__(self, strategy: EasyScaleStrategy, backend: str | None, allow_operations: Sequence[str]) -> None:
        self._strategy = strategy
        self._backend = backend
        self._allow_operations = tuple(allow_operations)
        self._spares: Spares | None = None

    def run(
        self,
        trainer: Trainer,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        notice: StopNotice | None = None,
    ) -> Any:
        """Run a trainer function on every EST of this executor.

        Args:
            trainer: the trainer.
            function: what to run.
            args: its arguments.
            kwargs: its keyword arguments.
            notice: of stop signals, in a `fit`.
        """
        strategy = self._strategy
        threads, device_type = strategy.threads_per_est, strategy.root_device.type
        det.apply(strategy.level, threads=threads, device_type=device_type, policy=strategy.policy)
        # Before the session is made, because it remembers torch's switches.
        with self._arithmetic(trainer):
            session = strategy.session or self._form(trainer)
            if trainer.state.fn != TrainerFn.FITTING:
                return session.run(trainer, function, args, kwargs)
            while True:
                if notice is not None:
                    notice.ask(session.request_stop)
                try:
                    return self._fit(session, trainer, function, args, kwargs)
                except TrainingStopped as error:
                    world, stop = next_world(), error
                    if world is None:
                        self._requeue(session, notice)
                        raise
                session = self._move_on(trainer, stop, world, notice)

    def _fit(
        self,
        session: Session,
        trainer: Trainer,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        strategy = self._strategy
        try:
            args, kwargs = strategy.boundaries.prepare(trainer, function, args, kwargs)
            result = session.run(trainer, function, args, kwargs)
            strategy.boundaries.finish()
        finally:
            strategy.boundaries.close()
        if strategy.executor_index == 0:
            report("trained")
            if self._spares is not None:
                self._spares.release()
        return result

    def _form(self, trainer: Trainer) -> Session:
        """Connect the executors of this world."""
        strategy = self._strategy
        backend = self._backend or ("gloo" if strategy.uses_cpus else "nccl")
        os.environ.setdefault("MASTER_ADDR", strategy.virtual_environment.main_address)
        os.environ.setdefault("MASTER_PORT", str(strategy.virtual_environment.main_port))
        timeout = strategy.timeout or default_pg_timeout
        check_module(trainer.lightning_module)
        placement = strategy.placement
        if is_member():
            warm_up(strategy.root_device, backend)
        report("ready", executor=strategy.executor_index)
        peers = connect(strategy.executor_index, placement.num_executors, backend=backend, timeout=timeout)
        if backend == "nccl" and strategy.root_device.type == "cuda":
            own = torch.cuda.get_device_properties(strategy.root_device)
            refuse_shared_gpus(peers.all_gather_object(str(own.uuid)))
        agree_on_seed(peers)
        session = strategy.session = Session(
            strategy,
            placement,
            peers,
            reduction=strategy.resolved_reduction,
            device=strategy.root_device,
            timeout=timeout.total_seconds(),
        )
        split = " + ".join(str(c) for c in placement.ests_per_executor)
        rank_zero_info(f"EasyScale: {placement.num_ests} ESTs as {split} on {placement.num_executors} executors")
        if strategy.executor_index == 0:
            if strategy.topology.spares:
                self._spares = Spares(strategy.topology.spares)
            counts = list(placement.ests_per_executor)
            report("formed", num_ests=placement.num_ests, placement=counts, generation=generation())
        return session

    def _requeue(self, session: Session, notice: StopNotice | None) -> None:
        """Let Slurm start the job again, if that is what the signal to an executor was about."""
        signal = requeue_signal(self._strategy.virtual_environment.physical)
        if signal is None:
            return
        asked = session.peers.all_gather_object(notice is not None and notice.requested == signal)
        if any(asked) and session.peers.index == 0:
            requeue_job()

    def _move_on(self, trainer: Trainer, stop: TrainingStopped, world: World, notice: StopNotice | None) -> Session:
        """Leave the world in which training has stopped, and enter the next."""
        pl.on_interrupt(trainer, stop)
        disconnect()
        enter(world)
        self._strategy.find_place()
        if notice is not None:
            notice.renew()
        pl.begin_fit(trainer)
        return self._form(trainer)

    @contextmanager
    def _arithmetic(self, trainer: Trainer) -> Iterator[None]:
        """Kernels other than torch's for one trainer function; D2's are put in force by a callback of each EST."""
        if self._strategy.policy != "portable":
            with det.deterministic_replacements() if self._strategy.root_device.type == "cuda" else nullcontext():
                yield
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callback = next((c for c in callbacks if isinstance(c, PortableKernels)), None)
        if callback is None:
            callback = PortableKernels(self._allow_operations)
            callbacks.insert(0, callback)
        try:
            with kernels.common_paths():
                yield
        finally:
            callback.leave()
