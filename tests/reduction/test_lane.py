"""The lane: order of jobs, errors, reuse after close."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist

from lightning_easyscale.reduction.lane import Lane

from .pool import Pool


def lane_in_a_group(group: dist.ProcessGroup, rank: int) -> list[object]:
    lane, ran = Lane(group), []
    release = threading.Event()

    before = threading.enumerate()  # of other tests in this warm process

    def job(number: int) -> torch.Tensor:
        release.wait(10)
        ran.append((number, threading.current_thread() is threading.main_thread()))
        return torch.tensor([number])

    def failing() -> torch.Tensor:
        raise ConnectionError("the peer is gone")

    first = lane.submit(lambda: job(1), [torch.zeros(())])
    broken = lane.submit(failing, [torch.zeros(())])
    second = lane.submit(lambda: job(2), [torch.zeros(())])
    submitted_without_waiting = not ran
    release.set()
    values = [int(second.wait()), int(first.wait()), int(first.wait())]
    with pytest.raises(ConnectionError, match="the peer is gone"):
        broken.wait()
    lane.close()
    threads = [t.name for t in threading.enumerate() if t.name == "easyscale-reduction" and t not in before]
    again = int(lane.submit(lambda: job(3), [torch.zeros(())]).future().wait())
    lane.close()
    return [submitted_without_waiting, values, ran, threads, again]


def test_jobs_run_in_order_beside_the_caller_and_errors_reach_the_waiter(pool: Pool) -> None:
    answer = [True, [2, 1, 1], [(1, False), (2, False), (3, False)], [], 3]
    assert pool.run(2, lane_in_a_group) == [answer] * 2


def test_without_other_executors_a_job_runs_at_once() -> None:
    ran = []
    pending = Lane(None).submit(lambda: ran.append(1) or torch.ones(1), [torch.zeros(())])
    assert ran == [1]
    assert torch.equal(pending.wait(), torch.ones(1))
