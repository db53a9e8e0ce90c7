"""The module wrapper of one EST: DistributedDataParallel's contract without its Reducer.

It mirrors what `DistributedDataParallel` does for a training loop: synchronise buffers before forward, collect the
gradients of the backward that follows a forward outside `no_sync`, and leave every parameter with the average. The
executor's `GradientReduce` is told of a gradient the moment it is final. Invariants, each as in stock DDP (torch 2.13):
hooks count only between a synchronising forward and the end of its reduction; a parameter counts once; without a search
for unused ones the reduction ends when all are there, be it over several backwards, and the next forward refuses to
start before; with it, the reduction ends with the backward, locally unused parameters count as zero (or as what they
accumulated), globally unused ones keep `.grad` as it is.

At first every parameter has a hook. When all gradients have come in one backward, and none has to be told apart from
the others, a hook on the last one of each group is left (`arrival`); a backward that brings less puts all back.

What stock DDP does at construction (comparing shapes, broadcasting rank 0's states), moving inputs and `join` are not
done here: ESTs share parameters, and Lightning moves batches.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.function import Function
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..runtime.overlap import BackwardOverlap
from .arrival import Arrivals
from .gradients import GradientReduce
from .hooks import GradientHooks
from .inputs import WaitingInputs
from .layout import DEFAULT_CAP_MB
from .module_buffers import ModuleBuffers

SyncBuffers = Callable[[list[list[Tensor]]], None]


class ESTDataParallel(nn.Module):
    """Wraps the module of one EST, like `DistributedDataParallel` wraps that of one rank.

    Args:
        module: the EST's module; at least one parameter requires a gradient.
        rank: the EST's rank.
        n: number of ESTs of the job.
        reduce: the executor's gradient reduction.
        find_unused_parameters: DDP's argument.
        static_graph: DDP's argument; the parameters used in the first iteration are used in all.
        bucket_cap_mb: DDP's argument; `torch.compile` splits graphs by it.
        broadcast_buffers: whether `sync_buffers` is called before forward, in training and evaluation.
        overlap: lets other ESTs run during this one's backwards.
        sync_buffers: gives the listed buffers, those of one type together, the values of EST 0, in place. A graph that
            saved a buffer before stays valid, as under DDP: version counters do not change.

    Raises:
        ValueError: if `n` differs from the reduction's, or an embedding produces sparse gradients.
        RuntimeError: if no parameter requires a gradient.
    """

    inputs: WaitingInputs | None = None
    """Knows the EST's batches, which leave the device while it waits for the others' gradients; None: they stay."""

    def __init__(
        self,
        module: nn.Module,
        *,
        rank: int,
        n: int,
        reduce: GradientReduce,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        bucket_cap_mb: float | None = None,
        broadcast_buffers: bool = True,
        overlap: BackwardOverlap | None = None,
        sync_buffers: SyncBuffers | None = None,
    ) -> None:
        super().__init__()
        if n != reduce.n:
            raise ValueError(f"`n={n}` differs from the {reduce.n} ESTs of `reduce`. HINT: pass `n=reduce.n`.")
        self.module = module
        self.rank = rank
        self.n = n
        self.find_unused_parameters = find_unused_parameters
        self.static_graph = static_graph
        self.broadcast_buffers = broadcast_buffers
        self.bucket_bytes_cap = int((bucket_cap_mb or DEFAULT_CAP_MB) * (1 << 20))
        self.require_backward_grad_sync = True
        self.require_forward_param_sync = True
        self._sync_buffers_from_est_0 = sync_buffers
        self._ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
        self._buffers_now = ModuleBuffers(module, self._ignored)
        self._reduce = reduce
        self._overlap = overlap
        self._names, self._parameters_in_order = self._collect_parameters()
        reduce.register(rank, self._parameters_in_order)
        total = len(self._parameters_in_order)
        self._expecting = False
        self._armed = False
        self._ready: dict[int, None] = {}
        self._used = [False] * total
        self._passes: list[int] | None = None
        self._passes_left = [0] * total
        self._passed: dict[int, None] = {}
        self._hooks = GradientHooks(self._parameters_in_order, self._gradient_ready)
        self._hooks.listen(range(total))
        self._arrivals = Arrivals(self._parameters_in_order)
        self._group_at: dict[int, int] = {}
        self._taken: set[int] = set()
        self._may_group = not (self.static_graph or find_unused_parameters)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the module; outside `no_sync` and with gradients enabled, the next backward is reduced."""
        return self.run(self.module, *inputs, **kwargs)

    def run(self, function: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Any:
        """`forward` with a method of the module in its place."""
        if torch.is_grad_enabled():
            self._refuse_unfinished()
        if self.require_forward_param_sync and self.broadcast_buffers:
            self._sync_buffers()
        if self._overlap is not None:
            self._overlap.await_room()
        # `torch.compile` asks which wrapper is at work, and splits graphs as for DDP.
        with DistributedDataParallel._inside_ddp_forward(self):  # type: ignore[arg-type]
            output = function(*inputs, **kwargs)
        # Read after the module ran: Lightning switches synchronisation off inside forward for manual optimization.
        if torch.is_grad_enabled() and self.require_backward_grad_sync:
            self.require_forward_param_sync = True
            self._expecting = True
            if self._first_static_iteration:
                output = self._through_sink(output)
        else:
            self.require_forward_param_sync = False
        return output

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients locally in the forwards and backwards inside."""
        before = self.require_backward_grad_sync
        self.require_backward_grad_sync = False
        try:
            yield
        finally:
            self.require_backward_grad_sync = before

    def begin_backward(self, loss: Tensor) -> None:
        """The backward of `loss` is about to run; whoever tells of it also tells when it is over (`end_backward`)."""
        if not self._arrivals.begin() and self._expecting:
            # In such a job they accumulate, and one that is there may not be final.
            self._ungroup()
        if self._overlap is not None and self._expecting and not self._first_static_iteration:
            self._overlap.begin(loss)

    def end_overlap(self) -> None:
        """The backward has ended, perhaps by an error; this EST runs alone."""
        if self._overlap is not None:
            self._overlap.end()

    def end_backward(self) -> None:
        """The backward that `begin_backward` told of is over."""
        self.end_overlap()
        if self._expecting and self._arrivals.groups and self._arrivals.came():
            # Hooks have heard of nothing.
            self._backward_ended()
        self._arrivals.end()

    def prepare_for_backward(self) -> None:
        """Reduce the next backward although no forward of this wrapper precedes it (manual optimization)."""
        if torch.is_grad_enabled() and self.require_backward_grad_sync:
            self.require_forward_param_sync = True
            self._refuse_unfinished()
            self._expecting = True

    def register_comm_hook(self, state: object, hook: Callable[..., Any]) -> None:
        """Refused: what a hook does to a bucket would depend on placement.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"The communication hook {getattr(hook, '__qualname__', hook)!r} cannot run: gradients of ESTs are reduced"
            " in the job's own order. HINT: do without it, or train with stock DDP."
        )

    def remove_hooks(self) -> None:
        """Stop collecting; also done when the wrapper is dropped."""
        self._hooks.close()

    @property
    def _first_static_iteration(self) -> bool:
        return self.static_graph and self._passes is None

    def _collect_parameters(self) -> tuple[list[str], list[nn.Parameter]]:
        found: dict[nn.Parameter, str] = {}
        for prefix, module in self.module.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.requires_grad or f"{prefix}.{name}" in self._ignored or parameter in found:
                    continue
                path = f"{prefix}.{name}" if prefix else name
                if getattr(module, "sparse", False) and isinstance(module, nn.Embedding | nn.EmbeddingBag):
                    raise ValueError(
                        f"`{path}` produces sparse gradients, which have no placement-independent order of addition."
                        " HINT: build the embedding with `sparse=False`."
                    )
                found[parameter] = path
        if not found:
            raise RuntimeError(
                "`module` has no parameter that requires a gradient, so there is nothing to reduce."
                " HINT: unfreeze a parameter or train without a data-parallel strategy."
            )
        return list(found.values()), list(found)

    def _sync_buffers(self) -> None:
        if (sync := self._sync_buffers_from_est_0) is not None and (groups := self._buffers_now()):
            sync(groups)

    def _refuse_unfinished(self) -> None:
        if not self._ready:
            return
        missing = [name for i, name in enumerate(self._names) if i not in self._ready]
        raise RuntimeError(
            f"Expected to have finished reduction in the prior iteration before starting a new one: on EST {self.rank}"
            f" no gradient reached {missing}. HINT: let every parameter and every output of `forward` take part in the"
            " loss, or set `find_unused_parameters=True`."
        )

    def _gradient_ready(self, index: int) -> None:
        if self._arrivals.groups:
            if self._expecting:
                self._arm()
                if self._arrivals.begun:
                    self._take_group(self._group_at[index])
            return
        parameter = self._parameters_in_order[index]
        grad = parameter.grad
        if grad is None:
            self._may_group = False
        else:
            if grad.layout != torch.strided:
                raise ValueError(
                    f"`{self._names[index]}` received a sparse gradient ({grad.layout}), which has no"
                    " placement-independent order of addition. HINT: build the embedding with `sparse=False`."
                )
            if grad.dtype != parameter.dtype:
                raise ValueError(
                    f"The gradient of `{self._names[index]}` is {grad.dtype}, the parameter {parameter.dtype}: DDP"
                    " cannot reduce it. HINT: leave `grad_dtype` alone, or train without a data-parallel strategy."
                )
            # Kept through `no_sync`, as DDP does: used once in an accumulation is used.
            self._used[index] = True
        if not self._expecting:
            return
        if self._first_static_iteration:
            self._passes_left[index] -= 1
            # In the order of last passes: that of later iterations, which a resumed job must not wait for.
            self._passed.pop(index, None)
            self._passed[index] = None
            self._arm()
            return
        if self._passes is not None:
            self._passes_left[index] -= 1
            if self._passes_left[index] < 0 and self._passes[index] == 0:
                raise RuntimeError(
                    f"`static_graph=True`, but `{self._names[index]}` was unused in the first iteration and is used"
                    f" now on EST {self.rank}. HINT: set `static_graph=False, find_unused_parameters=True`."
                )
            if self._passes_left[index] > 0:
                return
        if index in self._ready:
            raise self._came_twice(index)
        self._deposit(index, used=True)
        if self._searches or len(self._ready) == self._awaited:
            self._arm()

    def _came_twice(self, index: int) -> RuntimeError:
        return RuntimeError(
            f"Expected to mark a variable ready only once: the gradient of `{self._names[index]}` came twice in"
            f" one iteration of EST {self.rank}. HINT: use parameters inside `forward` only, run one backward per"
            " forward, and checkpoint activations with `use_reentrant=False`, or set `static_graph=True`."
        )

    def _take_group(self, number: int) -> None:
        if number in self._taken:
            raise self._came_twice(next(i for i, group in self._group_at.items() if group == number))
        grads = self._arrivals.final(number)
        if grads is not None:
            self._taken.add(number)
            self._arrivals.took(number, self._reduce.deposit_group(self.rank, number, grads))

    def _take_rest(self) -> None:
        """At the end of a backward: what hooks came too early for."""
        groups = self._arrivals.groups
        for number in range(len(groups)):
            if number not in self._taken:
                self._take_group(number)
        if (index := self._arrivals.disturbed()) is not None:
            raise self._came_twice(index)
        self._arrivals.forget()
        taken, self._taken = self._taken, set()
        if len(taken) < len(groups):
            # The others may come with another backward.
            self._ungroup()
            self._ready = {index: None for number in taken for index in groups[number]}
            for index in self._arrivals.came():
                if index not in self._ready:
                    self._deposit(index, used=True)

    def _ungroup(self) -> None:
        """Listen to each gradient again, for good."""
        self._arrivals.group(())
        self._may_group = False
        self._hooks.listen(range(len(self._names)))

    def _group(self, order: Sequence[int]) -> None:
        """From now on, listen to the last gradient of each group, given the order in which they came."""
        groups = self._reduce.groups
        if groups:
            place = {index: i for i, index in enumerate(order)}
            self._group_at = {max(members, key=place.__getitem__): number for number, members in enumerate(groups)}
            self._arrivals.group(groups)
            self._hooks.listen(self._group_at)
            if self._overlap is not None:
                self._overlap.know_order(order, lambda came: GradientHooks(self._parameters_in_order, came))

    @property
    def _searches(self) -> bool:
        return self.find_unused_parameters and not self.static_graph

    @property
    def _awaited(self) -> int:
        return len(self._names) if self._passes is None else sum(count > 0 for count in self._passes)

    def _deposit(self, index: int, *, used: bool) -> None:
        self._ready[index] = None
        self._reduce.deposit(self.rank, index, used=used)

    def _arm(self) -> None:
        if not self._armed:
            self._armed = True
            Variable._execution_engine.queue_callback(self._backward_ended)

    def _backward_ended(self) -> None:
        self._armed = False
        if self._overlap is not None:
            self._overlap.come_back()
        if not self._expecting:
            return
        if self._arrivals.groups:
            self._take_rest()
            if self._ready:
                return
        reports = self._searches or self._first_static_iteration
        if self._searches or self.static_graph:
            for index in (*self._passed, *(i for i in range(len(self._names)) if i not in self._passed)):
                if index not in self._ready:
                    self._deposit(index, used=self._used[index] and reports)
        self._passed = {}
        if self._first_static_iteration:
            self._passes = [-left for left in self._passes_left]
        if self._passes is not None:
            self._passes_left = list(self._passes)
        used, self._used = self._used, [False] * len(self._names)
        self._expecting = False
        order, self._ready = list(self._ready), {}
        groups = self._may_group and not self._arrivals.groups and self._arrivals.begun
        if self._overlap is None:
            self._reduce.free_workspaces()
        with nullcontext() if self.inputs is None else self.inputs.away():
            self._reduce.finish(self.rank, used if reports else None)
        if groups:
            self._group(order)

    def _through_sink(self, output: Any) -> Any:
        """Let the end of the outer backward be noticed even where checkpointing runs a backward inside it."""
        leaves, spec = tree_flatten(output)
        wanted = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
        for i, leaf in zip(wanted, _Sink.apply(weakref.ref(self), *(leaves[i] for i in wanted)), strict=True):
            leaves[i] = leaf
        return tree_unflatten(leaves, spec)


class _Sink(Function):
    """Identity whose backward, which runs first, asks for a call at the end of that backward."""

    @staticmethod
    def forward(ctx: Any, wrapper: weakref.ref[ESTDataParallel], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.wrapper = wrapper
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wrapper = ctx.wrapper()
        if wrapper is not None and wrapper._expecting:
            wrapper._arm()
        return (None, *grads)
