"""The structural clone: references between objects, containers and copies of their own making."""

import collections
import copy
import functools
import gc
import random
import threading
import weakref

import numpy as np

from .cloning import Bag, Net, clone


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
