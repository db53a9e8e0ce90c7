"""`Trainer(strategy="easyscale")`: N logical workers on whatever devices there are.

Each EST has its own clone of the strategy, which is the stock `DDPStrategy` over the virtual process group, with four
differences: the parameters of all ESTs share storage, gradients are reduced in an order that does not depend on
placement, only the lead EST's optimizers step, and checkpoints hold every EST's state.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import cached_property
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.distributed.constants import default_pg_timeout

from . import _lightning as pl
from . import determinism as det
from . import kernels
from .accelerator import device_types_of, devices_for_workers
from .checkpoint import JobIdentity
from .checkpoint_strategy import CheckpointStrategy
from .checkpointing import Checkpointing
from .compatibility import check_arguments, check_trainer, refuse_in_pytorch_lightning
from .devices import DeviceType, d2_policy, has_cpu, pinned_environment
from .elastic.cadence import BUDGET
from .elastic.events import EVENTS_VARIABLE, report, report_step
from .environment import ensure_environment
from .execution import Execution
from .launcher import EasyScaleLauncher, EasyScaleSpawnLauncher
from .placement import Placement
from .stopping import Boundaries
from .topology import Topology, find_topology, started_by_agent
from .virtual_environment import VirtualEnvironment


class EasyScaleStrategy(CheckpointStrategy):
    """Data-parallel training of `num_ests` logical workers, bit for bit like stock DDP with as many devices.

    Args:
        num_ests: N, the number of logical workers; default: the environment variable ``EASYSCALE_NUM_ESTS``, else the
            number of devices. Must be given under torchrun.
        determinism: ``"D0"``, ``"D1"``, ``"D0+D2"`` or ``"D1+D2"`` (``"D2"`` means the last).
        reduction: order of gradient sums: ``"ddp"`` (gloo's), ``"tree"``, or ``"auto"``: ``"ddp"`` for two ESTs and for
            jobs that use CPUs (as a device here or, under D2, in the pool), else ``"tree"``.
        pool: device types the job may ever use (D2); default: the types of the first placement.
        threads_per_est: CPU threads of each EST; default ``max(1, cpu_count // num_ests)``; slow, if CPUs are fewer.
        ests_per_executor: how many ESTs each device hosts, in device order; default: the planner decides.
        step_seconds: seconds of one EST's step by device type, for the planner; default: all are equally fast.
        max_ests: ESTs that fit into a device's memory by type, for the planner (`lightning_easyscale.doctor` tells).
        gradient_offload: ``"host"`` keeps what waits in pinned host memory: partial sums under the ``tree`` order,
            else gradients; and inputs, as the next does.
        input_offload: ``"host"`` keeps inputs of an MiB and more there, unless the user's hooks move them to a device.
        overlap_backward: run backwards beside the next EST's forward: True holds activations of two ESTs, ``"tail"`` of
            one, with less beside; ``"auto"``: ``"tail"`` on a GPU that waits for Python. See `runtime.overlap`.
        process_group_backend: backend between executors; default: gloo where the job uses CPUs, else NCCL.
        timeout: how long an EST waits for the others.
        start_method: ``"popen"`` (run the script again), ``"spawn"``, ``"fork"`` or ``"forkserver"``.
        find_unused_parameters: as in `torch.nn.parallel.DistributedDataParallel`, and so the next four.
        bucket_cap_mb, gradient_as_bucket_view, static_graph, broadcast_buffers: see there.
        allow: fields of the fingerprint (``"torch"``, ``"cuda"``, ...) in which a checkpoint may differ on resume.
        allow_operations: under D2's `portable` policy, operations (``aten::cumsum``) that keep torch's kernels.
        elastic_dir: folder of an elastic run; default: the variable ``EASYSCALE_ELASTIC_DIR``. A stop signal saves into
            its ``checkpoints/``; `fit` starts from the newest good checkpoint there, whatever `ckpt_path` says.
        snapshot_every_n_steps: optimizer steps between snapshots there; ``"auto"``: as few as `snapshot_budget` allows.
        snapshot_replicas: where hosts have folders of their own, how many other hosts get each checkpoint.

    Raises:
        ValueError: for an argument that cannot be honoured, with the value and the cure.
    """

    strategy_name = "easyscale"
    topology: Topology
    applies_device_types = True

    def __init__(
        self,
        *,
        num_ests: int | None = None,
        determinism: str = "D1",
        reduction: Literal["auto", "ddp", "tree"] = "auto",
        pool: Sequence[str] | None = None,
        threads_per_est: int | None = None,
        ests_per_executor: Sequence[int] | None = None,
        step_seconds: Mapping[str, float] | None = None,
        max_ests: Mapping[str, int] | None = None,
        gradient_offload: Literal["host"] | None = None,
        input_offload: Literal["host"] | None = None,
        overlap_backward: bool | Literal["auto", "tail"] = "auto",
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        find_unused_parameters: bool = False,
        bucket_cap_mb: int | None = None,
        gradient_as_bucket_view: bool = False,
        static_graph: bool = False,
        broadcast_buffers: bool = True,
        allow: Sequence[str] = (),
        allow_operations: Sequence[str] = (),
        elastic_dir: str | os.PathLike[str] | None = None,
        snapshot_every_n_steps: int | Literal["auto"] | None = None,
        snapshot_budget: float = BUDGET,
        snapshot_replicas: int = 1,
    ) -> None:
        options: dict[str, Any] = {
            "find_unused_parameters": find_unused_parameters,
            "bucket_cap_mb": bucket_cap_mb,
            "gradient_as_bucket_view": gradient_as_bucket_view,
            "static_graph": static_graph,
        }
        if not broadcast_buffers:
            # Passed on only where it says something: newer torch warns of the name.
            options["broadcast_buffers"] = False
        super().__init__(
            gradient_offload=gradient_offload,
            input_offload=input_offload,
            overlap_backward=overlap_backward,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            ddp_options=options,
        )
        check_arguments(num_ests, reduction, threads_per_est, gradient_offload, input_offload, overlap_backward)
        self.level = det.Level.parse(determinism)
        self._num_ests = num_ests
        self._has_stepped = False
        self._reduction = reduction
        self._pool = tuple(pool) if pool is not None else None
        self._threads = threads_per_est
        self._ests_per_executor = tuple(ests_per_executor) if ests_per_executor is not None else None
        self._step_seconds = dict(step_seconds) if step_seconds is not None else None
        self._max_ests = dict(max_ests or {})
        self.execution = Execution(self, process_group_backend, allow_operations)
        self.checkpointing = Checkpointing(self, allow=tuple(allow))
        self.boundaries = Boundaries(self, elastic_dir, snapshot_every_n_steps, snapshot_budget, snapshot_replicas)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} for `lightning.pytorch.Trainer`, num_ests={self._num_ests}, {self.level}>"

    # -- who and where -------------------------------------------------------------------------------------------
    @property
    def virtual_environment(self) -> VirtualEnvironment:
        """The cluster as this strategy's EST sees it."""
        environment = self.cluster_environment
        assert isinstance(environment, VirtualEnvironment)
        return environment

    @property
    def placement(self) -> Placement:
        """Which ESTs each executor hosts."""
        return self.topology.placement

    @property
    def num_ests(self) -> int:
        """N, the size of the virtual world."""
        return self.placement.num_ests

    @property
    def executor_index(self) -> int:
        """Which executor this process is."""
        return self.topology.executor

    @property
    def root_device(self) -> torch.device:
        """The executor's device, shared by its ESTs."""
        devices = self.parallel_devices
        assert devices is not None
        return devices[min(self.topology.position_on_host, len(devices) - 1)]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The sampler sees the virtual world."""
        return {"num_replicas": self.placement.num_ests, "rank": self.global_rank}

    @property
    def num_processes(self) -> int:
        """Executors of this host."""
        return len(self.topology.local_executors)

    @property
    def virtual_backend(self) -> str:
        """The backend that the reference run reports."""
        return "gloo" if self.uses_cpus or self.resolved_reduction != "native" else "nccl"

    @property
    def uses_cpus(self) -> bool:
        """Whether an executor may be a CPU, now or (D2) in another stage: then GPUs communicate as CPUs do."""
        here = any(found.kind == "cpu" for found in self.device_types)
        return has_cpu(self.pool, emulate=self._emulate) if self.policy == "portable" else here

    @property
    def resolved_reduction(self) -> str:
        """``"ddp"``, ``"tree"`` or, at level D0, ``"native"``."""
        if not self.level.placement_independent:
            return "native"
        if self._reduction != "auto":
            return self._reduction
        return "ddp" if self.uses_cpus or self.num_ests == 2 else "tree"

    @property
    def threads_per_est(self) -> int:
        """CPU threads of each EST, a property of the job."""
        return self._threads or det.default_threads(self.num_ests)

    @cached_property
    def device_types(self) -> tuple[DeviceType, ...]:
        """The device type of each executor of this host."""
        assert self.parallel_devices is not None
        return device_types_of(self.parallel_devices)

    @property
    def pool(self) -> tuple[str, ...]:
        """The device types that the job may ever use."""
        return self._pool or tuple(dict.fromkeys(t.name for t in self.device_types))

    @cached_property
    def policy(self) -> str:
        """How D2 is kept, ``"pinned"`` or ``"portable"``."""
        return d2_policy(self.pool, emulate=self._emulate) if self.level.heterogeneous else "pinned"

    @property
    def _emulate(self) -> bool | None:
        """Whether the pool's names may be emulated types: where one is here, else as the variable says."""
        return any(t.emulated for t in self.device_types) or None

    @cached_property
    def type_environments(self) -> dict[int, dict[str, str]]:
        """The environment that each executor of this host has to start with."""
        if self.level.heterogeneous:
            # The executors of a portable job keep their own instruction sets.
            outside = sorted({t.name for t in self.device_types} - set(self.pool))
            if outside:
                raise ValueError(
                    f"the device type `{outside[0]}` is not in `pool={list(self.pool)}`, for which level {self.level}"
                    " promises equal bits. HINT: run on types of the pool; a job's pool never grows."
                )
            if self.policy == "pinned":
                pinned = pinned_environment(self.pool, emulate=self._emulate)
                return dict.fromkeys(self.topology.local_executors, pinned)
        types, local = self.device_types, self.topology.local_executors
        return {e: dict(types[min(e - local[0], len(types) - 1)].environment) for e in local}

    def set_world_ranks(self) -> None:
        """Find out which executor this process is and place the ESTs; the lead EST's rank is in force until launch."""
        environment = self.cluster_environment
        if isinstance(environment, VirtualEnvironment):
            if self.session is not None:
                return
            environment = environment.physical
        assert environment is not None
        assert self.parallel_devices is not None
        given = len(self.parallel_devices)
        if started_by_agent(environment):
            self.parallel_devices = devices_for_workers(self.parallel_devices, int(os.environ["LOCAL_WORLD_SIZE"]))
        self.topology = find_topology(
            environment,
            num_devices=len(self.parallel_devices),
            num_nodes=self.num_nodes,
            num_ests=self._num_ests,
            ests_per_executor=self._ests_per_executor,
            types=[t.name for t in self.device_types],
            step_seconds=self._step_seconds,
            max_ests=self._max_ests,
            spares=self.boundaries.elastic_dir is not None,
        )
        self._say_what_is_ignored(given)
        self.cluster_environment = self.topology.virtual_environment()
        pl.set_rank(self.topology.lead)

    def find_place(self) -> None:
        """Find out again who this process is and what it runs on: the executors of the job have changed."""
        for strategy in self.session.strategies.values() if self.session is not None else ():
            strategy.checkpointing.leave_session()
        self.session, self._has_stepped = None, False
        self.optimizers, self.lr_scheduler_configs = [], []
        for name in ("device_types", "type_environments"):
            self.__dict__.pop(name, None)
        self.set_world_ranks()

    @property
    def timeout(self) -> timedelta | None:
        """How long an EST waits for the others."""
        return self._timeout

    def _say_what_is_ignored(self, given: int) -> None:
        """Under an agent, the Trainer's `devices` and `num_nodes` decide nothing."""
        if not self.topology.under_agent or self.topology.executor != 0:
            return
        agent = "the supervisor" if EVENTS_VARIABLE in os.environ else "torchrun"
        started, used = self.topology.physical.world_size(), self.placement.num_executors
        if given * self.num_nodes != started:
            rank_zero_info(
                f"EasyScale: {agent} has started {started} processes; `devices` ({given}) and `num_nodes`"
                f" ({self.num_nodes}) of the Trainer are ignored."
            )
        if used < started:
            rank_zero_info(f"EasyScale: {started - used} of {started} processes wait as spares for {used} ESTs.")

    # -- launch --------------------------------------------------------------------------------------------------
    def _configure_launcher(self) -> None:
        check_trainer(pl.trainer_flags(), self.precision_plugin)
        if self._start_method == "popen" or not self.topology.starts_processes:
            self._launcher = EasyScaleLauncher(self)
            environment = self.type_environments[self.executor_index]
            ensure_environment(environment, why=f"executor {self.executor_index} needs it for its device type")
        else:
            self._launcher = EasyScaleSpawnLauncher(self, self._start_method)

    @property
    def stop_agreed(self) -> bool:
        """Whether all ESTs are about to stop."""
        return self.session is not None and self.session.executor.stop_agreed

    def become(self, rank: int) -> None:
        """Make this clone the strategy of another EST of the same executor."""
        if self.global_rank == rank:
            return
        self.cluster_environment = self.virtual_environment.for_rank(rank)

    def setup_distributed(self) -> None:
        """Nothing to connect: the virtual world is in force."""
        pl.reset_seed()
        torch.set_num_threads(self.threads_per_est)
        self._process_group_backend = self.virtual_backend

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ESTs; between trainer calls, for all executors."""
        if self.session is not None and not self.session.running:
            self.session.peers.agree("barrier")
        else:
            super().barrier(*args, **kwargs)
            if self.session is not None and self.global_rank not in self.session.leaving:
                self.boundaries.starting_up()

    # -- what is told of the job -----------------------------------------------------------------------------------
    @property
    def identity(self) -> JobIdentity:
        """What a checkpoint and the job that resumes it must share."""
        return JobIdentity(
            num_ests=self.num_ests,
            level=str(self.level),
            pool=tuple(sorted(self.pool)) if self.level.heterogeneous else (),
            reduction=self.resolved_reduction,
            threads_per_est=self.threads_per_est,
            kernels=self._kernels,
        )

    @property
    def _kernels(self) -> str:
        if not self.level.heterogeneous:
            return ""
        return f"portable {kernels.FORMAT_VERSION}" if self.policy == "portable" else "pinned"

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Step, and let a supervisor know how far the job is."""
        result = super().optimizer_step(*args, **kwargs)
        if self.global_rank == 0:
            assert self.lightning_module is not None
            step = self.lightning_module.trainer.global_step + 1  # counted after this
            report_step(step)
            if not self._has_stepped:
                self._has_stepped = True
                report("first_step", step=step)
        return result

    def on_exception(self, exception: BaseException) -> None:
        """Tell a supervisor what has failed."""
        if self.session is not None and self.lightning_module is not None:  # a spare has neither
            report(
                "exception",
                executor=self.executor_index,
                rank=self.global_rank,
                type=type(exception).__name__,
                message=str(exception),
                step=pl.steps_done(self.lightning_module),
            )
        super().on_exception(exception)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register ``easyscale``, one name per determinism level, and stock DDP's variants."""
        levels = ("D0", "D1", "D0+D2", "D1+D2")
        names: dict[str, dict[str, Any]] = {
            "easyscale": {},
            **{f"easyscale_{x.lower().replace('+', '_')}": {"determinism": x} for x in levels},
            "easyscale_find_unused_parameters_true": {"find_unused_parameters": True},
            "easyscale_notebook": {"start_method": "fork"},
        }
        refuse_in_pytorch_lightning(tuple(names))
        for name, options in names.items():
            shown = ", ".join(f"{key}={value!r}" for key, value in options.items())
            strategy_registry.register(name, cls, description=f"Elastic data parallelism {shown}".strip(), **options)


if "easyscale" not in StrategyRegistry:
    EasyScaleStrategy.register_strategies(StrategyRegistry)
