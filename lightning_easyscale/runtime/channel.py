"""How the deposits of one group's members travel between executors.

The last local EST to reach a collective of the group exchanges all local deposits with the other executors that host
members; every executor then computes from all N deposits in rank order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..placement import Placement
from .collectives import Fold, on_host
from .executor import Executor
from .header import SNAPSHOT, STOP
from .packing import pack, unpack
from .parcels import Parcels
from .peers import Peers

Compute = Callable[[list[Any]], list[Any]]


class Channel:
    """One group as seen by one executor: its members and how their deposits travel.

    Args:
        name: unique name, the same on every executor.
        ranks: EST ranks of the group, in group order.
        executor: the local executor.
        placement: where every EST of the world runs.
        peers: the executors that host members.
        fold: how floating-point tensors are reduced.
    """

    def __init__(
        self, name: str, ranks: Sequence[int], executor: Executor, placement: Placement, peers: Peers, fold: Fold
    ) -> None:
        self.name = name
        self.ranks = tuple(ranks)
        self.executor = executor
        self.placement = placement
        self.peers = peers
        self.fold = fold
        self.local = tuple(r for r in self.ranks if r in executor.ranks)
        self.covers_world = len(self.ranks) == placement.num_ests
        self.parcels = Parcels(len(self.local))

    def complete(self, tag: str, deposits: dict[int, Any], compute: Compute) -> dict[int, Any]:
        """Exchange deposits between executors and compute the local members' results."""
        payload = None if self.peers.size == 1 else pack(on_host(deposits))
        asked, parts = self.peers.exchange(tag, asked=self._asked, payload=payload)
        self._heed(asked)
        every: dict[int, Any] = {}
        for part in parts if payload is not None else ():
            every.update(unpack(part))
        every.update(deposits)
        with torch.no_grad():
            results = compute([every[r] for r in self.ranks])
        return {r: results[self.ranks.index(r)] for r in self.local}

    def agree(self, tag: str, *, ahead: bool = False) -> None:
        """Meet the other executors; what they were asked for travels with it.

        Args:
            tag: what for.
            ahead: see `Peers.exchange`.
        """
        self._heed(self.peers.agree(tag, asked=self._asked, ahead=ahead))

    def share(self, tag: str, tensors: list[Tensor], source: int) -> None:
        """Meet the other executors and overwrite `tensors` by those of executor `source`.

        Carries no request: the ESTs that ask first are ahead of the others, who would stop a step earlier.
        """
        self.peers.share(tag, tensors, source)

    @property
    def _asked(self) -> int:
        executor = self.executor
        return (STOP if executor.stop_requested else 0) | (SNAPSHOT if executor.snapshot_requested else 0)

    def _heed(self, asked: int) -> None:
        """All members have arrived: those that follow see the same, wherever they run."""
        if self.covers_world:
            self.executor.world_meetings += 1
            self.executor.stop_agreed |= bool(asked & STOP)
            if asked & SNAPSHOT:
                self.executor.snapshots_agreed += 1
                self.executor.snapshot_requested = False

    def duplicate(self, name: str) -> Channel:
        """Another channel over the same ESTs, with a sequence of its own."""
        return Channel(name, self.ranks, self.executor, self.placement, self.peers, self.fold)

    def split(self, name: str, ranks: tuple[int, ...]) -> Channel:
        """The channel of a subgroup; every executor calls this, members or not."""
        hosts = sorted({self.placement.executor_of(r) for r in ranks})
        peers = self.peers.subset(hosts)
        return Channel(name, ranks, self.executor, self.placement, peers, self.fold)
