"""The virtual process group: what an EST's `torch.distributed` calls reach.

Each EST holds one `VirtualProcessGroup` per group; the ESTs of an executor share the group's `Channel`. A collective is
a meeting of the local members; the last to arrive exchanges deposits with the other executors and computes every
member's result from all N deposits in rank order, so that results do not depend on placement. Floating-point sums are
folded in the job's order (``ddp``: gloo's, ``tree``: the balanced tree).

A broadcast whose root leads its executor needs no meeting: the root deposits a copy and goes on (`Executor.publish`).
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group  # type: ignore[attr-defined]

from . import collectives as computed
from .bulk import below_autograd
from .channel import Channel
from .collectives import all_reduce, detached, on_host
from .executor import Executor
from .messages import Address
from .parcels import Parcel
from .works import Receipt, copy_into, done
from .world import WorldState

if TYPE_CHECKING:
    # torch types every spelling of every collective as an overload of its own.
    _ProcessGroup = Any
else:
    _ProcessGroup = dist.ProcessGroup

_numbers = itertools.count()


class VirtualProcessGroup(_ProcessGroup):
    """A group of ESTs, from the point of view of one of them.

    Args:
        est_rank: the EST's rank in the virtual world.
        channel: the group's channel on this executor.
        world: the EST's world, in which subgroups are registered.
    """

    def __init__(self, est_rank: int, channel: Channel, world: WorldState) -> None:
        super().__init__(channel.ranks.index(est_rank), len(channel.ranks))
        self._est_rank = est_rank
        self._group_rank = channel.ranks.index(est_rank)
        self._channel = channel
        self._world_state = world
        self._sequence = 0
        # Functional collectives and device meshes find a group by its name, which is unique in the process.
        self._name = f"{channel.name}/est{est_rank}/{next(_numbers)}"
        self._set_group_name(self._name)
        _register_process_group(self._name, self)  # type: ignore[arg-type]
        weakref.finalize(self, _unregister_process_group, self._name).atexit = False  # type: ignore[arg-type]

    # -- identity ------------------------------------------------------------------------------------------------
    def getBackendName(self) -> str:  # noqa: N802
        """Name of the backend; the C++ logger of DDP treats known names specially, so it is our own."""
        return "easyscale"

    @property
    def group_name(self) -> str:
        """The group's name; torch's own attribute has none for a group without C++ backends."""
        return self._name

    @property
    def _device_types(self) -> list[torch.device]:
        """The devices of a group; torch 2.14 looks for the CPU among them before a `monitored_barrier`."""
        return [torch.device("cpu"), torch.device("cuda")]

    def _get_backend(self, device: torch.device) -> VirtualProcessGroup:
        """What a group uses for a device; torch 2.14 asks whether it can coalesce, which this cannot."""
        return self

    def size(self) -> int:
        """Number of ESTs in the group."""
        return len(self._channel.ranks)

    def rank(self) -> int:
        """This EST's rank in the group."""
        return self._group_rank

    def shutdown(self) -> None:
        """Nothing to shut down: the physical groups belong to the runtime."""

    def abort(self) -> None:
        """Nothing to abort: the physical groups belong to the runtime."""

    @property
    def est_rank(self) -> int:
        """This EST's rank in the virtual world."""
        return self._est_rank

    @property
    def executor(self) -> Executor:
        """The executor that hosts this EST."""
        return self._channel.executor

    def next_key(self) -> tuple[str, int]:
        """Identity of the next collective of this group, the same for all members."""
        self._sequence += 1
        return self._channel.name, self._sequence

    def subgroup(self, ranks: tuple[int, ...] | None, backend: str) -> Any:
        """Create a subgroup; a collective of the whole group. Returns a non-member marker for outsiders."""
        members = self._channel.ranks if ranks is None else ranks
        unknown = [r for r in members if r not in self._channel.ranks]
        if unknown:
            raise ValueError(f"`ranks={list(members)}` names {unknown}, but the world has {self.size()} ranks.")
        name = f"{self._channel.name}.{self._sequence + 1}"
        channel = self._meet(
            f"new_group{members}", None, lambda _: self._channel.split(name, members), per_executor=True
        )
        if self._est_rank not in members:
            return dist.GroupMember.NON_GROUP_MEMBER
        group = VirtualProcessGroup(self._est_rank, channel, self._world_state)
        self._world_state.add(group, name, members, backend)
        return group

    # -- collectives -----------------------------------------------------------------------------------------------
    def allreduce(self, tensors: Any, opts: Any = None) -> dist.Work:
        """Reduce each tensor over all members, in place."""
        return self._reduce_in_place("all_reduce", _tensors(tensors), _op(opts), coalesced=False)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        """Reduce several tensors as one flat tensor, as gloo does."""
        return self._reduce_in_place("all_reduce_coalesced", tensors, _op(opts), coalesced=True)

    def reduce(self, tensors: Any, *args: Any) -> dist.Work:
        """Reduce to one member, in place; the others keep what they had."""
        targets = _tensors(tensors)
        root, op = _root_and_op(args)
        results = self._meet(
            _tag("reduce", targets, root, op), targets, lambda every: all_reduce(every, op, self._channel.fold)
        )
        if self._group_rank == root:
            copy_into(targets, results)
        return done(targets)

    def broadcast(self, tensors: Any, opts: Any = None) -> dist.Work:
        """Copy the root's tensors to all members, in place."""
        targets = _tensors(tensors)
        root = _root(opts)
        channel = self._channel
        root_rank = channel.ranks[root]
        source = channel.placement.executor_of(root_rank)
        tag = _tag("broadcast", targets, root)
        if channel.covers_world and root_rank == channel.placement.ranges[source][0]:

            def value() -> list[Tensor]:
                with torch.no_grad():
                    copies = [t.detach().clone() for t in targets]
                    channel.share(tag, copies, source)
                return copies

            results = channel.executor.publish(self._est_rank, self.next_key(), tag, value)
        else:
            results = self._meet(tag, targets, lambda every: [every[root]] * len(every))
        if self._group_rank != root:
            copy_into(targets, results)
        return done(targets)

    def broadcast_coalesced(self, groups: Sequence[list[Tensor]]) -> None:
        """Copy the first EST's tensors to all others, in place, without a change of their version counters.

        The world's group only. No EST waits for another of its executor.
        """
        channel = self._channel
        if self.size() == 1:
            return
        tag = f"broadcast_coalesced({', '.join(f'{len(group)} of {group[0].dtype}' for group in groups)})"

        def value() -> Parcel:
            parcel = channel.parcels.take(groups)
            if self._group_rank == 0:
                parcel.pack(groups)
            channel.share(tag, parcel.messages, 0)
            return parcel

        with below_autograd(), torch._C.DisableTorchFunction():
            parcel = channel.executor.publish(self._est_rank, self.next_key(), tag, value)
            if self._group_rank != 0:
                parcel.read(groups)
            channel.parcels.done(parcel)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        """Every member's tensor, in rank order."""
        results = self._meet(_tag("all_gather", None), inputs, computed.gather_all)
        for output, parts in zip(outputs, zip(*results, strict=True), strict=True):
            copy_into(output, list(parts))
        return done(outputs)

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        """As `allgather`; ``outputs[rank][i]`` is member `rank`'s i-th tensor."""
        for output, result in zip(
            outputs, self._meet(_tag("all_gather", inputs), inputs, computed.gather_all), strict=True
        ):
            copy_into(output, result)
        return done(outputs)

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> dist.Work:
        """Every member's tensor, concatenated in rank order."""
        results = self._meet(_tag("all_gather_single", [tensor]), [tensor], computed.gather_all)
        # What comes from other executors lies in host memory.
        parts = [part.reshape(-1).to(output.device) for (part,) in results]
        copy_into([output], [torch.cat(parts).view(output.shape)])
        return done([output])

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        """`all_gather_single` for several tensors."""
        for output, tensor in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, tensor, opts)
        return done(outputs)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        """Every member's tensor, at the root."""
        root = _root(opts)
        results = self._meet(_tag("gather", None, root), inputs, computed.gather_all)
        if self._group_rank == root:
            copy_into(outputs[0], [part for (part,) in results])
        return done(outputs)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> dist.Work:
        """Each member its own of the root's tensors."""
        root = _root(opts)
        result = self._meet(_tag("scatter", outputs, root), inputs, lambda every: computed.scatter(every, root))
        copy_into(outputs, [result])
        return done(outputs)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> dist.Work:
        """Each member its own part of the reduced list."""
        op = _op(opts)
        result = self._meet(
            _tag("reduce_scatter", outputs, op), inputs[0], lambda e: computed.reduce_scatter(e, op, self._channel.fold)
        )
        copy_into(outputs, [result])
        return done(outputs)

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> dist.Work:
        """Each member its own chunk of the reduced tensor."""
        op = _op(opts)
        result = self._meet(
            _tag("reduce_scatter_single", [tensor], op),
            [tensor],
            lambda every: computed.reduce_scatter_single(every, op, self._channel.fold),
        )
        copy_into([output], [result.view(output.shape)])
        return done([output])

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        """`reduce_scatter_single` for several tensors."""
        for output, tensor in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, tensor, opts)
        return done(outputs)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        """Member j gets the j-th tensor of every member."""
        copy_into(outputs, self._meet(_tag("all_to_all", None), inputs, computed.all_to_all))
        return done(outputs)

    def all_to_all_single(
        self, output: Tensor, tensor: Tensor, output_sizes: list[int], input_sizes: list[int], opts: Any = None
    ) -> dist.Work:
        """`alltoall` on one tensor split along its first dimension."""
        share = [tensor.shape[0] // self.size()] * self.size()
        outputs = list(output.split(list(output_sizes) or share))
        return self.alltoall(outputs, list(tensor.split(list(input_sizes) or share)), opts)

    def barrier(self, opts: Any = None, **_: Any) -> dist.Work:
        """Wait for all members."""
        self._meet("barrier", None, lambda every: [None] * len(every))
        return done([])

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Wait for all members; the runtime's own timeout applies."""
        self.barrier()

    def collect(self, value: Any, tag: str) -> list[Any]:
        """Every member's Python object; ESTs of one executor share it, others get a copy."""
        return self._meet(tag, _Opaque(value), lambda every: [[v.value for v in every]] * len(every))

    # Names that torch before 2.13 uses for the same operations.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    # -- point to point ----------------------------------------------------------------------------------------------
    def send(self, tensors: list[Tensor], destination: int, tag: int) -> dist.Work:
        """Send to one member; buffered, so it does not wait for the receiver."""
        receiver = self._channel.ranks[destination]
        copies = [t.detach().clone() for t in tensors]
        letter = copies if receiver in self._channel.local else on_host(copies)
        self.executor.mail.post(Address(self._channel.name, self._est_rank, receiver, tag), letter)
        return done(tensors)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> dist.Work:
        """Receive from one member, in place, by the time the returned work is waited for."""
        return Receipt(self._est_rank, self.executor, tensors, {source: self._from(source, tag)})

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> dist.Work:
        """Receive from any member: the lowest whose message has come."""
        others = {i: self._from(i, tag) for i in range(self.size()) if i != self._group_rank}
        return Receipt(self._est_rank, self.executor, tensors, others)

    def _from(self, source: int, tag: int) -> Address:
        return Address(self._channel.name, self._channel.ranks[source], self._est_rank, tag)

    # -- internals ---------------------------------------------------------------------------------------------------
    def _meet(self, tag: str, deposit: Any, compute: Any, *, per_executor: bool = False) -> Any:
        channel = self._channel

        def complete(deposits: dict[int, Any]) -> dict[int, Any]:
            if per_executor:
                channel.agree(tag)
                return dict.fromkeys(channel.local, compute(None))
            return channel.complete(tag, deposits, compute)

        key, alone = self.next_key(), detached(deposit)
        return channel.executor.meet(self._est_rank, key, tag, alone, complete, members=channel.local)

    def _reduce_in_place(self, name: str, tensors: list[Tensor], op: dist.ReduceOp, *, coalesced: bool) -> dist.Work:
        results = self._meet(
            _tag(name, tensors, op),
            tensors,
            lambda every: all_reduce(every, op, self._channel.fold, coalesced=coalesced),
        )
        copy_into(tensors, results)
        return done(tensors)


@dataclass
class _Opaque:
    """A value that travels as it is."""

    value: Any


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _op(opts: Any) -> dist.ReduceOp:
    if opts is None:
        return dist.ReduceOp(dist.ReduceOp.SUM)
    return opts.reduceOp if hasattr(opts, "reduceOp") else dist.ReduceOp(opts)


def _root(opts: Any) -> int:
    return 0 if opts is None else opts if isinstance(opts, int) else int(opts.rootRank)


def _root_and_op(args: tuple[Any, ...]) -> tuple[int, dist.ReduceOp]:
    if len(args) == 2:
        return int(args[0]), dist.ReduceOp(args[1])
    return (_root(args[0]), _op(args[0])) if args else (0, _op(None))


def _tag(name: str, tensors: Sequence[Tensor] | None, *details: Any) -> str:
    shapes = "" if tensors is None else ",".join(f"{str(t.dtype)[6:]}{list(t.shape)}" for t in tensors)
    extra = "".join(f" {d.op if hasattr(d, 'op') else d}" for d in details)
    return f"{name}({shapes}){extra}"
