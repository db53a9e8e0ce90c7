"""Snapshots are files as `torch.save` makes them, written by a process that leaves nothing behind."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from lightning_easyscale import checkpoint as ckpt
from lightning_easyscale.elastic.folder import CheckpointFolder
from lightning_easyscale.elastic.host_copy import HostCopy, HostMemory
from lightning_easyscale.elastic.snapshots import SnapshotWriter

from ..integration.harness import RunFailedError, Runs, compare
from .test_crash import JOB, at, check_tail

MESSAGES = "tests.integration.scenarios.buffers:buffers_job"


class Alone:
    """The folder of a job on one host."""

    def __init__(self, path: Path) -> None:
        self.folder = CheckpointFolder(path)
        self.commit = self.folder.commit

    def newest(self) -> Path:
        return self.folder.path / self.folder.names()[0]


def content(step: int = 1) -> dict[str, Any]:
    """A checkpoint with tensors of every kind."""
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).to(memory_format=torch.channels_last)
    tensors = {
        "scalar": torch.tensor(step),
        "empty": torch.empty(0, 3),
        "bool": torch.tensor([True, False]),
        "bfloat16": torch.randn(3, 5).to(torch.bfloat16),
        "complex": torch.randn(4, dtype=torch.complex64),
        "float8": torch.randn(4).to(torch.float8_e4m3fn),
        "transposed": torch.randn(3, 5).t(),
        "expanded": torch.ones(1, 4).expand(3, 4),
        "part": torch.arange(10)[3:7],
        "every other": torch.arange(10)[::2],
    }
    plain = {"ints": list(range(625)), "mixed": [1, 2.5, "x", None, True], "pair": (1, (2, torch.ones(2)))}
    return {"state_dict": module.state_dict(), "more": tensors, ckpt.KEY: {"format": ckpt.FORMAT, "plain": plain}}


@pytest.fixture
def writer() -> Iterator[SnapshotWriter]:
    made = SnapshotWriter()
    yield made
    made.close()


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        same = one.dtype == two.dtype and one.stride() == two.stride() and one.shape == two.shape
        return same and bytes(ckpt.row_major_bytes(one)) == bytes(ckpt.row_major_bytes(two))
    if isinstance(one, dict):
        return type(one) is type(two) and list(one) == list(two) and all(equal(one[k], two[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(equal, one, two))
    return bool(one == two)


@pytest.mark.parametrize("system", ["Linux", "another"])
def test_a_snapshot_is_what_torch_would_have_saved(
    writer: SnapshotWriter, tmp_path: Path, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same containers, values, types and strides, and the same digest; it loads with `weights_only` and `mmap`."""
    if system != "Linux":
        monkeypatch.delattr(os, "memfd_create")
    job, checkpoint = Alone(tmp_path / "job"), content()
    writer.submit(job, checkpoint, step=1, batch=1)  # type: ignore[arg-type]
    writer.wait()
    ckpt.seal(checkpoint)
    ckpt.save(checkpoint, tmp_path / "by_torch.ckpt")
    expected = torch.load(tmp_path / "by_torch.ckpt", weights_only=True)
    del expected["more"]["every other"], expected["more"]["expanded"]  # a copy leaves no gaps and repeats nothing
    for options in ({"weights_only": True}, {"weights_only": True, "mmap": True}, {"weights_only": False}):
        found = torch.load(job.newest(), **options)
        ckpt.verify(found, "x")
        assert torch.equal(found["more"].pop("every other"), torch.arange(10)[::2])
        assert torch.equal(found["more"].pop("expanded"), torch.ones(3, 4))
        assert equal(found, expected)
        assert found["state_dict"]._metadata == expected["state_dict"]._metadata
    assert ckpt._is_intact(job.newest())


def test_training_may_change_what_was_copied_and_memory_is_used_again(writer: SnapshotWriter, tmp_path: Path) -> None:
    job = Alone(tmp_path / "job")
    for step in range(3):
        checkpoint = content(step)
        writer.submit(job, checkpoint, step=step, batch=step)  # type: ignore[arg-type]
        checkpoint["more"]["scalar"].fill_(99)
        memory = writer._memory.descriptor
        writer.wait()
        assert ckpt.load(job.newest())["more"]["scalar"] == step
    assert writer._memory.descriptor == memory
    larger = {**content(3), "large": torch.ones(100_000)}
    writer.submit(job, larger, step=3, batch=3)  # type: ignore[arg-type]
    writer.wait()
    assert ckpt.load(job.newest())["large"].sum() == 100_000
    assert writer.written == 4


def test_the_writing_process_is_polite_small_and_ends_with_the_writer(writer: SnapshotWriter, tmp_path: Path) -> None:
    writer.submit(Alone(tmp_path / "job"), content(), step=1, batch=1)  # type: ignore[arg-type]
    writer.wait()
    assert writer._process is not None
    process = psutil.Process(writer._process.pid)
    assert process.nice() == os.nice(0) + 10
    assert process.memory_info().rss < 100e6
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        process.send_signal(number)  # a cluster's, to all processes
    time.sleep(0.1)
    assert process.status() != psutil.STATUS_ZOMBIE
    writer.close()
    assert not process.is_running()
    writer.submit(Alone(tmp_path / "job"), content(), step=2, batch=2)  # type: ignore[arg-type]
    writer.wait()
    assert writer.written == 2


@pytest.mark.timeout(30)
def test_the_writing_process_ends_although_a_loader_worker_has_its_connection(writer: SnapshotWriter) -> None:
    writer.start()
    assert writer._process is not None
    process = psutil.Process(writer._process.pid)
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    worker.start()
    try:
        writer.close()
        assert not process.is_running()
        assert worker.is_alive()
    finally:
        worker.kill()
        worker.join()


@pytest.mark.fault("writing a snapshot: SIGKILL to the process that writes it")
def test_a_killed_writing_process_costs_a_snapshot_and_a_warning(writer: SnapshotWriter, tmp_path: Path) -> None:
    """One warning, the older snapshot is still there, and the next one is written."""
    job = Alone(tmp_path / "job")
    writer.submit(job, content(1), step=1, batch=1)  # type: ignore[arg-type]
    writer.wait()
    assert writer._process is not None
    os.kill(writer._process.pid, signal.SIGKILL)
    writer.submit(job, content(2), step=2, batch=2)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"could not be written: the process that writes snapshots was ended\. Train"):
        writer.wait()
    assert [name[5:13] for name in job.folder.names()] == ["00000001"]
    writer.submit(job, content(3), step=3, batch=3)  # type: ignore[arg-type]
    writer.wait()
    assert ckpt.load(job.newest())["more"]["scalar"] == 3


KILLED_WHILE_WRITING = """
import os, pathlib, signal, sys, torch
from lightning_easyscale.elastic import snapshot_process
from tests.elastic.test_snapshots import Alone, SnapshotWriter, content
writer, job = SnapshotWriter(), Alone(pathlib.Path(sys.argv[1]))
writer.submit(job, content(1), step=1, batch=1)
writer.wait()
print(writer._process.pid, flush=True)
snapshot_process._receive = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
writer.submit(job, {**content(2), "large": torch.ones(50_000_000)}, step=2, batch=2)
writer.wait()
"""


@pytest.mark.fault("writing a snapshot: SIGKILL to the executor")
def test_of_a_killed_job_no_snapshot_appears_later(tmp_path: Path) -> None:
    """The process that was writing drops it and ends; the older snapshot is good, and nothing torn is left."""
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path)]
    job = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert job.returncode == -signal.SIGKILL, job.stderr
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(job.stdout)).wait(60)
    assert [path.name[:13] for path in tmp_path.iterdir()] == ["step=00000001"]


@pytest.mark.gpu
def test_a_copy_from_a_gpu_waits_for_nothing_and_is_of_its_moment() -> None:
    """The device's work before the call is in it, its work after the call is not, and this process goes on at once."""
    state = {"w": torch.zeros(1 << 24, device="cuda"), "small": [torch.zeros(3, device="cuda") for _ in range(100)]}
    memory = HostMemory()
    HostCopy(state, memory).wait()  # pins it
    busy = torch.randn(4096, 4096, device="cuda")
    for tensor in (state["w"], *state["small"]):
        tensor.add_(1)
    torch.cuda.synchronize()
    for _ in range(50):
        busy = busy @ busy
    for tensor in (state["w"], *state["small"]):
        tensor.add_(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        copied = HostCopy(state, memory)
        assert not torch.cuda.current_stream().query()
        for tensor in (state["w"], *state["small"]):
            tensor.add_(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = copied.wait()
    assert bool((found["w"] == 2).all())
    assert all(bool((tensor == 2).all()) for tensor in found["small"])
    del copied, found
    torch.cuda.synchronize()
    memory.free()


# -- the automatic interval --------------------------------------------------------------------------------------------
AUTOMATIC = {"max_epochs": 6, "pause": 0.02}


@pytest.mark.parametrize(
    ("fault", "placement"),
    [
        pytest.param(at(1, 18, "on_train_batch_start"), (3,), id="killed under automatic snapshots"),
        pytest.param(at(0, 18, "on_train_batch_start"), (2, 1), id="the one that chooses is killed"),
    ],
)
def test_a_crash_under_automatic_snapshots_costs_the_steps_since_the_newest(
    runs: Runs, fault: Any, placement: tuple[int, ...]
) -> None:
    """The first has come early; the job goes on from it on other executors with the bits of stock DDP."""
    reference = runs.reference(JOB, AUTOMATIC, 3)
    first, second = runs.lives(JOB, AUTOMATIC, [placement, (2, 1)], [fault], snapshot_every_n_steps="auto")
    assert all(first.errors), [error and error["message"] for error in first.errors]
    newest = max(first.left)
    assert 0 < int(newest[5:13]) <= 18
    check_tail(reference, second, again_from=int(newest[20:28]))
    assert f"checkpoints/{newest}`" in second.logs[0]
    assert "a snapshot costs training" in first.logs[0]


@pytest.mark.parametrize("placement", [(1, 1), (2, 1)])
def test_executors_agree_on_automatic_snapshots_without_a_message(
    runs: Runs, tmp_path: Path, placement: tuple[int, ...]
) -> None:
    """A step takes two messages as ever, but for the one in which a snapshot gathers the state of all ESTs."""
    config = {"n": sum(placement)}
    reference = runs.reference(MESSAGES, config, sum(placement))
    counts = {}
    for every in (None, "auto"):
        strategy = {"elastic_dir": str(tmp_path / str(every)), "snapshot_every_n_steps": every}
        got = runs.easyscale(MESSAGES, config, placement, strategy=strategy)
        if got.error is not None:
            raise RunFailedError(f"{got.error['traceback']}\n{got.error['log']}")
        compare(reference, got)
        counts[every] = [re.findall(r"messages per step: ([0-9 ]+)", log) for log in got.logs]
    for plain, automatic in zip(counts[None], counts["auto"], strict=True):
        steps = zip(" ".join(plain).split(), " ".join(automatic).split(), strict=True)
        more = [int(b) - int(a) for a, b in steps if a != b]
        assert 1 <= len(more) <= 4, (plain, automatic)  # on a slow machine a second passes more than once
        assert all(0 < m <= 2 for m in more), (plain, automatic)
