"""Shared loader workers: how many processes there are, and what their errors and signals do."""

from __future__ import annotations

import gc
import multiprocessing.queues
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from lightning_easyscale.data.identity import DataStateError
from lightning_easyscale.data.pool import Member, WorkerPools
from lightning_easyscale.data.position import LoaderFollower
from lightning_easyscale.rng import Generators
from lightning_easyscale.runtime.context import ESTContext
from lightning_easyscale.runtime.executor import Executor
from lightning_easyscale.runtime.peers import Peers

pytestmark = pytest.mark.filterwarnings("ignore:.*os.fork.*:DeprecationWarning")


class Drawn(Dataset):
    """Draws from every generator; counts its calls where it is told to."""

    def __init__(self, *, counts: bool = False) -> None:
        self.rng = np.random.default_rng(1)
        self.counts = counts
        self.calls = 0

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        self.calls += self.counts
        info = get_worker_info()
        assert info is not None
        drawn = [torch.rand(()).item(), random.random(), np.random.randn(), self.rng.random()]
        return torch.tensor([index, *drawn, self.calls, info.id], dtype=torch.float64)


def run_ests(count: int, body: Callable[[int, LoaderFollower], Any]) -> dict[int, Any]:
    """What `body` returns in each of `count` ESTs of one executor; EST r is seeded with r."""
    contexts = {rank: ESTContext(rank, Generators([]), {}, on_enter=lambda rank: None) for rank in range(count)}
    executor = Executor(contexts, Peers(0, 1), timeout=60.0)
    pools = WorkerPools()

    def run(rank: int) -> Any:
        torch.manual_seed(rank)
        member = Member(rank, {"EST": str(rank)}, lambda rank: None, partial(executor.let_others_run, rank))
        return body(rank, LoaderFollower(contexts[rank].generators, member, pools))

    return executor.run({rank: partial(run, rank) for rank in range(count)})


def workers() -> list[psutil.Process]:
    return psutil.Process().children()


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("options", [{}, {"persistent_workers": True}, {"prefetch_factor": 1, "batch_size": 5}])
def test_ests_share_num_workers_processes_and_get_the_batches_of_their_own(options: dict[str, Any]) -> None:
    options = {"batch_size": 3, "shuffle": True, "num_workers": 2, **options}
    counted: list[int] = []
    before = len(workers())

    def body(rank: int, follower: LoaderFollower) -> list[Tensor]:
        loader = DataLoader(Drawn(counts=True), **options)
        follower.attach(loader)
        batches = []
        for _ in range(2):
            for batch in loader:
                batches.append(batch)
                counted.append(len(workers()) - before)
        return batches

    got = run_ests(3, body)
    assert set(counted) == {2}, "processes of three ESTs"
    for rank in range(3):
        torch.manual_seed(rank)
        loader = DataLoader(Drawn(counts=True), **options)
        assert same(got[rank], [batch for _ in range(2) for batch in loader]), f"EST {rank}"


def test_other_loaders_share_their_workers_too() -> None:
    def body(rank: int, follower: LoaderFollower) -> list[Tensor]:
        loader = DataLoader(Drawn(), batch_size=4, num_workers=1)
        follower.share(loader)
        follower.share(loader)
        batches = iter(loader)
        first = next(batches)
        assert len(workers()) - before == 1
        return [first, *batches]

    before = len(workers())
    got = run_ests(2, body)
    torch.manual_seed(1)
    assert same(got[1], list(DataLoader(Drawn(), batch_size=4, num_workers=1)))


def test_an_est_that_asks_alone_does_not_wait_for_the_others() -> None:
    def body(rank: int, follower: LoaderFollower) -> int:
        loader = DataLoader(Drawn(), batch_size=4, num_workers=1)
        follower.attach(loader)
        return len(list(loader)) if rank == 1 else 0

    assert run_ests(2, body) == {0: 0, 1: 6}


def follow(dataset: Any, **options: Any) -> tuple[DataLoader, LoaderFollower, Generators]:
    generators = Generators([])
    follower = LoaderFollower(generators)
    loader = DataLoader(dataset, **{"batch_size": 2, "num_workers": 2, **options})
    follower.attach(loader)
    return loader, follower, generators


def test_a_killed_worker_is_an_error() -> None:
    others, message = workers(), ""
    loader, _, _ = follow(range(400), collate_fn=list)
    batches = iter(loader)
    next(batches)
    mine = [worker for worker in workers() if worker not in others]
    try:
        mine[0].kill()  # noticed at once, or where a batch of it is waited for
        list(batches)
    except RuntimeError as error:
        message = str(error)
    assert re.match(rf"DataLoader worker \(pid(\(s\))? {mine[0].pid}\) (is killed by signal|exited)", message)
    del batches, loader
    gc.collect()
    assert not psutil.wait_procs(mine, timeout=20)[1]


def test_workers_outlive_a_sigterm_to_the_job_and_end_with_their_loader() -> None:
    others = workers()
    loader, _, _ = follow(Drawn())
    batches = iter(loader)
    got = [next(batches)]
    mine = [worker for worker in workers() if worker not in others]
    time.sleep(0.5)  # both have begun
    for worker in mine:
        # By somebody else: workers obey the main process.
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    got += list(batches)
    assert len(got) == 12
    del batches
    assert not psutil.wait_procs(mine, timeout=10)[1]


def sets_a_handler(worker: int) -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    with pytest.raises(ValueError, match="signal number"):
        signal.signal(-1, signal.SIG_IGN)
    os.kill(os.getpid(), signal.SIGUSR2)


def test_worker_init_fn_may_set_signal_handlers() -> None:
    assert len(list(follow(Drawn(), worker_init_fn=sets_a_handler)[0])) == 12


def resumed(dataset: Callable[[], Any], after: int, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The rest of an epoch and the next one, undisturbed and resumed."""
    torch.manual_seed(1)
    loader, follower, generators = follow(dataset(), **options)
    batches = iter(loader)
    for _ in range(after):
        next(batches)
    state = follower.state_dict(inside_epoch=True)
    generators.capture()
    captured = generators.state_dict()
    expected = [*batches, *loader]
    torch.manual_seed(2)
    loader, follower, generators = follow(dataset(), **options)
    follower.resume_from(state)
    generators.load_state_dict(captured)
    generators.install()
    return expected, [*loader, *loader]


@pytest.mark.parametrize("options", [{}, {"persistent_workers": True}])
@pytest.mark.parametrize("after", [1, 5, 11])
def test_the_rest_of_an_epoch_and_the_next_are_the_same(after: int, options: dict[str, Any]) -> None:
    expected, got = resumed(Drawn, after, shuffle=True, **options)
    assert same(got[: 12 - after], expected[: 12 - after])
    # What a dataset in workers draws in later epochs starts anew with them.
    assert same(got, expected)


def test_a_hidden_counter_is_found_out() -> None:
    with pytest.raises(DataStateError, match=r"batch after the 5 that were trained on .* HINT: draw from `torch`"):
        resumed(partial(Drawn, counts=True), 5)


class Numbers(IterableDataset):
    def __iter__(self) -> Any:
        info = get_worker_info()
        assert info is not None
        for number in range(info.id, 21, info.num_workers):
            yield torch.tensor([number, torch.rand(()).item()])


class ResumedNumbers(Numbers):
    def __init__(self) -> None:
        self.passed, self.skip = 0, 0
        self.made = 0

    def __iter__(self) -> Any:
        self.passed, skip, self.skip = self.skip, self.skip, 0
        info = get_worker_info()
        assert info is not None
        for number in list(range(info.id, 21, info.num_workers))[skip:]:
            self.passed += 1
            yield torch.tensor([number, torch.rand(()).item()])

    def state_dict(self) -> dict[str, int]:
        return {"passed": self.passed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["passed"]


@pytest.mark.parametrize(("kind", "replayed"), [(Numbers, True), (ResumedNumbers, False)])
def test_iterable_datasets_go_on_by_their_state_or_by_replay(
    kind: type[Any], replayed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    expected, got = resumed(kind, 4)
    assert same(got, expected)
    assert ("drawing 4 batches again" in caplog.text) == replayed


def test_what_was_trained_on_is_passed_over_before_a_worker_says_that_its_data_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 11 batches 10 are passed over; worker 1 has nothing more to give. A queue of this process may be slow."""
    feed, parent = multiprocessing.queues.Queue._feed, os.getpid()  # type: ignore[attr-defined]

    class Late:
        def __init__(self, lock: Any) -> None:
            self.lock, self.release = lock, lock.release

        def acquire(self) -> None:
            time.sleep(0.2)
            self.lock.acquire()

    def slowly(buffer: Any, not_empty: Any, send: Any, lock: Any, *rest: Any) -> None:
        with not_empty:
            while not buffer:
                not_empty.wait()
        answers = os.getpid() == parent and isinstance(buffer[0], tuple) and buffer[0][1] is None
        feed(buffer, not_empty, send, Late(lock) if answers else lock, *rest)

    expected, _ = resumed(ResumedNumbers, 10)
    monkeypatch.setattr(multiprocessing.queues.Queue, "_feed", staticmethod(slowly))
    _, got = resumed(ResumedNumbers, 10)
    assert same(got, expected)
