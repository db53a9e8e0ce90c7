"""The baton: who runs when, what a meeting and a publication give, and what is left after an error."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from lightning_easyscale.runtime.errors import CollectiveMismatch, ESTAborted, ESTHang
from lightning_easyscale.runtime.executor import Executor
from lightning_easyscale.runtime.messages import Address
from lightning_easyscale.runtime.peers import Peers


class Context:
    """Records who is in force; entering while another EST is in would show."""

    inside: list[int] = []

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def enter(self) -> None:
        self.inside.append(self.rank)

    def leave(self) -> None:
        self.inside.remove(self.rank)

    def prepare(self) -> None:
        pass

    def thread(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@pytest.fixture
def make() -> Callable[..., Executor]:
    Context.inside = []
    return lambda ranks=(0, 1, 2), timeout=20.0: Executor({r: Context(r) for r in ranks}, Peers(0, 1), timeout=timeout)


def total(deposits: dict[int, Any]) -> dict[int, Any]:
    return dict.fromkeys(deposits, sum(deposits.values()))


def run(executor: Executor, function: Callable[[int], Any]) -> dict[int, Any]:
    return executor.run({r: lambda r=r: function(r) for r in executor.ranks})


def test_ests_run_one_at_a_time_and_in_rank_order_after_a_meeting(make: Any) -> None:
    executor, order = make((3, 4, 5)), []

    def est(rank: int) -> int:
        result = 0
        for turn in range(3):
            assert Context.inside == [rank]
            assert executor.holder == rank
            order.append((turn, rank))
            result = executor.meet(rank, turn, "sum", rank, total)
        return result

    assert run(executor, est) == {3: 12, 4: 12, 5: 12}
    assert order == [(turn, rank) for turn in range(3) for rank in (3, 4, 5)]
    assert threading.current_thread() is threading.main_thread()


def test_the_lead_runs_on_the_calling_thread(make: Any) -> None:
    threads = run(make(), lambda rank: threading.current_thread().name)
    assert threads[0] == threading.main_thread().name
    assert threads[2] == "easyscale-est-2"


def test_the_last_to_arrive_works_for_all_and_members_get_their_own(make: Any) -> None:
    workers = []

    def est(rank: int) -> Any:
        def complete(deposits: dict[int, Any]) -> dict[int, Any]:
            workers.append(rank)
            return {r: (r, sorted(deposits.items())) for r in deposits}

        return executor.meet(rank, "k", "t", rank * 10, complete)

    executor = make()
    assert run(executor, est)[1] == (1, [(0, 0), (1, 10), (2, 20)])
    assert workers == [2]


def test_a_meeting_of_some(make: Any) -> None:
    executor = make()

    def est(rank: int) -> Any:
        some = executor.meet(rank, "some", "t", rank, total, members=(0, 2)) if rank != 1 else None
        return some, executor.meet(rank, "all", "t", rank, total)

    assert run(executor, est) == {0: (2, 3), 1: (None, 3), 2: (2, 3)}


def test_publish_does_not_wait(make: Any) -> None:
    executor, log = make(), []

    def est(rank: int) -> int:
        for step in range(3):
            log.append((rank, executor.publish(rank, step, "broadcast", lambda: len(log))))
        return executor.switches

    run(executor, est)
    assert [rank for rank, _ in log] == [0, 0, 0, 1, 1, 1, 2, 2, 2], "each EST ran through"
    assert [value for _, value in log] == [0, 1, 2] * 3, "and saw what the lead had produced"
    assert not executor._published, "and nothing is kept"


def test_switches_are_as_many_as_ests_per_meeting(make: Any) -> None:
    executor = make()
    run(executor, lambda rank: [executor.meet(rank, i, "t", 0, total) for i in range(10)])
    assert executor.switches <= 3 * 10 + 3


def test_an_est_that_waits_for_a_message_lets_the_others_run(make: Any) -> None:
    executor, log = make(), []
    address = Address("world", 1, 0, 0)

    def est(rank: int) -> Any:
        if rank == 0:
            log.append("waits")
            first, second = executor.mail.claim(address), executor.mail.claim(address)
            executor.wait_until(0, "mail", lambda: executor.mail.has(address, second))
            return [executor.mail.take(address, second), executor.mail.take(address, first)]
        log.append(f"{rank} runs")
        if rank == 1:
            executor.mail.post(address, "one")
            executor.mail.post(address, "two")
        return None

    assert run(executor, est)[0] == ["two", "one"]
    assert log == ["waits", "1 runs", "2 runs"]


def test_a_message_that_nobody_sends(make: Any) -> None:
    executor = make()
    with pytest.raises(CollectiveMismatch, match=r"no EST can go on: EST 0 waits in `mail`; EST 1 has ended"):
        run(executor, lambda rank: rank or executor.wait_until(0, "mail", lambda: False))


def test_a_mismatch_names_both_ranks_and_calls(make: Any) -> None:
    executor = make()
    with pytest.raises(
        CollectiveMismatch, match=r"EST 1 called `barrier` where EST 0 called `all_reduce\(float32\[3\]\)`"
    ):
        run(executor, lambda r: executor.meet(r, 0, "all_reduce(float32[3])" if r == 0 else "barrier", 0, total))
    with pytest.raises(CollectiveMismatch, match=r"EST 1 called `b` where an earlier EST called `a`. HINT: every rank"):
        run(executor, lambda r: executor.publish(r, 0, "ab"[min(r, 1)], lambda: 0))


def test_an_est_that_ends_while_others_wait(make: Any) -> None:
    executor = make()
    message = r"no EST can go on: EST 0 waits in `sync`; EST 1 has ended; EST 2 waits in `sync`. HINT: "
    with pytest.raises(CollectiveMismatch, match=message):
        run(executor, lambda r: None if r == 1 else executor.meet(r, 0, "sync", 0, total))


@pytest.mark.parametrize("culprit", [0, 1, 2])
@pytest.mark.parametrize("step", [0, 2])
def test_the_first_error_is_what_the_caller_sees_and_all_others_are_unwound(make: Any, culprit: int, step: int) -> None:
    executor, cleaned = make(), []

    def est(rank: int) -> None:
        try:
            for i in range(4):
                if rank == culprit and i == step:
                    raise ZeroDivisionError("my own")
                executor.meet(rank, i, "t", 0, total)
        except Exception as error:  # as host loops do around collectives
            if rank != culprit:
                pytest.fail(f"swallowed {error!r}")
            raise
        finally:
            cleaned.append(rank)

    with pytest.raises(ZeroDivisionError, match="my own") as caught:
        run(executor, est)
    note = f"raised in EST {culprit} (executor 0)"
    assert getattr(caught.value, "__notes__", [note]) == [note]
    # An EST that has not begun has nothing to clean.
    begun = set(range(culprit + 1)) if step == 0 else {0, 1, 2}
    assert set(cleaned) == begun
    assert Context.inside in ([], [0]), "nobody's state is in force any more, or the lead's is again"
    assert executor.failed
    assert run(executor, lambda rank: rank) == {0: 0, 1: 1, 2: 2}, "the executor can be used again"


def test_a_failing_est_may_still_clean_up_with_collectives_that_do_not_hang(make: Any) -> None:
    executor, seen = make(), []

    def est(rank: int) -> None:
        try:
            executor.meet(rank, 0, "t", 0, total)
            if rank == 1:
                raise ValueError("first")
            executor.meet(rank, 1, "t", 0, total)
        finally:
            try:
                executor.meet(rank, "teardown", "barrier", 0, total)
            except ESTAborted:
                seen.append(rank)
                raise

    with pytest.raises((ValueError, CollectiveMismatch), match="first|no EST can go on"):
        run(executor, est)
    assert set(seen) <= {0, 1, 2}


@pytest.mark.parametrize("early", [True, False])
def test_ctrl_c_while_the_main_thread_waits(make: Any, early: bool) -> None:
    executor, cleaned = make((0, 1)), []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job does not have

    def est(rank: int) -> None:
        try:
            if rank == 0:
                executor.meet(rank, 0, "t", 0, total)
            else:
                if early:
                    time.sleep(0.2)  # a signal just before the main thread sleeps is handled when it wakes
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                    deadline = time.monotonic() + 5
                    while not executor.failed and time.monotonic() < deadline:
                        time.sleep(0.01)
                    assert executor.failed
                else:
                    signal.raise_signal(signal.SIGINT)  # this thread's: the main thread sees it when the baton comes
                executor.meet(rank, 0, "t", 0, total)
        finally:
            cleaned.append(rank)

    with pytest.raises(KeyboardInterrupt):
        run(executor, est)
    assert sorted(cleaned) == [0, 1]


def test_a_hang_names_who_waits_for_what_and_who_holds_the_baton(make: Any) -> None:
    executor, release = make((0, 1), timeout=0.3), threading.Event()

    def est(rank: int) -> None:
        if rank == 1:
            release.wait(10)
        executor.meet(rank, 0, "all_gather", 0, total)

    message = (
        r"EST 0 waited 0 s in `all_gather`; EST 1 holds the baton and did not arrive. HINT: look for an endless loop"
    )
    threading.Timer(1.0, release.set).start()
    with pytest.raises(ESTHang, match=message):
        run(executor, est)


def test_one_est_needs_no_thread(make: Any) -> None:
    executor = make((4,))
    before = threading.active_count()
    assert run(executor, lambda r: (executor.meet(r, 0, "t", 5, total), threading.active_count())) == {4: (5, before)}
