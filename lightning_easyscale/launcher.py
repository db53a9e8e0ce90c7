"""Starts the executors and runs every trainer call in their ESTs.

One process per device. In a plain script the user's process is executor 0 and runs the script again for the others, as
stock DDP does; ``start_method="spawn"`` or ``"fork"`` (notebooks) starts them from the trainer call instead; under
torchrun, Slurm or another launcher the processes are there already. Each executor starts with the environment that its
device type needs (`devices.py`).
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from lightning.pytorch.trainer.states import TrainerFn
from torch.multiprocessing.spawn import ProcessExitedException

from . import _lightning as pl
from .elastic.notice import STOPPED, StopNotice
from .elastic.spare import wait_as_spare
from .environment import apply_environment, environment_in_force
from .stopping import TrainingStopped, stop_signals
from .topology import EXECUTOR_VARIABLE

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from .strategy import EasyScaleStrategy


class EasyScaleLauncher(pl.SubprocessScriptLauncher):
    """Runs the script once per executor, or finds the executors started."""

    def __init__(self, strategy: EasyScaleStrategy) -> None:
        environment = strategy.virtual_environment
        super().__init__(environment, strategy.placement.num_executors, 1)
        self.strategy = strategy

    @property
    def is_interactive_compatible(self) -> bool:
        """Whether a notebook can use it, which Lightning asks there: as long as no script has to be run again.

        Raises:
            RuntimeError: if one has to.
        """
        executors = self.strategy.placement.num_executors
        if executors > 1 and self.strategy.topology.starts_processes:
            raise RuntimeError(
                f"`{executors}` devices need as many processes, which run the script again, and a notebook has none."
                " HINT: `EasyScaleStrategy(..., start_method='fork')`, or one device: it can host all ESTs."
            )
        return True

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Run `function` on every EST of this executor; start the other executors first if that is ours to do."""
        if self.strategy.topology.is_spare:
            wait_as_spare()
        assert trainer is not None
        with listen(trainer, self.strategy, self._end_executors) as notice:
            if self.strategy.session is None and self.strategy.topology.starts_processes and not self.procs:
                self._start_executors(notice)
            return self.strategy.execution.run(trainer, function, args, kwargs, notice)

    def _end_executors(self) -> None:
        for process in self.procs:
            process.kill()

    def _start_executors(self, notice: StopNotice | None) -> None:
        environment = self.strategy.virtual_environment
        os.environ["MASTER_ADDR"] = environment.main_address
        os.environ["MASTER_PORT"] = str(environment.main_port)
        for executor in self.strategy.topology.local_executors[1:]:
            lead = self.strategy.placement.ranges[executor][0]
            variables = {
                **self.strategy.type_environments[executor],
                EXECUTOR_VARIABLE: str(executor),
                "NODE_RANK": str(environment.node_rank()),
                "LOCAL_RANK": str(lead - self.strategy.topology.first_rank_of_host),
                "WORLD_SIZE": str(self.strategy.placement.num_ests),
            }
            command, cwd = pl.rerun_command(executor)
            self.procs.append(subprocess.Popen(command, env=apply_environment(variables), cwd=cwd))

        def stopped() -> None:
            # A signal to one of them in start-up: it had nobody to tell.
            if notice is not None and notice.requested is None and not self.strategy.stop_agreed:
                os.kill(os.getpid(), signal.SIGTERM)

        if self.procs:
            pl.observe_processes(self.procs, stopped)


class EasyScaleSpawnLauncher(pl.MultiProcessingLauncher):
    """Starts the executors from the trainer call; executor 0 sends the lead EST's results back.

    The calling process is not an executor. Fork and spawn hand its environment on as it is, so all executors must be
    able to run in that. A stop signal to it is passed on to the executors, which stop as everywhere; executors that
    have stopped end well, and the calling process then raises `TrainingStopped` for all of them.
    """

    def __init__(self, strategy: EasyScaleStrategy, start_method: Any) -> None:
        self._notice: StopNotice | None = None
        super().__init__(strategy, start_method=start_method)

    @property
    def procs(self) -> list[Any]:
        """The executors' processes."""
        return self._procs

    @procs.setter
    def procs(self, started: list[Any]) -> None:
        self._procs = started
        if started and self._notice is not None:
            self._notice.ask(self._pass_on)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_notice": None, "_procs": []}

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Run `function` on every EST of new processes.

        Raises:
            RuntimeError: if an executor needs another environment than this process has.
            TrainingStopped: if a stop signal has ended training.
        """
        strategy: Any = self._strategy
        for executor, environment in strategy.type_environments.items():
            if not environment_in_force(environment):
                settings = " ".join(f"{key}={value}" for key, value in environment.items()) or "no such variables"
                raise RuntimeError(
                    f"executor {executor} must start with `{settings}` for its device type, which"
                    f" `start_method={self._start_method!r}` cannot give it. HINT: run a script with"
                    " `start_method='popen'`, or start this process with these variables and use one device type."
                )
        os.environ.setdefault("MASTER_ADDR", strategy.virtual_environment.main_address)
        assert trainer is not None
        self._procs = []
        with listen(trainer, strategy, self._end_executors) as self._notice:
            try:
                result = super().launch(function, *args, trainer=trainer, **kwargs)
            except ProcessExitedException as error:
                if error.exit_code != STOPPED:
                    raise
                raise TrainingStopped from None  # in start-up
            finally:
                self._notice = None
        if isinstance(result, _Stopped):
            raise TrainingStopped
        return result

    def _pass_on(self) -> None:
        for process in self._procs:
            if process.is_alive():
                process.terminate()

    def _end_executors(self) -> None:
        for process in self._procs:
            process.kill()

    def _wrapping_function(
        self, process_idx: int, trainer: Any, function: Any, args: Any, kwargs: Any, *rest: Any
    ) -> None:
        strategy: Any = self._strategy
        if self._notice is not None:
            self._notice.leave_to_parent()
        os.environ[EXECUTOR_VARIABLE] = str(strategy.topology.local_executors[process_idx])
        strategy.set_world_ranks()

        def on_every_est(*inner: Any, **inner_kwargs: Any) -> Any:
            with listen(trainer, strategy, end_children=lambda: None) as notice:
                try:
                    return strategy.execution.run(trainer, function, inner, inner_kwargs, notice)
                except TrainingStopped as error:
                    pl.on_interrupt(trainer, error)
                    return _Stopped()

        super()._wrapping_function(process_idx, trainer, on_every_est, args, kwargs, *rest)


class _Stopped:
    """The result of an executor that a stop signal has ended."""


def listen(
    trainer: Trainer, strategy: EasyScaleStrategy, end_children: Callable[[], None]
) -> AbstractContextManager[StopNotice | None]:
    """Listen to stop signals while a `fit` runs.

    Args:
        trainer: the trainer.
        strategy: its strategy.
        end_children: ends the processes that this one has started.
    """
    if trainer.state.fn != TrainerFn.FITTING:
        return nullcontext()
    return StopNotice(stop_signals(strategy.virtual_environment.physical), end_children=end_children)
