"""Bucket layouts: which parameters share a flat gradient buffer, and in which order.

Under the `ddp` order the bits of a gradient depend on its position in its bucket, so the layout is state of the job.
Stock DDP begins with an initial layout and, unless it searches for unused parameters, replaces it once by one in
gradient-ready order. Both are computed here by the same functions stock DDP calls. Invariant: a layout holds every
parameter index exactly once; buckets are listed in the order in which DDP reduces them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

_MIB = 1 << 20
DEFAULT_CAP_MB = 25.0


@dataclass(frozen=True)
class BucketLayout:
    """Buckets of parameter indices, in order of reduction.

    Args:
        buckets: for each bucket the indices of its parameters, in buffer order. Indices count the parameters that
            require gradients, shared ones once, in module order (DDP's own numbering).

    Raises:
        ValueError: if an index is missing or occurs twice.
    """

    buckets: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        buckets = tuple(tuple(int(i) for i in bucket) for bucket in self.buckets)
        indices = sorted(i for bucket in buckets for i in bucket)
        if indices != list(range(len(indices))) or not all(buckets):
            raise ValueError(
                f"`buckets={self.buckets}` does not hold every parameter index once."
                " HINT: take the layout from `initial_layout`, `rebuilt_layout` or a checkpoint of this job."
            )
        object.__setattr__(self, "buckets", buckets)

    @property
    def num_parameters(self) -> int:
        """Number of parameters in all buckets."""
        return sum(len(bucket) for bucket in self.buckets)

    def to_state(self) -> list[list[int]]:
        """Plain containers for a checkpoint."""
        return [list(bucket) for bucket in self.buckets]

    @classmethod
    def from_state(cls, state: Sequence[Sequence[int]]) -> BucketLayout:
        """The layout that `to_state` described.

        Raises:
            ValueError: if it is not a layout.
        """
        return cls(tuple(tuple(bucket) for bucket in state))


def initial_layout(
    parameters: Sequence[Tensor],
    bucket_cap_mb: float | None = None,
    find_unused_parameters: bool = False,
    static_graph: bool = False,
) -> BucketLayout:
    """The layout of stock DDP's first iteration (and of all, if it searches for unused parameters).

    Args:
        parameters: the parameters that require gradients, in DDP's order.
        bucket_cap_mb: DDP's argument, in MiB; None is DDP's default.
        find_unused_parameters: DDP's argument; with it buckets are bounded from the start.
        static_graph: DDP's argument; it takes precedence over `find_unused_parameters`.

    Returns:
        One bucket per (type, device), or bounded ones; source: `torch/nn/parallel/distributed.py`, `_ddp_init_helper`.
    """
    bounded = find_unused_parameters and not static_graph
    first, cap = _caps(bucket_cap_mb)
    limits = ([first, cap] if first < cap else [cap]) if bounded else [sys.maxsize]
    buckets, _ = dist._compute_bucket_assignment_by_size(list(parameters), limits, [False] * len(parameters))
    # DDP reverses the list: gradients of the last parameters are expected first.
    return BucketLayout(tuple(tuple(bucket) for bucket in reversed(buckets)))


def rebuilt_layout(
    ready_order: Sequence[int], parameters: Sequence[Tensor], bucket_cap_mb: float | None = None
) -> BucketLayout:
    """The layout of stock DDP once it has seen in which order gradients become ready.

    Args:
        ready_order: parameter indices in the order in which rank 0's gradients became ready, each once.
        parameters: the parameters that require gradients, in DDP's order.
        bucket_cap_mb: DDP's argument, in MiB; None is DDP's default.

    Returns:
        Buckets along `ready_order`, the first of at most 1 MiB by default; source: `reducer.cpp`, `rebuild_buckets`.

    Raises:
        ValueError: if `ready_order` is not a permutation of the indices.
    """
    order = [int(i) for i in ready_order]
    if sorted(order) != list(range(len(parameters))):
        raise ValueError(
            f"`ready_order={order}` is not a permutation of the {len(parameters)} parameter indices."
            " HINT: record every parameter once, when its gradient is ready."
        )
    buckets, _ = dist._compute_bucket_assignment_by_size(
        [parameters[i] for i in order], list(_caps(bucket_cap_mb)), [False] * len(order), order
    )
    return BucketLayout(tuple(tuple(bucket) for bucket in buckets))


def _caps(bucket_cap_mb: float | None) -> tuple[int, int]:
    """Bytes that the first and the later buckets may hold; an explicit cap is the first limit too."""
    if bucket_cap_mb is None:
        return int(dist._DEFAULT_FIRST_BUCKET_BYTES), int(DEFAULT_CAP_MB * _MIB)
    return int(bucket_cap_mb * _MIB), int(bucket_cap_mb * _MIB)
