"""Whole hosts are lost: agent, processes and elastic folder. The bits are those of stock DDP that nothing disturbed."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_easyscale.compare import compare
from tests.elastic.agents import Cluster, cluster
from tests.launch.test_launch import ROOT, environment

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(1500)]
JOB = ("--num-ests", "3", "--epochs", "6", "--snapshots", "1")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stock DDP of three processes."""
    return stock(tmp_path_factory.mktemp("reference"), JOB)


def stock(out: Path, job: tuple[str, ...]) -> Path:
    command = [sys.executable, "-m", "tests.elastic.script", "--out", str(out), "--reference", *job]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return out


def check(job: Cluster, reference: Path) -> None:
    difference = compare(job.out / "record", reference / "record")
    assert difference is None, str(difference)
    assert job.result() == json.loads((reference / "result.json").read_text())


@pytest.mark.parametrize("namespaces", [False, True], ids=["loopback", "namespaces"])
@pytest.mark.fault("two hosts of torchrun, one after the other: SIGKILL to all processes, folder deleted")
def test_hosts_are_lost_one_after_another_with_their_folders(tmp_path: Path, reference: Path, namespaces: bool) -> None:
    """The first has written the snapshots, the second has copies, a third gets them when it joins."""
    with cluster(tmp_path, 3, namespaces=namespaces) as job:
        a, b, c = job.hosts
        job.start(a, "1:2", *JOB)
        job.start(b, "1:2", *JOB)
        a.wait_for("3 ESTs as 2 + 1 on 2 executors")
        b.wait_for_checkpoint()
        ignored = "torchrun has started 2 processes; `devices` (1) and `num_nodes` (1) of the Trainer are ignored"
        assert (a.text() + b.text()).count(ignored) == 1
        a.lose()
        b.wait_for("3 ESTs as 3 on 1 executors")
        b.wait_for("going on from")
        b.wait_for_checkpoint()
        job.start(c, "1:2", *JOB)
        b.wait_for("3 ESTs as 2 + 1 on 2 executors")
        c.wait_for_checkpoint()
        b.lose()
        c.wait_for("3 ESTs as 3 on 1 executors")
        c.wait_for_checkpoint()
        job.hurry.touch()
        assert c.ended() == 0, c.text()[-4000:]
        assert c.checkpoints() == []
        check(job, reference)


@pytest.mark.fault("a host of torchrun while another one is a spare: SIGKILL to all processes, folder deleted")
def test_a_spare_takes_the_place_of_a_lost_host(tmp_path: Path) -> None:
    """The spare gets the checkpoint and the ESTs of the host that is lost; bits of stock DDP."""
    two = ("--num-ests", "2", *JOB[2:])
    (tmp_path / "stock").mkdir()
    with cluster(tmp_path, 3) as job:
        a, b, c = job.hosts
        for host in (a, b, c):
            job.start(host, "2:3", *two)
        a.wait_for("1 of 3 processes wait as spares for 2 ESTs")
        b.wait_for_checkpoint()
        assert c.checkpoints() == []
        a.lose()
        b.wait_for("2 ESTs as 1 + 1 on 2 executors")
        c.wait_for_checkpoint()
        job.hurry.touch()
        assert [b.ended(), c.ended()] == [0, 0], b.text()[-4000:]
        check(job, stock(tmp_path / "stock", two))


@pytest.mark.fault("a host of torchrun, without copies: SIGKILL to all processes, folder deleted")
def test_without_copies_the_job_begins_again_and_has_the_same_bits(tmp_path: Path, reference: Path) -> None:
    """The job begins again, and all of it has the bits of stock DDP."""
    with cluster(tmp_path, 2) as job:
        a, b = job.hosts
        for host in (a, b):
            job.start(host, "1:2", *JOB, "--replicas", "0")
        a.wait_for_checkpoint()
        assert b.checkpoints() == []
        a.lose()
        b.wait_for("3 ESTs as 3 on 1 executors")
        job.hurry.touch()
        assert b.ended() == 0, b.text()[-4000:]
        assert "going on from" not in b.text()
        check(job, reference)


@pytest.mark.fault("a host of torchrun: SIGTERM to its agent, folder deleted")
def test_an_agent_that_leaves_costs_no_step_although_it_takes_the_checkpoint_with_it(
    tmp_path: Path, reference: Path
) -> None:
    """The other host goes on from the step of the stop; bits of stock DDP."""
    job_without_snapshots = JOB[:4]
    with cluster(tmp_path, 2) as job:
        a, b = job.hosts
        for host in (a, b):
            job.start(host, "1:2", *job_without_snapshots)
        a.wait_for("3 ESTs as 2 + 1 on 2 executors")
        job.wait_for_steps(2)
        assert a.agent is not None
        a.agent.send_signal(signal.SIGTERM)
        a.ended()
        shutil.rmtree(a.folder.parent)
        stopped = re.search(r"stopped by a signal after step (\d+); saved", a.text())
        assert stopped, a.text()[-4000:]
        b.wait_for(f"step={int(stopped[1]):08d}-batch={int(stopped[1]):08d}.ckpt`")
        job.hurry.touch()
        assert b.ended() == 0, b.text()[-4000:]
        check(job, reference)


@pytest.mark.fault("a torchrun agent: SIGKILL, its process lives on")
def test_an_agent_that_is_killed_alone_disturbs_nothing(tmp_path: Path, reference: Path) -> None:
    """Its processes go on and finish the job with the others."""
    with cluster(tmp_path, 2) as job:
        a, b = job.hosts
        for host in (a, b):
            job.start(host, "1:2", *JOB)
        b.wait_for_checkpoint()
        left = b.processes()
        b.kill(left[:1])
        try:
            a.wait_for_checkpoint()
            job.hurry.touch()
            # At the end an agent waits for the others, 300 s for one that is no more.
            assert a.ended(within=600) == 0, a.text()[-4000:]
        finally:
            b.kill(left[1:])
        check(job, reference)
