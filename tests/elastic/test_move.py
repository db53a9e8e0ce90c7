"""The supervisor changes devices in place, with scripts that only pretend to train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_easyscale.elastic import stage
from lightning_easyscale.elastic.notice import STOPPED
from tests.elastic.test_supervisor import LONG, Job, refused, resize, stop, trained

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stubs do not end by themselves when another one is lost."""
    monkeypatch.setattr(stage, "_SETTLE", 0.3)


class Pids:
    """Notes the processes that run."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, job: Job) -> None:
        self.seen.append(job.status()["executors"])


def test_survivors_keep_their_processes(tmp_path: Path) -> None:
    pids = Pids()
    job = Job(tmp_path, LONG, in_place=True)
    script: list[Any] = [trained(1), pids, resize("4"), trained(2), pids, resize("1"), trained(3), pids, stop]
    assert job.run(*script) == STOPPED
    two, four, one = pids.seen
    assert four[:2] == two
    assert one == four[:1]
    assert len(job.starts()) == 4
    assert job.said("2 newcomers start; training goes on until they are ready")


@pytest.mark.emulation
def test_who_gets_another_device_type_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASYSCALE_EMULATE", "1")
    pids = Pids()
    job = Job(tmp_path, LONG, devices="v100:2", in_place=True)
    assert job.run(trained(1), pids, resize("v100:1,t4:2"), trained(2), pids, stop) == STOPPED
    before, after = pids.seen
    assert after[0] == before[0]
    assert before[1] not in after
    assert [start["ATEN_CPU_CAPABILITY"] for start in job.starts()] == [None, None, "default", "default"]


@pytest.mark.fault("resize in place: a newcomer fails")
def test_a_newcomer_that_fails_changes_nothing(tmp_path: Path) -> None:
    """Training goes on in the processes and on the devices it had."""
    pids = Pids()
    job = Job(tmp_path, LONG, "2:0:refuse", in_place=True)
    assert job.run(trained(1), pids, resize("3"), trained(1, 30), pids, resize("1"), trained(2), stop) == STOPPED
    assert pids.seen[0] == pids.seen[1]
    assert job.said("a newcomer has failed with exit code 4; training goes on on 2 devices")


@pytest.mark.fault("resize in place: a survivor ends")
def test_when_a_survivor_ends_instead_the_job_is_launched_again(tmp_path: Path) -> None:
    """The job is launched again from the checkpoint on the new devices."""
    job = Job(tmp_path, LONG, "1:0:desert", in_place=True)
    assert job.run(trained(1), resize("3"), trained(2), stop) == STOPPED
    assert [start["WORLD_SIZE"] for start in job.starts()] == ["2", "2", "3", "3", "3", "3"]


@pytest.mark.fault("resize during a resize in place; stop during it")
def test_no_second_move_and_a_stop_ends_the_first(tmp_path: Path) -> None:
    """The second resize is refused with the reason; the stop saves."""
    job = Job(tmp_path, LONG, in_place=True)
    assert job.run(trained(1), resize("4"), refused("3", "on its way to 4 devices already"), stop) == STOPPED
