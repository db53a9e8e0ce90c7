"""The transfers that reductions need, as method calls on one process group object.

Nothing here goes through `torch.distributed`'s functions: inside an EST those speak of the virtual world. Invariants:
rank e of the group is executor e; on gloo every transfer but `all_reduce` is a tagged send and receive, so a reduction
that runs in a thread of its own never competes with collectives for their place in the group's sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Far from the small tags that people use on the same group.
_TAG = 0x45535400


def backend_name(group: dist.ProcessGroup, device: torch.device) -> str:
    """Lower-case name of the backend that serves `device` in this group, e.g. ``"gloo"``."""
    return str(group._get_backend(device).name()).lower()


class Wire:
    """Transfers among executors; all but `all_reduce` return when the current stream may use what arrived.

    Args:
        group: the physical group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.size = group.size()
        self.rank = group.rank()
        self.group = group
        # torch 2.13 has both names for one collective; older ones only the first.
        self._all_to_all: Callable[..., Any] = getattr(group, "alltoall_base", None) or group.all_to_all_single

    def all_reduce(self, flat: Tensor) -> dist.Work:
        """Start the backend's own all-reduce (sum) in place, in the backend's order."""
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.SUM)
        return self.group.allreduce([flat], options)

    def exchange(self, out: Tensor, out_sizes: Sequence[int], source: Tensor, sizes: Sequence[int]) -> None:
        """Send `sizes[e]` elements of `source` to executor e and receive `out_sizes[e]` into `out`, in executor order.

        Both tensors are contiguous; what an executor keeps for itself is copied.
        """
        if backend_name(self.group, out.device) != "gloo":
            self._all_to_all(out, source, list(out_sizes), list(sizes)).wait()
            return
        arriving = out if out.device.type == "cpu" else torch.empty_like(out, device="cpu")
        leaving = source.cpu()
        incoming, outgoing = arriving.split(list(out_sizes)), leaving.split(list(sizes))
        peers = [e for e in range(self.size) if e != self.rank]
        works = [self.group.recv([incoming[e]], e, _TAG) for e in peers if out_sizes[e]]
        works += [self.group.send([outgoing[e]], e, _TAG) for e in peers if sizes[e]]
        incoming[self.rank].copy_(outgoing[self.rank])
        for work in works:
            work.wait()
        if arriving is not out:
            out.copy_(arriving)

    def shift(self, out: Tensor, source: Tensor) -> None:
        """Pass `source` to the executor before this one and fill `out` from the one after it."""
        sizes, out_sizes = [0] * self.size, [0] * self.size
        sizes[(self.rank - 1) % self.size] = source.numel()
        out_sizes[(self.rank + 1) % self.size] = out.numel()
        self.exchange(out, out_sizes, source, sizes)

    def gather_slices(self, flat: Tensor, slices: Sequence[slice]) -> None:
        """All-gather in place: executor e holds ``flat[slices[e]]``, afterwards everyone holds all of `flat`."""
        for hop in range(self.size - 1):
            held = (self.rank + hop) % self.size
            self.shift(flat[slices[(held + 1) % self.size]], flat[slices[held]])
