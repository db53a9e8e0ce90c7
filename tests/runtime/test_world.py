"""Inside an EST `torch.distributed` speaks of the virtual world, also in threads it starts; afterwards as before."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from lightning_easyscale.runtime.world import physical_world

from .tasks import ests


def identity() -> tuple[bool, int, int, str]:
    return dist.is_initialized(), dist.get_rank(), dist.get_world_size(), dist.get_backend()


def test_an_est_and_the_threads_it_starts_see_its_rank() -> None:
    def est(rank: int) -> Any:
        dist.barrier()
        seen: list[Any] = []
        thread = threading.Thread(target=lambda: seen.append(identity()))
        thread.start()
        thread.join()
        return [identity(), *seen]

    results = ests(None, 0, (3,), est)
    assert results == {r: [(True, r, 3, "gloo")] * 2 for r in range(3)}


def test_a_group_serves_cpu_and_cuda_as_one_over_gloo_does() -> None:
    """Torch 2.14 looks at these before it sends batches of messages, or waits at a monitored barrier."""

    def est(rank: int) -> Any:
        group = c10d._get_default_group()
        backends = [group._get_backend(device) for device in group._device_types]
        coalesces = [getattr(backend, "supports_coalescing", False) for backend in backends]
        return sorted(c10d._device_capability(group)), coalesces, c10d._get_object_coll_device(group)

    assert ests(None, 0, (2,), est) == dict.fromkeys(range(2), (["cpu", "cuda"], [False, False], "cpu"))


def test_the_physical_world_can_be_looked_at_from_inside() -> None:
    def est(rank: int) -> Any:
        with physical_world():
            with physical_world():
                inner = dist.is_initialized()
            outer = dist.is_initialized()
        return inner, outer, dist.get_rank()

    assert ests(None, 0, (2,), est) == {r: (False, False, r) for r in range(2)}


def test_afterwards_everything_is_as_before() -> None:
    world, new_group = c10d._world, c10d._new_group_with_tag
    ests(None, 0, (2,), lambda _: dist.all_reduce(torch.zeros(1)))
    assert c10d._world is world
    assert c10d._new_group_with_tag is new_group
    assert not dist.is_initialized()
