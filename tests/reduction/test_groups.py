"""The wrapper and gradients that are taken a bucket at a time: hooks, changes, sums in place."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_easyscale.placement import Placement
from lightning_easyscale.reduction import bucket_gradients
from lightning_easyscale.reduction.arrival import Arrivals
from lightning_easyscale.reduction.bucket_gradients import BucketGradients
from lightning_easyscale.reduction.collector import ESTDataParallel
from lightning_easyscale.reduction.exchange import RingReduction

from .wrapping import Two, executor, hooks, listened, told, wrap


def test_gradients_that_accumulate_are_listened_to_one_by_one() -> None:
    model, x = wrap(Two(), executor(1)), torch.ones(2, 3)
    told(model, model(x))
    assert hooks(model) == 1
    told(model, model(x))
    assert hooks(model) == 4


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
@pytest.mark.parametrize("k", [1, 2, 4])  # of which all numbers here are exact
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
            assert torch.equal(module.a.weight.grad[0], expected)
            assert torch.equal(module.a.weight.grad, modules[0].a.weight.grad)
            assert module.b.bias.grad.item() == 1.0
            if rank < len(own):
                assert all(p.grad is grad for p, grad in zip(module.parameters(), own[rank], strict=True))
    grads = [module.a.weight.grad for module in modules if module.a.weight.grad is not None]
    assert len({grad.data_ptr() for grad in grads}) == len(grads)


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


def test_memory_of_gradients_that_wait_on_the_host_is_free_while_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_gradients.Aside, "serves", staticmethod(lambda tensor: True))
    modules = [Two(), Two()]
    held: list[list[bool]] = []
    left: list[weakref.ref[Tensor]] = []

    def meet(rank: int, work: Callable[[], None]) -> None:
        held.append([grad() is not None for grad in left])
        if rank == 1:
            work()

    def note(parameter: Tensor) -> None:
        assert parameter.grad is not None
        left.append(weakref.ref(parameter.grad))

    for parameter in modules[0].parameters():
        parameter.register_post_accumulate_grad_hook(note)
    reduce = BucketGradients(RingReduction(Placement((2,)), 0, None, 2), offload="host", rendezvous=meet)
    models = [ESTDataParallel(module, rank=r, n=2, reduce=reduce) for r, module in enumerate(modules)]
    for _ in range(3):
        for module in modules:
            module.zero_grad()
        left.clear()
        for rank, model in enumerate(models):
            told(model, model(torch.ones(2, 3) * (rank + 1)))
    assert [hooks(model) for model in models] == [1, 1]
    assert held == [[False] * 4] * 6
    assert modules[0].a.weight.grad is not None
    assert modules[0].a.weight.grad.tolist() == [[3.0] * 3]


class Sum(nn.Module):
    """Of which both gradients lie in one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return (self.one.view(-1) + self.other.view(-1)).mul(x).sum()


class Apart(Sum):
    """Of which each has its own."""

    def forward(self, x: Tensor) -> Tensor:
        return (1 * self.one.view(-1) + 1 * self.other.view(-1)).mul(x).sum()


def test_where_the_last_ests_gradients_lie_in_one_memory_sums_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_gradients.Aside, "serves", staticmethod(lambda tensor: True))
    modules = [Apart(), Sum()]
    reduce = BucketGradients(RingReduction(Placement((2,)), 0, None, 2), offload="host")
    models = [ESTDataParallel(module, rank=r, n=2, reduce=reduce) for r, module in enumerate(modules)]
    for _ in range(3):
        for rank, (module, model) in enumerate(zip(modules, models, strict=True)):
            module.zero_grad()
            told(model, model(torch.full((6,), 1.0 + rank)))
        one, other = (p.grad for p in modules[0].parameters())
        assert one is not None
        assert other is not None
        assert one.flatten().tolist() == other.tolist() == [1.5] * 6
        assert one.data_ptr() != other.data_ptr()


def test_sums_that_come_early_do_not_look_like_gradients_that_came_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_gradients.Aside, "serves", staticmethod(lambda tensor: True))
    monkeypatch.setattr(bucket_gradients.Aside, "spare", staticmethod(lambda device: 1 << 40))

    class Odd(nn.Module):
        """Of which one gradient is strided unlike its parameter, by a hook of the user's."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.zeros(n, 3)) for n in (2, 1, 9))
            self.a.register_post_accumulate_grad_hook(self.turn)

        @staticmethod
        def turn(parameter: Tensor) -> None:
            assert parameter.grad is not None
            parameter.grad = parameter.grad.t().contiguous().t()

        def forward(self, x: Tensor, order: str) -> Tensor:
            return sum(((x * self.get_parameter(name)).sum() for name in order), torch.zeros(()))

    modules = [Odd(), Odd(), Odd()]
    reduce = BucketGradients(RingReduction(Placement((3,)), 0, None, 3), offload="host", bucket_cap_mb=3e-5)
    models = [ESTDataParallel(module, rank=r, n=3, reduce=reduce) for r, module in enumerate(modules)]
    for step in range(4):
        for rank, (module, model) in enumerate(zip(modules, models, strict=True)):
            module.zero_grad()
            # A backward goes from the end: the last EST comes to the second bucket first.
            told(model, model(torch.ones(1, 3) * (1 + rank), "cab" if rank == 2 and step > 1 else "abc"))
        for parameter in modules[0].parameters():
            assert parameter.grad is not None
            assert parameter.grad.unique().tolist() == [2.0]
    assert reduce.groups == [(2,), (1, 0)]


def test_the_sum_of_gradients_that_waited_lies_in_the_last_ests_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_gradients.Aside, "serves", staticmethod(lambda tensor: True))
    modules, places = [Two(), Two()], set()
    reduce = BucketGradients(RingReduction(Placement((2,)), 0, None, 2), offload="host")
    models = [ESTDataParallel(module, rank=r, n=2, reduce=reduce) for r, module in enumerate(modules)]
    modules[1].a.weight.register_post_accumulate_grad_hook(lambda p: places.add(p.grad.data_ptr()))
    for _ in range(3):
        places.clear()
        for module, model in zip(modules, models, strict=True):
            module.zero_grad()
            told(model, model(torch.ones(2, 3)))
        assert modules[0].a.weight.grad is not None
        assert {modules[0].a.weight.grad.data_ptr()} == places


def test_gradients_in_one_memory_are_each_read_before_they_are_written() -> None:
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
