"""Which collection of gradients serves which order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ..placement import Placement
from .bucket_gradients import BucketGradients
from .exchange import NativeReduction, Reduction, RingReduction
from .gradients import GradientReduce, Rendezvous
from .host import Offload
from .layout import BucketLayout
from .tree_gradients import TreeGradients


def collect_gradients(
    order: str,
    placement: Placement,
    executor: int,
    group: dist.ProcessGroup | None,
    ddp_options: dict[str, Any],
    *,
    private_gradients: bool,
    offload: Offload,
    saved_layout: BucketLayout | None,
    rendezvous: Rendezvous,
    before: Callable[[], None],
    in_turn: Callable[[int], None],
) -> GradientReduce:
    """The collection for one wrapped module on one executor.

    Args:
        order: ``"ddp"``, ``"tree"`` or ``"native"``.
        placement: which executor hosts which ESTs.
        executor: this executor.
        group: process group of all executors; None for one executor.
        ddp_options: arguments of `DistributedDataParallel`.
        private_gradients: see `GradientReduce`.
        offload: where gradients or their partial sums wait.
        saved_layout: the bucket layout of the checkpoint that is resumed, if any.
        rendezvous: see `GradientReduce`.
        before: called before each bucket is reduced.
        in_turn: see `TreeGradients`.
    """
    cap = ddp_options["bucket_cap_mb"]
    if order == "tree":
        return TreeGradients(
            placement,
            executor,
            group,
            private_gradients=private_gradients,
            offload=offload,
            bucket_cap_mb=cap,
            rendezvous=rendezvous,
            before=before,
            in_turn=in_turn,
        )
    n = placement.num_ests
    kinds: dict[str, Callable[..., Reduction]] = {"ddp": RingReduction, "native": NativeReduction}
    return BucketGradients(
        kinds[order](placement, executor, group, n, before=before),
        private_gradients=private_gradients,
        offload=offload,
        bucket_cap_mb=cap,
        rendezvous=rendezvous,
        saved_layout=saved_layout,
        find_unused_parameters=ddp_options["find_unused_parameters"],
        static_graph=ddp_options["static_graph"],
        gradient_as_bucket_view=ddp_options["gradient_as_bucket_view"],
    )
