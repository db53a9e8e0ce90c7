"""Gradients of one executor's ESTs, reduced in the buckets of stock DDP.

Under the `ddp` order a gradient's bits depend on its place in its bucket, so the buckets are stock DDP's: the initial
layout first, later one along the order in which rank 0's gradients became ready, unless unused parameters are searched
for. Gradients stay where autograd put them. When the last EST has come to a bucket's last parameter, the bucket's
reduction starts, beside the rest of that EST's backward; its sums replace the first EST's gradients, in place, as stock
DDP overwrites a rank's.

Gradients may wait in host memory, a bucket in one piece, and come back beside that backward where it has given back the
memory for it. Their sums replace the last EST's, which are still on the device, and become the first one's.

With private gradients the other ESTs get copies. Without, they are left without gradients.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from ..runtime.bulk import drop, gradients, has_none
from .bucket import BucketForm, LocalGradients
from .exchange import Finish, Reduction
from .gradients import GradientReduce, Rendezvous
from .host import Aside, HostRoom, Offload
from .layout import BucketLayout, initial_layout, rebuilt_layout


class BucketGradients(GradientReduce):
    """`GradientReduce` for reductions of whole buckets, the `ddp` order and level D0.

    Args:
        reduction: how buckets are reduced over all ESTs.
        private_gradients: see `GradientReduce`.
        rendezvous: see `GradientReduce`.
        saved_layout: the layout of the checkpoint that is resumed, if any.
        offload: ``"host"`` lets the gradients of all ESTs but the last wait in pinned host memory.
        bucket_cap_mb: DDP's argument, and so the next three.
        find_unused_parameters: see there.
        static_graph: see there.
        gradient_as_bucket_view: see there. What remains of it is how a gradient is scaled that is kept from one step
            to the next: DDP divides it in place.
    """

    def __init__(
        self,
        reduction: Reduction,
        *,
        private_gradients: bool = False,
        rendezvous: Rendezvous | None = None,
        saved_layout: BucketLayout | None = None,
        offload: Offload = None,
        bucket_cap_mb: float | None = None,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = False,
    ) -> None:
        super().__init__(reduction, private_gradients=private_gradients, rendezvous=rendezvous)
        self.layout = saved_layout
        self._reduction = reduction
        self._aside = Aside() if offload is not None else None
        self._room = HostRoom()
        self._bucket_cap_mb = bucket_cap_mb
        self._searches = find_unused_parameters and not static_graph
        self._static_graph = static_graph
        self._as_view = gradient_as_bucket_view
        # The first iteration of a static graph only finds out what is used; DDP notes the order in the second.
        self._steps_to_rebuild = 0 if saved_layout is not None or self._searches else 2 if static_graph else 1
        self._ready_order: list[int] = []
        self._forms: list[BucketForm] = []
        self._bucket_of: dict[int, int] = {}
        self._missing: list[int] = []
        self._started: list[tuple[LocalGradients, Finish]] = []
        self._unsure: dict[int, set[int]] = defaultdict(set)
        self._waiting: dict[int, dict[int, Tensor]] = defaultdict(dict)  # by EST and group
        self._read: set[int] = set()
        self._given: dict[tuple[int, int], list[Tensor]] = {}  # gradients that came as a group
        self._in_place: set[int] = set()  # groups that came as such from every EST, reduced where they are
        self._views: dict[int, dict[int, weakref.ref[Tensor]]] = defaultdict(dict)

    def _prepare(self, parameters: list[Parameter]) -> None:
        initial = initial_layout(parameters, self._bucket_cap_mb, self._searches, self._static_graph)
        if self.layout is not None and self.layout.num_parameters != len(parameters):
            raise ValueError(
                f"The checkpoint's buckets hold {self.layout.num_parameters} parameters, but {len(parameters)} of this"
                " model require gradients. HINT: freeze the parameters that were frozen when the saved job started."
            )
        if self._static_graph and self.layout == initial:
            # Saved after the first iteration. (If it was saved later, the same order comes to the same layout again.)
            self._steps_to_rebuild = 1
        self._use(self.layout or initial, parameters)

    def _use(self, layout: BucketLayout, parameters: list[Parameter]) -> None:
        self._forms = [BucketForm(members, parameters) for members in layout.buckets]
        self._members.clear()
        self._bucket_of = {i: b for b, members in enumerate(layout.buckets) for i in members}
        self._expect()

    def _expect(self) -> None:
        self._missing = [len(self._ests) * len(form.members) for form in self._forms]

    def deposit(self, rank: int, index: int, *, used: bool = True) -> None:
        """See `GradientReduce.deposit`."""
        if rank == 0 and self._steps_to_rebuild == 1:
            self._ready_order.append(index)
        if not used:
            self._unsure[rank].add(index)
        if self._as_view:
            self._scale(rank, index)
        self._missing[self._bucket_of[index]] -= 1
        self._start_whole()

    @property
    def groups(self) -> Sequence[Sequence[int]]:
        """See `GradientReduce.groups`."""
        settled = self._steps_to_rebuild == 0 and not (self._as_view or self._searches or self._static_graph)
        return [form.members for form in self._forms] if settled else []

    def deposit_group(self, rank: int, number: int, grads: list[Tensor]) -> list[Tensor]:
        """See `GradientReduce.deposit_group`."""
        self._missing[number] -= len(grads)
        self._given[rank, number] = grads
        self._start_whole()
        return grads

    def _start_whole(self) -> None:
        while len(self._started) < len(self._forms) and self._missing[len(self._started)] == 0:
            self._start(len(self._started))

    @torch.no_grad()
    def _scale(self, rank: int, index: int) -> None:
        """In DDP the gradient is part of the bucket."""
        grad = self._parameters[rank][index].grad
        if grad is None:
            return
        kept = self._views[rank].get(index)
        if kept is not None and kept() is grad:
            grad.div_(self.n)
        else:
            self._parameters[rank][index].grad = grad.detach() * (1.0 / self.n)

    @torch.no_grad()
    def _start(self, number: int) -> None:
        form = self._forms[number]
        lead = self._ests.start
        holder = self._ests[-1] if number in self._waiting[lead] and not self.private_gradients else lead
        pieces = [self._pieces(number, rank, holder) for rank in self._ests]
        given = [self._given.pop((rank, number), None) for rank in self._ests]
        if not has_none(given):
            self._in_place.add(number)
        scale = None if self._as_view else 1.0 / self.n
        local = LocalGradients(form, pieces, scale, holder=self._ests.index(holder))
        last = pieces[-1]
        if self._aside is None or isinstance(last, Tensor):
            self._started.append((local, self._reduction.start(number, local)))
            return
        # What waits has gone there by then, and nobody has the results yet. The last EST's own gradients are looked at
        # again at the end of its backward; only what came as a group may have been written to by then.
        early = self._reduction.alone and local.apart and (holder == lead or given[-1] is not None)
        early = early and local.room <= self._aside.spare(form.device)
        with self._aside.after(last[0]):
            finish = self._reduction.start(number, local)
            if early:
                finish()
        self._started.append((local, _nothing if early else finish))

    def _pieces(self, number: int, rank: int, holder: int) -> list[Tensor] | Tensor:
        form = self._forms[number]
        if number in self._waiting[rank]:
            return self._waiting[rank][number]
        grads = self._given.get((rank, number))
        if grads is not None:
            pieces = form.all_flattened(grads)
            if rank != holder:
                return pieces
            places = set(map(Tensor.data_ptr, pieces))
            if (
                len(places) == len(pieces)
                and self._read.isdisjoint(places)
                and places.issuperset(map(Tensor.data_ptr, grads))
            ):
                self._read |= places
                return pieces
            del self._given[rank, number]
        return [self._piece(form, rank, slot, holds=rank == holder) for slot in range(len(form.members))]

    def _piece(self, form: BucketForm, rank: int, slot: int, *, holds: bool) -> Tensor:
        index = form.members[slot]
        parameter = self._parameters[rank][index]
        grad = parameter.grad
        if grad is None:
            return torch.zeros(parameter.numel(), dtype=form.dtype, device=form.device)
        flat = form.flattened(slot, grad)
        # Where sums overwrite it: what it accumulated stays, if no EST has used it; and two gradients may lie in one
        # memory, where one's sum would be read as the other's gradient.
        if holds:
            if flat.data_ptr() in self._read or (index in self._unsure[rank] and not self._as_view):
                return flat.clone()
            self._read.add(flat.data_ptr())
        return flat

    def finish(self, rank: int, used: Sequence[bool] | None = None) -> None:
        """See `GradientReduce.finish`."""
        if self._aside is not None and rank != self._ests[-1] and self._aside.serves(self._parameters[rank][0]):
            self._let_wait(rank, self._aside)
        super().finish(rank, used)

    @torch.no_grad()
    def _let_wait(self, rank: int, aside: Aside) -> None:
        """Move an EST's gradients to the host."""
        # Of two in one memory the later one's sum overwrites the other's, as in stock DDP: they stay where they are.
        places = [0 if p.grad is None else p.grad.data_ptr() for p in self._parameters[rank]]
        twice = {place for place, times in Counter(places).items() if place and times > 1}
        for number in range(len(self._started), len(self._forms)):
            form = self._forms[number]
            if any(places[index] in twice for index in form.members):
                continue
            given = self._given.pop((rank, number), None)
            if given is not None:
                pieces = form.all_flattened(given)
            else:
                pieces = [self._piece(form, rank, slot, holds=False) for slot in range(len(form.members))]
            with aside.after(*pieces):
                self._waiting[rank][number] = self._room.take_in(pieces[0] if len(pieces) == 1 else torch.cat(pieces))
            for index in form.members:
                if index not in self._unsure[rank]:
                    self._parameters[rank][index].grad = None

    def _complete(self) -> None:
        if self._aside is not None:
            self._aside.join()
        started, self._started = self._started, []
        lead, *others = self._ests
        for number, (local, finish) in enumerate(started):
            finish()
            if number in self._in_place:
                self._pass_on(number)
                continue
            reduced = [
                (slot, index)
                for slot, index in enumerate(local.form.members)
                if index not in self._unused or (self._as_view and self._parameters[lead][index].grad is not None)
            ]
            for slot, index in reduced:
                _assign(self._parameters[lead][index], local.form.shaped(slot, local.results[slot]))
            for rank in others:
                for _, index in reduced:
                    grad = self._parameters[lead][index].grad
                    assert grad is not None
                    if self.private_gradients:
                        _assign(self._parameters[rank][index], grad, copy=True)
                    else:
                        self._parameters[rank][index].grad = None
        self._in_place.clear()
        self._unsure.clear()
        for flat in (flat for flats in self._waiting.values() for flat in flats.values()):
            self._room.give_back(flat)
        self._waiting.clear()
        self._read.clear()
        if self._as_view:
            for rank in self._ests:
                grads = {i: p.grad for i, p in enumerate(self._parameters[rank]) if p.grad is not None}
                self._views[rank] = {i: weakref.ref(grad) for i, grad in grads.items()}
        self._rebuild()

    def _pass_on(self, number: int) -> None:
        """The first EST's gradients of a group hold the result already."""
        lead, *others = self._ests
        reduced: list[Any] = gradients(self._group(lead, number))
        # Written to below autograd, which would not notice where a graph has saved one.
        increment_version(reduced)
        for rank in others:
            if self.private_gradients:
                own: list[Any] = gradients(self._group(rank, number))
                torch._foreach_copy_(own, reduced)
            else:
                drop(self._group(rank, number))

    def _rebuild(self) -> None:
        """Once: the layout that DDP goes over to."""
        if self._steps_to_rebuild == 2:
            self.layout = BucketLayout(tuple(form.members for form in self._forms))
        if self._steps_to_rebuild == 1:
            parameters = self._parameters[self._ests.start]
            order = self._share(self._ready_order or [0] * len(parameters))
            self.layout = rebuilt_layout(order, parameters, self._bucket_cap_mb)
            self._use(self.layout, parameters)
            self._ready_order = []
        else:
            self._expect()
        self._steps_to_rebuild = max(self._steps_to_rebuild - 1, 0)


def _nothing() -> None:
    """All is done."""


def _assign(parameter: Parameter, reduced: Tensor, *, copy: bool = False) -> None:
    """Overwrite a parameter's gradient, in place where it has one, as stock DDP does."""
    if parameter.grad is None:
        parameter.grad = reduced.clone() if copy else reduced
    elif parameter.grad.data_ptr() != reduced.data_ptr():
        parameter.grad.copy_(reduced)
