"""The wrapper's contract in one process: errors, buffers, memory, private copies, rendezvous."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch
from torch import Tensor, nn

from lightning_easyscale.placement import Placement
from lightning_easyscale.reduction import bucket_gradients
from lightning_easyscale.reduction.arrival import Arrivals
from lightning_easyscale.reduction.bucket_gradients import BucketGradients
from lightning_easyscale.reduction.collector import ESTDataParallel
from lightning_easyscale.reduction.exchange import RingReduction
from lightning_easyscale.reduction.orders import tree_fold
from lightning_easyscale.reduction.tree_gradients import TreeGradients


def executor(k: int, **options: object) -> TreeGradients:
    return TreeGradients(Placement((k,)), 0, None, **options)  # type: ignore[arg-type]


def wrap(module: nn.Module, reduce: TreeGradients, rank: int = 0, **options: object) -> ESTDataParallel:
    return ESTDataParallel(module, rank=rank, n=reduce.n, reduce=reduce, **options)  # type: ignore[arg-type]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 1)
        self.b = nn.Linear(3, 1)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, which: str = "ab") -> Tensor:
        return sum((getattr(self, name)(x).sum() for name in which), torch.zeros(()))


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


def told(model: ESTDataParallel, *losses: Tensor) -> None:
    """Run backwards as the strategy does."""
    for loss in losses:
        model.begin_backward(loss)
        loss.backward()
        model.end_backward()


def test_gradients_that_accumulate_are_listened_to_one_by_one() -> None:
    model, x = wrap(Two(), executor(1)), torch.ones(2, 3)
    told(model, model(x))
    assert hooks(model) == 1
    told(model, model(x))
    assert hooks(model) == 4


def hooks(model: ESTDataParallel) -> int:
    return len(model._hooks.listening)


def test_one_hook_for_a_group_is_left_until_a_backward_brings_less() -> None:
    module = Two()
    model, x = wrap(module, executor(1)), torch.ones(2, 3)
    told(model, model(x))
    assert hooks(model) == 1
    # Its parameters are not the one that is listened to: nothing is heard of this backward.
    quiet = next(name for name in "ab" if id(module.get_parameter(f"{name}.bias")) not in listened(model))
    module.zero_grad()
    told(model, model(x, quiet))
    assert hooks(model) == 4
    with pytest.raises(RuntimeError, match="no gradient reached"):
        model(x)


def listened(model: ESTDataParallel) -> set[int]:
    names = {model._names[i].split(".")[0] for i in model._hooks.listening}
    return {id(p) for name in names for p in model.module.get_submodule(name).parameters()}


def test_a_step_may_take_several_backwards_as_in_ddp_also_after_one_that_took_one() -> None:
    module = Two()
    model, x = wrap(module, executor(1)), torch.ones(2, 3)
    told(model, model(x))
    module.zero_grad()
    told(model, model(x, "a"), module(x, "b"))
    assert torch.equal(module.a.bias.grad, torch.tensor([2.0]))
    assert torch.equal(module.b.bias.grad, torch.tensor([2.0]))
    assert model(x) is not None


def test_a_gradient_that_comes_again_after_its_group_was_taken_is_refused() -> None:
    module, x = Two(), torch.ones(2, 3)
    model = wrap(module, executor(1, bucket_cap_mb=1e-6))
    told(model, model(x))
    assert hooks(model) == 4
    module.zero_grad()

    def again(_: Tensor) -> None:
        # As a reentrant checkpoint does; `a` gets its gradients after `b`.
        with torch.enable_grad():
            module.b(x).sum().backward()

    module.a.weight.register_hook(again)
    with pytest.raises(RuntimeError, match=r"`b\.(bias|weight)` came twice"):
        told(model, model(x))


@pytest.mark.parametrize("left", [True, False])
def test_a_gradient_that_changes_after_it_was_taken_is_found(left: bool) -> None:
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    arrivals = Arrivals(parameters)
    arrivals.group([(0, 1, 2)])
    assert arrivals.begin()
    for p in parameters[:2]:
        p.grad = torch.ones(2)
    assert arrivals.final(0) is None
    parameters[2].grad = torch.ones(2)
    grads = arrivals.final(0)
    assert grads is not None
    if not left:
        for p in parameters:
            p.grad = None
    arrivals.took(0, grads if left else [])
    assert arrivals.disturbed() is None
    if left:
        grads[1] += 1
    else:
        parameters[1].grad = torch.ones(2)
    assert arrivals.disturbed() == 1


@pytest.mark.parametrize("offload", [None, "host"])
@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_sums_of_grouped_gradients_stay_where_autograd_put_the_first_ests(
    k: int, private: bool, offload: str | None
) -> None:
    reduction = RingReduction(Placement((k,)), 0, None, k)
    reduce = BucketGradients(reduction, private_gradients=private, offload=offload)  # type: ignore[arg-type]
    modules = [Two() for _ in range(k)]
    models = [ESTDataParallel(module, rank=r, n=k, reduce=reduce) for r, module in enumerate(modules)]
    for step in range(3):
        own = []
        for rank, model in enumerate(models):
            modules[rank].zero_grad()
            x = torch.tensor([[1.0, 2.0, 3.0]]) * (step + 2 * rank + 1)
            model.begin_backward(loss := model(x))
            loss.backward()
            if rank < k - 1 and offload is None:
                own.append([p.grad for p in modules[rank].parameters()])
            model.end_backward()
        assert hooks(models[-1]) == 1  # one bucket
        expected = sum(torch.tensor([1.0, 2.0, 3.0]) * (step + 2 * rank + 1) * (1.0 / k) for rank in range(k))
        for rank, module in enumerate(modules):
            if rank and not private:
                assert module.a.weight.grad is None
                continue
            assert torch.allclose(module.a.weight.grad[0], expected)
            assert torch.equal(module.a.weight.grad, modules[0].a.weight.grad)
            assert module.b.bias.grad.item() == pytest.approx(1.0)
            if rank < len(own):
                assert all(p.grad is grad for p, grad in zip(module.parameters(), own[rank], strict=True))
    grads = [module.a.weight.grad for module in modules if module.a.weight.grad is not None]
    assert len({grad.data_ptr() for grad in grads}) == len(grads)


def test_gradients_that_wait_on_the_host_are_freed_at_the_end_of_their_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bucket_gradients, "to_host", lambda flat: flat.clone())
    reduce = BucketGradients(RingReduction(Placement((2,)), 0, None, 2), offload="host")
    modules = [Two(), Two()]
    models = [ESTDataParallel(module, rank=r, n=2, reduce=reduce) for r, module in enumerate(modules)]
    came: list[weakref.ref[Tensor]] = []
    modules[0].a.weight.register_post_accumulate_grad_hook(lambda p: came.append(weakref.ref(p.grad)))
    for _ in range(3):
        for rank, model in enumerate(models):
            modules[rank].zero_grad()
            told(model, model(torch.ones(2, 3)))
            assert rank or came[-1]() is None
    assert [hooks(model) for model in models] == [1, 1]
    assert modules[0].a.weight.grad.tolist() == [[2.0] * 3]


def test_an_unused_gradient_goes_where_another_est_used_the_parameter() -> None:
    reduce = executor(2)
    modules = [Two(), Two()]
    for rank, module in enumerate(modules):
        wrap(module, reduce, rank)
    models = [wrap(module, reduce, r, find_unused_parameters=True) for r, module in enumerate(modules)]
    x = torch.ones(1, 3)
    modules[1].b.bias.grad = torch.ones(1)
    models[0](x).backward()
    models[1](x, "a").backward()
    assert modules[0].b.bias.grad.item() == 1.0
    assert all(p.grad is None for p in modules[1].parameters())


def test_a_graph_that_saved_a_gradient_notices_that_it_was_reduced() -> None:
    module = Two()
    reduce = BucketGradients(RingReduction(Placement((1,)), 0, None, 1))
    model = ESTDataParallel(module, rank=0, n=1, reduce=reduce)
    told(model, model(torch.ones(2, 3)))
    saved: list[Tensor] = []

    def save(parameter: Tensor) -> None:
        with torch.enable_grad():
            saved.append((torch.ones(1, 3, requires_grad=True) * parameter.grad).sum())

    module.a.weight.register_post_accumulate_grad_hook(save)
    module.zero_grad()
    told(model, model(torch.ones(2, 3)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved[0].backward()


def test_gradients_in_one_memory_are_each_read_before_they_are_written() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            return (self.one.view(-1) + self.other.view(-1)).mul(x).sum()

    modules = [Sum(), Sum(), Sum()]
    reduce = BucketGradients(RingReduction(Placement((3,)), 0, None, 3))
    models = [ESTDataParallel(module, rank=r, n=3, reduce=reduce) for r, module in enumerate(modules)]
    shared = False
    for _ in range(3):
        for rank, model in enumerate(models):
            modules[rank].zero_grad()
            model.begin_backward(loss := model(torch.full((6,), 3.0 * (rank + 1))))
            loss.backward()
            if rank == 0:
                shared = modules[0].one.grad.data_ptr() == modules[0].other.grad.data_ptr()
            model.end_backward()
        assert modules[0].one.grad.view(6).tolist() == modules[0].other.grad.tolist() == [6.0] * 6
    assert shared
