"""The structural clone: functions, hooks and compiled or scripted forwards belong to the clone."""

import functools
import types

import pytest
import torch
from torch import nn

from .cloning import Net, clone


def module_function(value):
    return value


def test_closures_over_the_module_are_rebuilt():
    net = Net()
    net.probe = lambda: net
    net.default = lambda module=net: module
    net.keyword = lambda *, module=net: module
    net.half = functools.partial(module_function, net)
    net.method = net.forward
    net.attributed = lambda: None
    net.attributed.owner = net
    made = clone(net)
    assert made.probe() is made
    assert made.default() is made
    assert made.keyword() is made
    assert made.half() is made
    assert made.method.__self__ is made
    assert made.attributed.owner is made
    assert net.probe() is net


def test_functions_without_state_stay():
    local = lambda x: x  # noqa: E731
    wrapped = functools.wraps(local)(lambda x: local(x))
    values = [
        module_function,
        local,
        len,
        torch.relu,
        nn.functional.relu,
        functools.partial(module_function, 2),
        wrapped,
    ]
    assert all(new is old for new, old in zip(clone(values), values, strict=True))


def test_a_variable_shared_by_two_functions_stays_shared_and_private():
    def make():
        count = 0

        def step():
            nonlocal count
            count += 1

        return step, lambda: count

    step, value = make()
    made_step, made_value = clone((step, value))
    made_step()
    assert (value(), made_value()) == (0, 1)


def test_recursive_closures_end():
    def outer(net):
        def visit(depth):
            return net if depth == 0 else visit(depth - 1)

        return visit

    net = Net()
    net.visit = outer(net)
    made = clone(net)
    assert made.visit(3) is made


def test_an_empty_closure_variable_stays_empty():
    def outer():
        def use():
            return later  # noqa: F821 - on purpose

        later = 1
        del later  # a variable of the closure that has no value
        return use

    use = outer()
    use.state = []
    with pytest.raises(NameError):
        clone(use)()


def test_methods_put_on_an_instance_are_bound_to_the_clone():
    net = Net()
    net.forward = types.MethodType(lambda self, x: self.a(x), net)
    seen = []
    net.report = seen.append
    made = clone(net)
    assert made.forward.__self__ is made
    made.a = nn.Identity()
    assert torch.equal(made(torch.ones(1, 3)), torch.ones(1, 3))
    made.report(1)
    assert seen == []


def test_module_hooks_call_the_clone():
    net = Net()
    calls = []
    net.a.register_forward_pre_hook(lambda module, args: calls.append((id(net), id(module))))
    net.a.register_forward_hook(lambda module, args, out: out * net.factor)
    net.a.register_full_backward_hook(lambda module, gin, gout: setattr(net, "backward_ran", True))
    handle = net.bn.register_forward_hook(lambda *args: setattr(net, "removed_ran", True))
    net.handle = handle
    net.factor = 0.0
    made = clone(net)
    made.factor = 2.0
    made.handle.remove()
    made.a(torch.randn(2, 3, requires_grad=True)).sum().backward()
    assert torch.equal(made.a(torch.ones(1, 3)), 2 * nn.functional.linear(torch.ones(1, 3), net.a.weight, net.a.bias))
    assert made.backward_ran
    assert not hasattr(net, "backward_ran")
    assert calls == []
    made(torch.ones(2, 3))
    assert not hasattr(made, "removed_ran")
    net(torch.ones(2, 3))
    assert net.removed_ran


def test_parameter_hooks_call_the_clone():
    net = Net()
    net.seen, net.accumulated = [], []
    net.handle = net.a.weight.register_hook(lambda grad: net.seen.append(1) or grad * 0)
    net.a.bias.register_post_accumulate_grad_hook(lambda parameter: net.accumulated.append(parameter))
    made = clone(net)
    made(torch.randn(4, 3)).square().sum().backward()
    assert (made.seen, net.seen) == ([1], [])
    assert torch.equal(made.a.weight.grad, torch.zeros(3, 3))
    assert made.accumulated[0] is made.a.bias
    assert net.accumulated == []
    made.handle.remove()
    made(torch.randn(4, 3)).square().sum().backward()
    assert made.seen == [1]
    net(torch.randn(4, 3)).sum().backward()
    assert net.seen == [1]


def test_a_cache_over_a_bound_method_calls_the_clone():
    net = Net()
    net.cached = functools.lru_cache(maxsize=3)(net.extra_repr)
    made = clone(net)
    assert made.cached.__wrapped__.__self__ is made
    assert made.cached.cache_parameters()["maxsize"] == 3
    table = functools.lru_cache(module_function)
    assert clone([table])[0] is table


@pytest.mark.parametrize("how", ["module", "in_place", "method"])
def test_compiled_forward_belongs_to_the_clone(how):
    net = Net()
    compiled = net
    if how == "module":
        compiled = torch.compile(net, backend="eager")
    elif how == "in_place":
        net.compile(backend="eager")
    else:
        net.forward = torch.compile(net.forward, backend="eager")
    x = torch.randn(4, 3)
    expected = compiled(x)
    made = clone(compiled)
    before = net.bn.num_batches_tracked.item()
    assert torch.equal(made(x), expected)
    own = made._orig_mod if how == "module" else made
    assert type(made) is type(compiled)
    assert net.bn.num_batches_tracked.item() == before
    assert own.bn.num_batches_tracked.item() == before + 1
    if how == "module":
        assert own is not net
        assert [id(p) for p in made.parameters()] == [id(p) for p in own.parameters()]


def test_parametrized_and_normalised_modules():
    net = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
    )
    made = clone(net)
    assert [n for n, _ in made.named_parameters()] == [n for n, _ in net.named_parameters()]
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(made.parameters(), net.parameters(), strict=True))
    net.eval(), made.eval()
    x = torch.randn(2, 3)
    assert torch.equal(made(x), net(x))


def test_recurrent_modules_find_their_weights():
    net = nn.LSTM(3, 4, num_layers=2)
    made = clone(net)
    assert [id(w) for w in made._flat_weights] == [id(p) for p in made.parameters()]
    assert [ref() for ref in made._flat_weight_refs] == made._flat_weights
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(made.parameters(), net.parameters(), strict=True))


def test_fx_graph_modules_alias_their_parameters():
    net = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    made = clone(net)
    x = torch.randn(2, 3)
    assert torch.equal(made(x), net(x))
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(made.parameters(), net.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_script_modules_alias_their_parameters():
    net = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))))
    made = clone(net)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(made.parameters(), net.parameters(), strict=True))
    with torch.no_grad():
        getattr(net[0], "0").weight.fill_(2.0)
    assert torch.equal(getattr(made[0], "0").weight, torch.full((3, 3), 2.0))
    net.eval(), made.eval()
    assert torch.equal(made(torch.ones(1, 3)), net(torch.ones(1, 3)))
    made.train()(torch.randn(4, 3))
    assert getattr(net[0], "1").num_batches_tracked == 0
