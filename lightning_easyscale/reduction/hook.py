"""A DDP communication hook that adds gradients in the `tree` order, for stock reference runs.

``DDPStrategy(ddp_comm_hook=ordered_allreduce_hook)`` makes an ordinary DDP run of N processes, over any backend and
topology, compute what an EasyScale job of N ESTs computes under the `tree` order. Invariant: the gradient is multiplied
by 1/N, then folded as `tree_fold` does; the bucket layout does not matter. Lightning registers communication hooks on
CUDA only; on a CPU call ``ddp_model.register_comm_hook(None, ordered_allreduce_hook)``.
"""

# No postponed annotations here: DDP compares the annotations of a hook with the classes themselves.
import torch
import torch.distributed as dist

from ..placement import Placement
from .exchange import TreeReduction


def ordered_allreduce_hook(
    state: dist.ProcessGroup | None, bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket over all ranks in the `tree` order.

    Args:
        state: DDP's process group; None for the default one.
        bucket: the bucket that DDP hands over, not yet divided.

    Returns:
        A future of the averaged flat bucket, which communicates while backward goes on.
    """
    reduction = _reduction_of(dist.distributed_c10d._get_default_group() if state is None else state)
    flat = bucket.buffer()
    # Multiplied, not divided: this is what DDP does to a gradient before it adds.
    flat.mul_(1.0 / reduction.n)
    return reduction.start(bucket.index(), [flat]).future()


# The reduction of the group seen last: its thread and buffers serve every bucket of every step.
_cached: TreeReduction | None = None


def _reduction_of(group: dist.ProcessGroup) -> TreeReduction:
    global _cached
    if _cached is None or _cached.group is not group:
        if _cached is not None:
            _cached.close()
        n = group.size()
        _cached = TreeReduction(Placement((1,) * n), group.rank(), group, n)
    return _cached
