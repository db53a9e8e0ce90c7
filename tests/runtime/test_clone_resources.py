"""The structural clone: what stays shared, what is refused, and how much memory it takes."""

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

from lightning_easyscale.runtime.clone import CloneError

from .cloning import Bag, Net, clone


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
