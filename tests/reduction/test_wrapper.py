"""The wrapper's contract in one process: errors, buffers, memory, private copies, rendezvous."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch
from torch import Tensor, nn

from lightning_easyscale.reduction.collector import ESTDataParallel
from lightning_easyscale.reduction.orders import tree_fold

from .wrapping import Two, executor, wrap


def test_a_missing_gradient_stops_the_next_forward_as_in_ddp() -> None:
    model = wrap(Two(), executor(1))
    x = torch.ones(2, 3)
    model(x, "a").backward()
    with torch.no_grad():
        model(x)
    for attempt in (model, lambda x: model.no_sync().__enter__() or model(x)):
        with pytest.raises(RuntimeError, match=r"no gradient reached \['b.weight', 'b.bias'\].*find_unused_parameters"):
            attempt(x)


def test_a_gradient_that_comes_twice_is_refused_as_in_ddp() -> None:
    model = wrap(Two(), executor(1))
    loss = model(torch.ones(2, 3), "a")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ready only once"):
        loss.backward()


def test_a_backward_after_the_reduction_accumulates_locally_as_in_ddp() -> None:
    module = Two()
    model = wrap(module, executor(1))
    loss = model(torch.ones(2, 3))
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(module.a.bias.grad, torch.tensor([4.0]))


def test_manual_optimization_prepares_each_backward() -> None:
    module = Two()
    model = wrap(module, executor(1), find_unused_parameters=True)
    with model.no_sync():
        loss = model(torch.ones(2, 3), "a")
    model.prepare_for_backward()
    loss.backward()
    assert torch.equal(module.a.bias.grad, torch.tensor([2.0]))
    assert module.b.bias.grad is None


def test_a_static_graph_that_changes_is_refused() -> None:
    model = wrap(Two(), executor(1), static_graph=True)
    x = torch.ones(2, 3)
    model(x, "a").backward()
    with pytest.raises(RuntimeError, match="`static_graph=True`, but `b.*` was unused in the first iteration"):
        model(x, "ab").backward()


def test_sparse_gradients_are_refused_at_first_sight() -> None:
    with pytest.raises(ValueError, match="`0.weight` produces sparse gradients.*sparse=False"):
        wrap(nn.Sequential(nn.Embedding(4, 2, sparse=True)), executor(1))

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(4, 2))

        def forward(self) -> Tensor:
            return nn.functional.embedding(torch.tensor([1]), self.table, sparse=True).sum()

    model = wrap(Hidden(), executor(1))
    with pytest.raises(ValueError, match="`table` received a sparse gradient"):
        model().backward()


def test_other_refusals() -> None:
    with pytest.raises(RuntimeError, match="no parameter that requires a gradient"):
        wrap(nn.Linear(1, 1).requires_grad_(False), executor(1))
    with pytest.raises(ValueError, match="`n=3` differs from the 2 ESTs"):
        ESTDataParallel(nn.Linear(1, 1), rank=0, n=3, reduce=executor(2))
    reduce = executor(2)
    wrap(nn.Linear(1, 1), reduce, 0)
    with pytest.raises(ValueError, match="`parameters` of EST 1 differ from those of EST 0"):
        wrap(nn.Linear(1, 2), reduce, 1)
    with pytest.raises(ValueError, match="`rank=2` is not one of this executor's ESTs"):
        reduce.register(2, [])


def test_buffers_are_synchronised_when_ddp_would() -> None:
    module, calls = Two(), []

    def sync(buffers: list[list[Tensor]]) -> None:
        calls.append(len(buffers))
        buffers[0][0].fill_(7.0)

    model = wrap(module, executor(1), sync_buffers=sync)
    x = torch.ones(2, 3)
    model(x).backward()
    assert calls == [1]
    assert float(module.count) == 7.0
    with model.no_sync():
        model(x).backward()
    assert len(calls) == 2
    # After a forward without synchronisation DDP skips buffers until the next synchronising one is over.
    model(x).backward()
    assert len(calls) == 2
    model.eval()
    with torch.no_grad():
        model(x)
        model(x)
    assert len(calls) == 3
    assert wrap(Two(), executor(1), sync_buffers=sync, broadcast_buffers=False)(x) is not None
    assert len(calls) == 3


@pytest.mark.parametrize("private", [False, True])
def test_the_first_est_has_the_gradients_and_the_others_copies_if_private(private: bool) -> None:
    reduce = executor(3, private_gradients=private)
    modules = [Two() for _ in range(3)]
    for rank, module in enumerate(modules):
        wrap(module, reduce, rank)
    wrapped = [wrap(module, reduce, rank) for rank, module in enumerate(modules)]
    for rank, model in enumerate(wrapped):
        model(torch.full((1, 3), rank + 1.0)).backward()
    grads = [module.a.weight.grad for module in modules]
    third = 1.0 / 3
    expected = tree_fold([torch.full((3,), rank + 1.0) * third for rank in range(3)])
    found = [grad for grad in grads if grad is not None]
    assert found[0] is grads[0]
    assert all(torch.equal(grad.view(-1), expected) for grad in found)
    assert len({grad.data_ptr() for grad in found}) == len(found) == (3 if private else 1)


def test_gradients_are_freed_while_backward_runs_and_partial_sums_stay_few() -> None:
    k, layers = 7, 6
    reduce = executor(k, bucket_cap_mb=0.001)
    peak = 0

    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(20, 20, bias=False) for _ in range(layers))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x.sum()

    modules = [Watch() for _ in range(k)]

    def count(parameter: nn.Parameter, module: nn.Module) -> None:
        nonlocal peak
        peak = max(peak, sum(p.grad is not None for p in module.parameters()))

    for rank, module in enumerate(modules):
        for p in module.parameters():
            p.register_post_accumulate_grad_hook(lambda p, m=module: count(p, m))
        model = wrap(module, reduce, rank)
        model(torch.ones(1, 20)).backward()
        blocks = max(len(bucket.fold._blocks) for bucket in reduce._buckets)
        assert blocks <= 3
        if rank < k - 1:
            assert all(p.grad is None for p in module.parameters())
    assert peak == 1
    assert all(p.grad is not None for p in modules[0].parameters())


def test_exchange_starts_before_the_last_backward_ends() -> None:
    reduce = executor(2, bucket_cap_mb=0.0001)
    modules = [nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50)) for _ in range(2)]
    wrapped = [wrap(module, reduce, rank) for rank, module in enumerate(modules)]
    wrapped[0](torch.ones(1, 50)).sum().backward()
    seen = []
    modules[1][0].weight.register_hook(lambda _: seen.append(len(reduce._pending)))
    wrapped[1](torch.ones(1, 50)).sum().backward()
    assert 1 <= seen[0] < len(reduce._buckets) == 4


def test_ests_in_threads_meet_at_the_rendezvous() -> None:
    barrier = threading.Barrier(2)
    arrived: list[int] = []

    def rendezvous(rank: int, work) -> None:  # type: ignore[no-untyped-def]
        arrived.append(rank)
        if len(arrived) == 2:
            work()
        barrier.wait(10)

    reduce = executor(2, rendezvous=rendezvous, private_gradients=True)
    modules = [nn.Linear(3, 1) for _ in range(2)]
    wrapped = [wrap(module, reduce, rank) for rank, module in enumerate(modules)]
    seen = {}

    def run(rank: int) -> None:
        with torch.autograd.set_multithreading_enabled(False):
            wrapped[rank](torch.full((1, 3), rank + 1.0)).sum().backward()
        seen[rank] = modules[rank].weight.grad

    first = threading.Thread(target=run, args=(0,))
    first.start()
    while not arrived:
        pass
    run(1)
    first.join(10)
    assert seen[0] is not None
    assert torch.equal(seen[0], torch.full((1, 3), 1.5))
    assert torch.equal(seen[0], seen[1])


def test_a_dropped_wrapper_leaves_no_hooks() -> None:
    module = nn.Linear(2, 1)
    model = wrap(module, executor(1))
    gone, handles = weakref.ref(model), model._hooks._handles
    assert len(handles) == 2
    del model
    assert gone() is None
    assert not handles
