"""What a process loads at its first step and its first save, loaded before anyone waits for it.

An executor that joins a running job waits until the others have stopped at a step; from then on all of them wait for
its first step. A CUDA context, the libraries of convolutions, products and communication, and their first kernels take
longer than that step.
"""

from __future__ import annotations

import gc
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as functional

from .runtime.world import physical_world

_done = False


def warm_up(device: torch.device, backend: str) -> None:
    """Once in a process, before it meets the other executors; changes no generator.

    Also takes what there is by now out of the garbage collector's sight: a change of executors collects what the last
    group has left, and looking through all modules for it took half a second.

    Args:
        device: the executor's.
        backend: between executors.
    """
    global _done
    if _done:
        return
    _done = True
    with suppress(ImportError):
        import omegaconf  # noqa: F401  Lightning asks for its containers when it saves
    if device.type == "cuda":
        _use(device)
        if backend == "nccl":
            _communicate(device)
    gc.collect()
    gc.freeze()


def _use(device: torch.device) -> None:
    """A step of a network that has a bit of everything."""
    image = torch.zeros(2, 8, 8, 8, device=device)
    weights = [torch.zeros(shape, device=device, requires_grad=True) for shape in ((8, 8, 3, 3), (4, 512), (4,))]
    x = functional.conv2d(image, weights[0], padding=1)
    x = functional.batch_norm(x, torch.zeros(8, device=device), torch.ones(8, device=device), training=True)
    x = functional.linear(functional.relu(x).flatten(1), weights[1], weights[2])
    functional.cross_entropy(x, torch.zeros(2, dtype=torch.long, device=device)).backward()
    torch.optim.SGD(weights, lr=0.1, momentum=0.9).step()
    torch.cuda.synchronize(device)


def _communicate(device: torch.device) -> None:
    """A group of one."""
    with physical_world():
        if dist.is_initialized():
            return
        dist.init_process_group(
            "nccl", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(minutes=1), device_id=device
        )
        try:
            dist.all_reduce(torch.zeros(1, device=device))
            torch.cuda.synchronize(device)
        finally:
            dist.destroy_process_group()
