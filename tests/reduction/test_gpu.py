"""CUDA: the folds have the CPU's bits, wherever partial sums wait and whichever backend carries them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Barrier

import pytest
import torch
import torch.distributed as dist

from lightning_easyscale.placement import Placement
from lightning_easyscale.reduction import inputs as waiting_inputs
from lightning_easyscale.reduction import tree
from lightning_easyscale.reduction.exchange import RingReduction, TreeReduction
from lightning_easyscale.reduction.host import Aside, copied_to_host
from lightning_easyscale.reduction.orders import ring_fold, tree_fold
from lightning_easyscale.reduction.tree import TreeFold, combine
from lightning_easyscale.reduction.tree_gradients import TreeGradients
from lightning_easyscale.runtime.collectives import all_reduce

from .pool import Pool
from .tasks import ForcedRing, inputs, reduced_by
from .waiting import reduce_gradients, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", [1, 1000, 300_001])
def test_folds_have_the_bits_of_the_cpu(size: int, dtype: torch.dtype) -> None:
    parts = inputs(5, size, dtype)
    for fold in (ring_fold, tree_fold):
        assert torch.equal(fold([part.cuda() for part in parts]).cpu(), fold(parts))
        assert torch.equal(fold([part.cuda() for part in parts], consume=True).cpu(), fold(parts))


def test_gradients_may_wait_in_host_memory() -> None:
    parts = inputs(5, 300_001, torch.float32)
    waiting = [copied_to_host(part.cuda()) for part in parts[:-1]]
    assert all(part.is_pinned() for part in waiting)
    result = reduced_by(RingReduction(Placement((5,)), 0, None, 5), 0, [*waiting, parts[-1].cuda()], "cuda")()
    assert result.is_cuda
    assert torch.equal(result.cpu(), ring_fold(parts))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_partial_sums_may_wait_in_host_memory_beside_training(
    n: int, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "_AT_ONCE", 100_000)
    aside = Aside()
    fold = TreeFold(range(n), n, aside=aside)
    for step in range(3):
        parts = inputs(n, 300_001 + step, torch.float32)
        for rank, part in enumerate(parts):
            with aside.after(torch.empty(1, device="cuda")):
                torch.cuda._sleep(20_000_000)  # the link is slow, and training goes on
            if ahead:
                fold.fetch(2_500_000)  # two of them
            fold.push(rank, part.cuda())
            # Memory that the copies still read, though nobody holds it, must not be handed out again.
            for _ in range(3):
                torch.full_like(part, torch.nan, device="cuda")
        blocks = fold.partials()
        with aside.after(*(block.total for block in blocks)):
            result = combine(blocks)
        del blocks
        for _ in range(3):
            torch.full((300_001 + step,), torch.nan, device="cuda")
        aside.join()
        assert torch.equal(result.cpu(), tree_fold(parts))


@pytest.mark.parametrize("spare", [0, 1 << 30], ids=["late", "early"])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_whole_gradients_may_wait_in_host_memory(n: int, spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Aside, "spare", staticmethod(lambda device: spare))
    reduce_gradients(nullcontext(), n, steps=5, device="cuda")


@pytest.mark.parametrize("n", [2, 4, 8])
def test_inputs_and_partial_sums_may_wait_in_host_memory(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting_inputs, "WORTH", 1)
    train(nullcontext(), n, steps=10, device="cuda")


def test_one_executor_folds_a_small_model_at_once() -> None:
    parameters = [torch.nn.Parameter(torch.ones(1 << 20, device="cuda")) for _ in range(12)]  # 4 MiB each
    sizes = {}
    for cap in (None, 8.0):
        reduce = TreeGradients(Placement((2,)), 0, None, bucket_cap_mb=cap)
        reduce.register(0, parameters)
        sizes[cap] = [len(group) for group in reduce.groups]
    assert sizes == {None: [12], 8.0: [2] * 6}


def test_threads_do_not_keep_a_workspace_each() -> None:
    x = torch.ones(256, 256, device="cuda")
    reduce = TreeGradients(Placement((2,)), 0, None)
    reduce.register(0, [torch.nn.Parameter(x)])
    with ThreadPoolExecutor(3) as pool:
        barrier = Barrier(3)

        def compute(_: int) -> None:
            torch.cuda.set_device(x.device)
            barrier.wait(60)  # each in a thread of its own
            torch.mm(x, x)

        list(pool.map(compute, range(3)))
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated()
        reduce.free_workspaces()
        assert kept - torch.cuda.memory_allocated() >= 3 * 2**20


def on_one_gpu(group: dist.ProcessGroup, rank: int, placement: tuple[int, ...], offload: bool) -> list[str]:
    """Executors that share a GPU and talk over gloo."""
    where, wrong = Placement(placement), []
    mine = where.ranges[rank]
    for kind, fold in ((RingReduction, ring_fold), (ForcedRing, ring_fold), (TreeReduction, tree_fold)):
        reduction = kind(where, rank, group, where.num_ests)
        pending = []
        for index, size in enumerate((1, 1000, 300_001)):
            local = [part.cuda() for part in inputs(where.num_ests, size, torch.float32)[mine.start : mine.stop]]
            if offload:
                local[:-1] = [copied_to_host(part) for part in local[:-1]]
            pending.append((size, reduced_by(reduction, index, local, "cuda")))
            # What the reduction still reads, though nobody holds it, must not be handed out again.
            count = len(local)
            del local
            for _ in range(count):
                torch.full((size,), torch.nan, device="cuda")
        flags = reduction.share(torch.tensor([rank], dtype=torch.int32, device="cuda"))
        for size, wait in pending:
            if not torch.equal(wait().cpu(), fold(inputs(where.num_ests, size, torch.float32))):
                wrong.append(f"{kind.__name__} {size}")
        if int(flags.wait()) != group.size() - 1:
            wrong.append(f"{kind.__name__} flags")
        reduction.close()
    return wrong


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("placement", [(1, 1), (2, 1), (1, 2, 1), (3, 2)], ids=str)
def test_executors_may_share_a_gpu_over_gloo(pool: Pool, placement: tuple[int, ...], offload: bool) -> None:
    assert pool.run(len(placement), on_one_gpu, placement=placement, offload=offload) == [[]] * len(placement)


def over_nccl(_: dist.ProcessGroup, rank: int, placement: tuple[int, ...], store: str) -> list[str]:
    """One GPU per executor."""
    torch.cuda.set_device(rank)
    options = dist.ProcessGroupNCCL.Options()
    backend = dist.ProcessGroupNCCL(dist.FileStore(store, len(placement)), rank, len(placement), options)
    group = dist.ProcessGroup(dist.HashStore(), rank, len(placement))
    group._register_backend(torch.device("cuda"), dist.ProcessGroup.BackendType.NCCL, backend)
    group._set_default_backend(dist.ProcessGroup.BackendType.NCCL)
    return on_one_gpu(group, rank, placement, offload=False) + averages(group, rank)


def averages(group: dist.ProcessGroup, rank: int) -> list[str]:
    """Of floating-point numbers and of integers, which NCCL cuts."""
    options, wrong, generator = dist.AllreduceOptions(), [], torch.Generator().manual_seed(0)
    options.reduceOp = dist.ReduceOp.AVG
    for part in (
        torch.randn(1000, generator=generator),
        torch.arange(-500, 500),
        torch.arange(-500, 500, dtype=torch.int32),
    ):
        every = [(part + r).cuda() for r in range(group.size())]
        (ours,), *_ = all_reduce([[tensor] for tensor in every], dist.ReduceOp.AVG, ring_fold)
        theirs = [every[rank].clone()]
        group.allreduce(theirs, options).wait()
        if not torch.equal(ours, theirs[0]):
            wrong.append(f"average of {part.dtype}")
    return wrong


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("placement", [(1, 1), (2, 2), (3, 1)], ids=str)
def test_executors_over_nccl(pool: Pool, placement: tuple[int, ...], tmp_path: object) -> None:
    assert pool.run(2, over_nccl, placement=placement, store=f"{tmp_path}/nccl") == [[]] * 2
