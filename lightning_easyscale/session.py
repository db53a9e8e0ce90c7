"""The ESTs of one executor, kept from the first `fit` to the end of the strategy's life.

The launcher hands over a trainer function and its arguments. The lead EST runs it on the user's own objects; every
other EST runs a structural clone of it in its own thread. Clones live as long as the session, so that a second `fit`,
`validate` or `test` continues per-rank state as DDP's processes would.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.profilers import AdvancedProfiler, PassThroughProfiler, PyTorchProfiler
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from . import _lightning as pl
from ._lightning_loops import report_boundaries
from ._lightning_steps import shorten_steps
from .data.pool import Member, WorkerPools
from .elastic.events import report
from .elastic.replication import Replication
from .elastic.snapshots import SnapshotWriter
from .optimization import Turns
from .placement import Placement
from .reduction.build import collect_gradients
from .reduction.collector import ESTDataParallel
from .reduction.gradients import GradientReduce
from .reduction.host import Offload
from .reduction.inputs import InputTurns
from .reduction.layout import BucketLayout
from .reduction.orders import ring_fold
from .rng import Generators
from .runtime.channel import Channel
from .runtime.collectives import on_host
from .runtime.context import ESTContext
from .runtime.errors import ESTAborted
from .runtime.executor import Executor
from .runtime.heap import share_heap
from .runtime.kinship import Kinship
from .runtime.overlap import BackwardOverlap, Overlap, bytes_in_use, reached
from .runtime.peers import Peers
from .runtime.process_group import VirtualProcessGroup
from .runtime.world import WorldState, install, set_world
from .runtime.writes import ParameterWrites, SharedStorages
from .stopping import TrainingStopped

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from .strategy import EasyScaleStrategy

# A process can have one of each at work; it profiles the lead.
_PROFILERS = (AdvancedProfiler, PyTorchProfiler)
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


class Session:
    """The ESTs that this process hosts.

    Args:
        strategy: the lead's strategy.
        placement: where every EST of the job runs.
        peers: the executors of the job.
        reduction: ``"ddp"``, ``"tree"`` or ``"native"``.
        device: the executor's device.
        timeout: seconds an EST waits for the others.
    """

    _newest: ClassVar[Session | None] = None

    def __init__(
        self,
        strategy: EasyScaleStrategy,
        placement: Placement,
        peers: Peers,
        *,
        reduction: str,
        device: torch.device,
        timeout: float,
    ) -> None:
        install()
        self.placement = placement
        self.peers = peers
        self.ests = placement.ranges[peers.index]
        self.reduction = reduction
        if len(self.ests) > 1:
            share_heap()
        self._kinships = self._inherit(strategy)
        self.worlds = {rank: WorldState() for rank in self.ests}
        self.contexts = contexts = {rank: self._context(rank, strategy, device) for rank in self.ests}
        self.executor = Executor(contexts, peers, timeout=timeout)
        # Only gradients are reduced in the tree order; a reference run reduces everything else over gloo's ring.
        channel = Channel("easyscale", range(placement.num_ests), self.executor, placement, peers, ring_fold)
        self.channel = channel
        self.groups: dict[int, VirtualProcessGroup] = {}
        for rank, world in self.worlds.items():
            group = self.groups[rank] = VirtualProcessGroup(rank, channel, world)
            world.add(group, channel.name, channel.ranks, strategy.virtual_backend)
            world.default_pg = group
        self.lead_optimizers: list[Optimizer] = []
        self.shared = SharedStorages()
        self.writes = {rank: self._guard(rank) for rank in self.ests} if len(self.ests) > 1 else {}
        self.turns = Turns()
        self.lead_gradients: list[Tensor | None] = []
        self.pools = WorkerPools()
        self._local_sequence = dict.fromkeys(self.ests, 0)
        self._gradient_steps = dict.fromkeys(self.ests, 0)
        self.gradients: GradientReduce | None = None
        self.inputs = InputTurns()
        self.running = False
        self.calls = 0
        self.leaving: set[int] = set()
        self.snapshots = SnapshotWriter()
        self.copies: Replication | None = None  # of an elastic run's checkpoints, while a fit runs
        self.strategies: dict[int, EasyScaleStrategy] = {self.lead: strategy}

    @property
    def lead(self) -> int:
        """The lowest-ranked EST here."""
        return self.ests[0]

    def member(self, rank: int) -> Member:
        """An EST as its loader workers have to know it."""
        context = self.contexts[rank]
        return Member(rank, context.environment, context.on_enter, partial(self.executor.let_others_run, rank))

    def wrap(
        self,
        rank: int,
        module: Module,
        options: dict[str, Any],
        *,
        private_gradients: bool,
        offload: Offload,
        overlaps: Overlap,
        saved_layout: BucketLayout | None,
    ) -> ESTDataParallel:
        """Wrap an EST's module so that its gradients are reduced over all ESTs in the job's order.

        Args:
            rank: the EST; the lead comes first and starts a new collection.
            module: its module.
            options: DDP's arguments.
            private_gradients: whether user code may see or change an EST's reduced gradients.
            offload: where gradients or their partial sums wait.
            overlaps: whether, and when, other ESTs run during this one's backwards, where that is possible.
            saved_layout: the bucket layout of the checkpoint that is resumed, if any.
        """
        if rank == self.lead:
            self.gradients = collect_gradients(
                self.reduction,
                self.placement,
                self.peers.index,
                self.peers.data,
                options,
                private_gradients=private_gradients,
                offload=offload,
                saved_layout=saved_layout,
                rendezvous=self._meet_for_gradients,
                before=self.peers.settle,
                in_turn=self._wait_for_turn,
            )
        assert self.gradients is not None
        overlap, device = None, next(module.parameters()).device
        if overlaps == "auto" and (device.type != "cuda" or self.strategies[self.lead].policy == "portable"):
            overlaps = False
        if overlaps and self.strategies[self.lead].policy == "portable":
            self._say_of_lead(rank, "`overlap_backward` is left out: D2's portable kernels are started from Python")
        elif overlaps and len(self.ests) > 1:
            overlap = BackwardOverlap(
                self.executor,
                rank,
                alone=self.gradients.free_workspaces,
                before=partial(self.gradients.begin, rank),
                tell=partial(self._say_of_lead, rank),
                allocated=None if overlaps is True else partial(bytes_in_use, device),
                reached=partial(reached, device) if overlaps == "auto" else None,
            )
        return ESTDataParallel(
            module,
            rank=rank,
            n=self.placement.num_ests,
            reduce=self.gradients,
            overlap=overlap,
            sync_buffers=self.groups[rank].broadcast_coalesced,
            **{name: value for name, value in options.items() if name != "gradient_as_bucket_view"},
        )

    def _say_of_lead(self, rank: int, text: str) -> None:
        if rank == self.lead:
            rank_zero_info(f"EasyScale: {text}.")

    def _wait_for_turn(self, rank: int) -> None:
        self._gradient_steps[rank] += 1
        self.executor.in_turn(rank, ("tree", self._gradient_steps[rank]), "gradients")

    def _meet_for_gradients(self, rank: int, work: Callable[[], None]) -> None:
        def complete(deposits: dict[int, Any]) -> dict[int, None]:
            self.channel.agree("gradients", ahead=True)
            with self.peers.waiting():
                work()
            return dict.fromkeys(deposits)

        self.executor.meet(rank, self.groups[rank].next_key(), "gradients", None, complete)

    def gather(self, rank: int, value: Callable[[int], Any], tag: str) -> dict[int, Any]:
        """Every EST's value, by rank; a collective while ESTs run, and the lead's affair between trainer calls.

        Args:
            rank: the calling EST.
            value: makes the value of a rank; called in that EST, or for all local ranks between calls.
            tag: what is gathered.
        """
        if not self.running:
            own: Any = {r: value(r) for r in self.ests}
            parts = self.peers.all_gather_object(own if self.peers.size == 1 else on_host(own))  # not on its device
            return {r: given for part in parts for r, given in part.items()}
        everyone = self.groups[rank].collect(value(rank), tag)
        return dict(enumerate(everyone))

    def run(self, trainer: Trainer, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a trainer function on every EST of this executor; return the lead's result."""
        functions: dict[int, Callable[[], Any]] = {self.lead: _until_stopped(partial(function, *args, **kwargs))}
        pl.follow_agreed_stop(trainer, self.executor)
        report_boundaries(trainer)
        shorten_steps(trainer)
        self.leaving.clear()
        for rank in self.ests[1:]:
            functions[rank] = self._for_rank(rank, trainer, function, args, kwargs)
        if trainer.lightning_module is not None:
            self.shared.set(list(trainer.lightning_module.parameters()))
        functions = {rank: self._guarded(rank, function) for rank, function in functions.items()}
        with _rank_variables_restored():
            self.running = True
            self.calls += 1
            try:
                result = self.executor.run(functions)[self.lead]
            finally:
                self.running = False
                self._close_communication()
                for kinship in self._kinships.values():
                    kinship.settle()
                # Between calls one EST cannot meet the others: a plain Trainer or a metric would wait for them in vain.
                set_world(None)
                pl.set_rank(self.lead)
        if isinstance(result, TrainingStopped):
            # Only now, when every EST has ended: to Lightning it is an exception of the lead's.
            raise result
        return result

    def request_stop(self) -> None:
        """This executor was asked to stop; its ESTs tell the others at their next rendezvous."""
        if not self.executor.stop_requested:
            # First: other ESTs run while the event is written.
            self.executor.stop_requested = True
            report("notice", executor=self.peers.index)

    def watching_writes(self, rank: int, on: bool) -> AbstractContextManager[None]:
        """Guard the shared parameters against what this EST's code does inside the block, or do not."""
        return self.writes[rank].watching(on) if self.writes else nullcontext()

    def _guarded(self, rank: int, function: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with self.watching_writes(rank, True):
                return function()

        return run

    def _guard(self, rank: int) -> ParameterWrites:
        return ParameterWrites(self.shared, is_lead=rank == self.lead, meet=partial(self.meet_locally, rank))

    def once(self, rank: int, tag: str, value: Callable[[], Any]) -> Any:
        """A value that the first local EST to ask makes; all local ESTs ask in the same order."""
        self._local_sequence[rank] += 1
        return self.executor.publish(rank, ("local", self._local_sequence[rank]), tag, value)

    def _close_communication(self) -> None:
        """End communication threads; the next step would begin new ones."""
        if self.gradients is not None:
            self.gradients.close()

    def meet_locally(self, rank: int, tag: str) -> None:
        """Wait for the other ESTs of this executor; nothing crosses executors."""
        self._local_sequence[rank] += 1
        key = ("local", self._local_sequence[rank])
        self.executor.meet(rank, key, tag, None, lambda deposits: dict.fromkeys(deposits))

    def _for_rank(
        self,
        rank: int,
        trainer: Trainer,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Callable[[], Any]:
        clone, cloned_function, cloned_args, cloned_kwargs = self._kinships[rank].clone(
            [trainer, function, args, kwargs]
        )
        clone.strategy.become(rank)
        if clone.lightning_module is not None:
            pl.forget_metric_names(clone.lightning_module)
        if isinstance(clone.profiler, _PROFILERS):
            clone.profiler = PassThroughProfiler()
        self.strategies[rank] = clone.strategy
        pl.follow_agreed_stop(clone, self.executor)

        def run() -> Any:
            try:
                return cloned_function(*cloned_args, **cloned_kwargs)
            except ESTAborted:
                with suppress(Exception, ESTAborted):
                    clone._teardown()
                raise
            except TrainingStopped as error:
                # The others stop too. What hooks do about it is this EST's own affair, as it is the lead's.
                self.leaving.add(rank)
                set_world(None)
                pl.on_interrupt(clone, error)
                return None
            except BaseException as error:
                # Before anything of its teardown can wait for the other ESTs.
                self.executor.fail(rank, error)
                with suppress(ESTAborted):
                    pl.on_interrupt(clone, error)
                raise

        return run

    def _inherit(self, strategy: EasyScaleStrategy) -> dict[int, Kinship]:
        """The clones of the session before, where a second Trainer goes on with the same module; else none."""
        older, Session._newest = Session._newest, self
        if older is not None and older.ests == self.ests and older.placement == self.placement:
            module = strategy.lightning_module
            if all(kinship.knows(module) for kinship in older._kinships.values()):
                return older._kinships
        return {rank: Kinship(self._is_shared) for rank in self.ests[1:]}

    def _is_shared(self, obj: object) -> bool:
        # Only rank 0 writes, and a wrapper may hold a thread that does.
        writers = (Logger, CheckpointIO, *_PROFILERS)
        return isinstance(obj, (*writers, Session, Executor, pl.SubprocessScriptLauncher, pl.MultiProcessingLauncher))

    def _context(self, rank: int, strategy: EasyScaleStrategy, device: torch.device) -> ESTContext:
        environment = strategy.virtual_environment.for_rank(rank)
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(environment.local_rank()),
            "WORLD_SIZE": str(self.placement.num_ests),
        }

        def on_enter(rank: int) -> None:
            set_world(self.worlds[rank])
            pl.set_rank(rank)

        devices = [device] if device.type == "cuda" else []
        return ESTContext(rank, Generators(devices), variables, on_enter=on_enter, alone=len(self.ests) == 1)


def _until_stopped(function: Callable[[], Any]) -> Callable[[], Any]:
    """`function`, with the agreed end of training as its result."""

    def run() -> Any:
        try:
            return function()
        except TrainingStopped as error:
            return error

    return run


@contextmanager
def _rank_variables_restored() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _RANK_VARIABLES}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
