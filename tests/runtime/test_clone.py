"""The structural clone of modules and Python objects; `test_clone_trainer.py` has the graph of a real Trainer."""

import collections
import copy
import functools
import gc
import logging
import queue
import random
import threading
import tracemalloc
import types
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_easyscale.runtime.clone import CloneError, alias_parameters, structural_clone


def clone(*roots, share=lambda value: False):
    made = structural_clone(roots, share=share)
    return made[0] if len(roots) == 1 else made


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.bn(self.a(x))


class Bag:
    def __init__(self, **values):
        self.__dict__.update(values)


# -- parameters and tensors -------------------------------------------------------------------------------------------


def test_parameters_are_own_objects_over_the_same_storage():
    net = Net()
    net.a.weight.tag = ["per rank"]
    net.a.bias.requires_grad_(False)
    made = clone(net)
    for old, new in zip(net.parameters(), made.parameters(), strict=True):
        assert new is not old
        assert type(new) is nn.Parameter
        assert new.requires_grad == old.requires_grad
        assert new.data_ptr() == old.data_ptr()
    assert made.a.weight.tag == ["per rank"]
    assert made.a.weight.tag is not net.a.weight.tag
    assert made.bn.running_mean.data_ptr() != net.bn.running_mean.data_ptr()


def test_gradients_are_not_shared():
    net = Net()
    net(torch.randn(4, 3)).sum().backward()
    made = clone(net)
    assert torch.equal(made.a.bias.grad, net.a.bias.grad)
    made(torch.randn(4, 3)).square().sum().backward()
    assert not torch.equal(made.a.bias.grad, net.a.bias.grad)


def test_tied_parameters_stay_tied():
    net = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    net[1].weight = net[0].weight
    made = clone(net)
    assert made[1].weight is made[0].weight


def test_parameter_subclass_and_dtype_are_kept():
    class Scale(nn.Parameter):
        pass

    net = nn.Module()
    net.scale = Scale(torch.ones(2, dtype=torch.bfloat16))
    made = clone(net)
    assert type(made.scale) is Scale
    assert made.scale.dtype == torch.bfloat16
    assert made.scale.data_ptr() == net.scale.data_ptr()


def test_lazy_parameters_are_materialised_per_clone():
    net = nn.LazyLinear(2)
    made = clone(net)
    made(torch.randn(1, 3))
    assert made.weight.shape == (2, 3)
    assert isinstance(net.weight, nn.UninitializedParameter)


@pytest.mark.parametrize("before", [True, False])
def test_a_view_of_a_parameter_stays_one(before):
    net = Net()
    view = net.a.weight.data[0]
    roots = ([view], net) if before else (net, [view])
    made = clone(roots[0], roots[1])
    made_view = made[0][0] if before else made[1][0]
    assert made_view is not view
    assert made_view.data_ptr() == net.a.weight.data_ptr()


def test_views_of_one_storage_keep_sharing():
    base = torch.arange(6.0)
    made = clone({"base": base, "row": base.view(2, 3)[1]})
    made["row"].zero_()
    assert made["base"].tolist() == [0, 1, 2, 0, 0, 0]
    assert base.tolist() == [0, 1, 2, 3, 4, 5]


def test_non_leaf_tensors_lose_their_graph():
    net = Net()
    net.last = net(torch.randn(4, 3))
    made = clone(net)
    assert made.last.grad_fn is None
    assert torch.equal(made.last, net.last)
    assert made.last.data_ptr() != net.last.data_ptr()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.empty(3, device="meta"),
        torch.tensor([1 + 2j]).conj(),
        torch.empty(0),
        torch.randn(4, 4).t(),
        torch.tensor(2.0, requires_grad=True),
    ],
    ids=["sparse", "meta", "conj", "empty", "strided", "leaf"],
)
def test_other_tensors_are_copied(tensor):
    made = clone(tensor)
    assert made is not tensor
    assert (made.layout, made.shape, made.requires_grad) == (tensor.layout, tensor.shape, tensor.requires_grad)
    if tensor.device.type != "meta":
        assert torch.equal(made.to_dense(), tensor.to_dense())


def test_inference_tensors_are_copied():
    with torch.inference_mode():
        tensor = torch.ones(2)
    assert clone([tensor])[0].is_inference()


def test_tensors_in_shared_memory_stay_shared():
    tensor = torch.zeros(2).share_memory_()
    assert clone([tensor])[0] is tensor


def test_torch_generators_continue_with_the_same_state():
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    made = clone(generator)
    first = torch.rand(3, generator=made)
    assert torch.equal(first, torch.rand(3, generator=generator))
    assert clone([torch.default_generator])[0] is torch.default_generator


def test_optimizer_refers_to_the_clones_parameters():
    net = Net()
    net.opt = torch.optim.Adam(net.parameters())
    net.opt.note = "user's"
    net.sched = torch.optim.lr_scheduler.StepLR(net.opt, 1)
    net(torch.randn(4, 3)).sum().backward()
    net.opt.step()
    made = clone(net)
    own = list(made.parameters())
    assert [id(p) for p in made.opt.param_groups[0]["params"]] == [id(p) for p in own]
    assert {id(p) for p in made.opt.state} == {id(p) for p in own}
    assert made.opt.state[own[0]]["exp_avg"].data_ptr() != net.opt.state[net.a.weight]["exp_avg"].data_ptr()
    assert made.opt.note == "user's"
    assert made.sched.optimizer is made.opt
    made.opt.step()  # counted by the scheduler's own wrapper, else it would warn
    made.sched.step()
    assert net.opt.param_groups[0]["lr"] != made.opt.param_groups[0]["lr"]


def test_alias_parameters_after_late_creation():
    net, made = nn.Linear(2, 2), nn.Linear(2, 2)
    alias_parameters(net, made)
    assert made.weight.data_ptr() == net.weight.data_ptr()
    with pytest.raises(ValueError, match=r"other parameters than `source`: \['weight'\]"):
        alias_parameters(net, nn.Linear(3, 2))


# -- callables --------------------------------------------------------------------------------------------------------


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


# -- references -------------------------------------------------------------------------------------------------------


def test_weak_references_follow_their_target_into_the_clone():
    net, outside = Net(), Net()
    net.refs = [weakref.ref(net.a), weakref.ref(outside)]
    net.proxy = weakref.proxy(net)
    net.pair = (weakref.ref(net),)
    net.bound = weakref.WeakMethod(net.forward)
    net.early = Bag(to=weakref.ref(net.bn))
    reference = weakref.ref(net.a)
    net.closure = lambda: reference()
    net.dead = weakref.ref(Net())
    net.by_module = weakref.WeakKeyDictionary({net.a: "a", outside: "o"})
    net.by_name = weakref.WeakValueDictionary({"a": net.a, "o": outside})
    net.all = weakref.WeakSet([net.a, outside])
    gc.collect()
    made = clone(net)
    gc.collect()
    assert [ref() for ref in made.refs] == [made.a, outside]
    assert made.proxy.a is made.a
    assert made.pair[0]() is made
    assert made.bound().__self__ is made
    assert made.early.to() is made.bn
    assert made.closure() is made.a
    assert made.dead() is None
    assert dict(made.by_module) == {made.a: "a", outside: "o"}
    assert dict(made.by_name) == {"a": made.a, "o": outside}
    assert set(made.all) == {made.a, outside}


def test_references_between_roots_stay_references():
    net = Net()
    callback = Bag(net=net)
    made_net, made_args = clone(net, ((callback,), {"again": net}))
    assert made_args[0][0].net is made_net
    assert made_args[1]["again"] is made_net


def test_circular_references():
    first, second = Bag(), Bag()
    first.other, second.other = second, first
    first.loop = [first]
    first.loop.append(first.loop)
    first.pair = (first, [first])
    made = clone(first)
    assert made.other.other is made
    assert made.loop[0] is made
    assert made.loop[1] is made.loop
    assert made.pair[1][0] is made


def test_deep_structures_do_not_overflow():
    head = None
    for index in range(20_000):
        head = Bag(next=head, index=index)
    made, length = clone(head), 0
    while made is not None:
        made, length = made.next, length + 1
    assert length == 20_000
    while head is not None:
        head = head.next


def test_cached_properties_are_the_clones_own():
    class Lazy(Net):
        @functools.cached_property
        def layers(self):
            return [self.a, self.bn]

    net = Lazy()
    assert net.layers[0] is net.a
    made = clone(net)
    assert made.layers[0] is made.a
    assert "layers" in vars(made)


def test_slots_and_containers():
    class Slotted:
        __slots__ = ("left", "net", "unset")

    class Mixed(Slotted):
        pass

    Point = collections.namedtuple("Point", "x y")  # noqa: PYI024
    net = Net()
    value = Mixed()
    value.left, value.net, value.extra = [1], net, net
    data = {
        "value": value,
        "point": Point([1], net),
        "ordered": collections.OrderedDict(a=net),
        "default": collections.defaultdict(list, a=[net]),
        "deque": collections.deque([net], maxlen=3),
        "counter": collections.Counter("aab"),
        "frozen": frozenset({net}),
        "keyed": {net: 1, (net, 2): 3},
        "random": random.Random(3),
        "numpy": np.random.default_rng(5),
        "objects": np.array([net, None], dtype=object),
        "iterator": iter([1, 2]),
        "lock": [threading.Lock()],
    }
    made_net, made = clone(net, data)
    assert made["value"].net is made_net
    assert made["value"].extra is made_net
    assert made["value"].left == [1]
    assert made["value"].left is not value.left
    assert not hasattr(made["value"], "unset")
    assert made["point"].y is made_net
    assert made["ordered"]["a"] is made["default"]["a"][0] is made["deque"][0] is made_net
    assert made["deque"].maxlen == 3
    assert made["counter"] == data["counter"]
    assert made["frozen"] == {made_net}
    assert set(made["keyed"]) == {made_net, (made_net, 2)}
    assert made["random"].random() == data["random"].random()
    assert made["numpy"].random() == data["numpy"].random()
    assert made["objects"][0] is made_net
    assert next(made["iterator"]) == 1
    assert list(data["iterator"]) == [1, 2]


def test_custom_deepcopy_joins_the_clone():
    class Custom:
        def __init__(self, net):
            self.net = net

        def __deepcopy__(self, memo):
            made = Custom(copy.deepcopy(self.net, memo))
            made.copied = True
            return made

    class Default:
        def __deepcopy__(self, memo):
            self.__deepcopy__ = None
            try:
                return copy.deepcopy(self, memo)
            finally:
                del self.__deepcopy__

    net = Net()
    custom, default = Custom(net), Default()
    default.probe = lambda: net
    made_custom, made_default, made_net = clone(custom, default, net)
    assert made_custom.copied
    assert made_custom.net is made_net
    assert made_default.probe() is made_net
    assert made_net.a.weight.data_ptr() == net.a.weight.data_ptr()


def test_own_getstate_of_a_module_is_honoured():
    class Picky(Net):
        def __getstate__(self):
            return {**self.__dict__, "scratch": None}

    net = Picky()
    net.scratch = (number for number in range(3))
    made = clone(net)
    assert made.scratch is None
    assert made.a.weight.data_ptr() == net.a.weight.data_ptr()


# -- resources and refusals -------------------------------------------------------------------------------------------


def test_resources_stay_by_reference(tmp_path):
    with (tmp_path / "log").open("w") as file:
        thread = threading.Thread(target=len, args=([],))
        values = [file, thread, threading.local(), logging.getLogger("easyscale"), types, Net, torch.float32, tmp_path]
        values += [torch.nn.functional, np.float32(1), range(3), np.random.mtrand._rand, random._inst]
        assert all(new is old for new, old in zip(clone(values), values, strict=True))
        assert clone([random.shuffle])[0] is random.shuffle


def test_share_keeps_an_object_and_all_it_refers_to():
    net = Net()
    runtime = Bag(net=net)
    net.runtime = runtime
    made = clone(net, share=lambda value: value is runtime)
    assert made.runtime is runtime
    assert made.runtime.net is net


def test_locks_are_new_so_that_a_waiting_est_blocks_no_other():
    holder = Bag(
        lock=threading.Lock(),
        again=threading.RLock(),
        ready=threading.Condition(),
        event=threading.Event(),
        q=queue.Queue(),
    )
    holder.alias = holder.lock
    holder.q.put("item")
    holder.event.set()
    with holder.lock, holder.again, holder.ready:
        made = clone(holder)
        assert made.lock.acquire(blocking=False)
        assert made.again.acquire(blocking=False)
        assert made.ready.acquire(blocking=False)
        made.ready.notify_all()
    assert made.alias is made.lock
    assert made.event.is_set()
    assert made.q.get_nowait() == "item"
    assert holder.q.get_nowait() == "item"


def test_a_running_generator_is_refused_with_its_path():
    net = Net()
    net.a.helper = Bag(streams=[(number for number in range(3))])
    with pytest.raises(CloneError, match=r"`model\.a\.helper\.streams\[0\]` \(a `builtins\.generator`\).*HINT"):
        clone(net)
    list(net.a.helper.streams[0])
    assert clone(net).a.helper.streams[0] is net.a.helper.streams[0]


def test_refusals_name_closures_arguments_and_the_cause():
    net = Net()
    hidden = (number for number in range(3))
    net.probe = lambda: hidden
    with pytest.raises(CloneError, match=r"`model\.probe\.<closure>\.hidden`"):
        clone(Bag().__init__, ((net,), {}))

    class Stubborn:
        def __reduce_ex__(self, protocol):
            raise TypeError("no copies of me")

    with pytest.raises(CloneError, match=r"`bag\.here` .*TypeError: no copies of me") as caught:
        clone(Bag(here=Stubborn()))
    assert isinstance(caught.value.__cause__, TypeError)


def test_live_loader_iterators_are_refused_and_kept_workers_dropped():
    loader = DataLoader(TensorDataset(torch.arange(4.0)), num_workers=1, persistent_workers=True)
    net = Net()
    iterator = iter(loader)
    next(iterator)
    made = clone(loader)
    assert loader._iterator is not None
    assert made._iterator is None
    assert made.dataset is not loader.dataset
    net.stream = iterator
    with pytest.raises(CloneError, match=r"`model\.stream` \(a `torch\.utils\.data\.dataloader\._MultiProc"):
        clone(net)
    iterator._shutdown_workers()


# -- memory -----------------------------------------------------------------------------------------------------------


class Images(Dataset):
    def __init__(self, path):
        self.pixels = torch.zeros(3 << 20)
        self.rows = list(torch.zeros(8, 1 << 18))
        self.many = [torch.zeros(1000) for _ in range(1000)]
        self.array = np.zeros(4 << 20, dtype=np.uint8)
        self.mapped = np.memmap(path, mode="w+", shape=100)
        self.names = [f"image-{index}" for index in range(150_000)]
        self.labelled = [(f"{index}", index) for index in range(100_000)]
        self.tokens = [[index] * 5 for index in range(100_000)]
        self.index = {index: str(index) for index in range(50_000)}
        self.epoch = [0]
        self.order = torch.arange(10)
        self.net = nn.BatchNorm1d(1 << 19)


def test_large_data_in_datasets_is_shared(tmp_path):
    data = Images(tmp_path / "map")
    loader = DataLoader(Subset(data, list(range(10))), batch_size=2)
    made_loader = clone(loader)
    made = made_loader.dataset.dataset
    assert made is not data
    for name in ("pixels", "array", "mapped", "names", "labelled", "tokens", "index", "many"):
        assert getattr(made, name) is getattr(data, name), name
    assert made.rows[3].data_ptr() == data.rows[3].data_ptr()
    assert made.epoch is not data.epoch
    assert made.order.data_ptr() != data.order.data_ptr()
    assert made.net.running_mean.data_ptr() != data.net.running_mean.data_ptr()
    assert clone([data.pixels])[0].data_ptr() != data.pixels.data_ptr()


def test_a_clone_of_a_large_dataset_and_module_takes_little_memory(tmp_path):
    class Big(Dataset):
        array = None

    data, net = Big(), nn.Linear(4096, 4096)
    data.array = np.zeros(32 << 20, dtype=np.uint8)
    data.names = [str(index) for index in range(400_000)]
    net.data = data
    made = None
    with torch.profiler.profile(profile_memory=True) as profile:
        tracemalloc.start()
        made = clone(net)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    torch_bytes = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert made.data.names is data.names
    assert peak < 8 << 20
    assert torch_bytes < 1 << 20


def test_a_clone_leaves_no_references_behind():
    net = Net()
    watch = weakref.ref(net)
    made = clone(net)
    del net
    gc.collect()
    assert watch() is None
    assert made(torch.ones(2, 3)).shape == (2, 3)


def test_clones_in_several_threads_do_not_meet():
    nets = [Net() for _ in range(4)]
    made = [None] * 4

    def work(index):
        made[index] = clone(nets[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(new.a.weight.data_ptr() == old.a.weight.data_ptr() for new, old in zip(made, nets, strict=True))
