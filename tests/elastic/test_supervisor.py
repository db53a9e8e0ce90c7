"""The supervisor with scripts that only pretend to train."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_easyscale.elastic import stage
from lightning_easyscale.elastic.console import say
from lightning_easyscale.elastic.control import JobError, JobFolder
from lightning_easyscale.elastic.group import Devices
from lightning_easyscale.elastic.notice import STOPPED
from lightning_easyscale.elastic.supervisor import Supervisor

STUB = str(Path(__file__).with_name("stub.py"))
LONG = 100_000  # steps: the test ends the job
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stubs do not end by themselves when another one is lost."""
    monkeypatch.setattr(stage, "_SETTLE", 0.3)


class Job:
    """A supervised stub.

    Args:
        path: the job's folder.
        steps: steps of the job.
        faults: of the stub.
        options: of the supervisor.
    """

    def __init__(self, path: Path, steps: int, *faults: str, devices: str = "2", **options: Any) -> None:
        self.folder = JobFolder(path)
        self.lines: list[str] = []
        command = [sys.executable, STUB, str(steps), *faults]
        self.supervisor = Supervisor(
            self.folder, command, Devices.parse(devices), **{"grace": 20.0, "tell": self.lines.append, **options}
        )

    def run(self, *script: Callable[[Job], None]) -> int:
        """Run the job while `script` goes on in another thread; returns the exit code."""
        errors: list[BaseException] = []

        def play() -> None:
            try:
                for act in script:
                    act(self)
            except BaseException as error:
                errors.append(error)
                os.kill(os.getpid(), signal.SIGTERM)

        player = threading.Thread(target=play)
        player.start()
        code = self.supervisor.run()
        player.join(10)
        if errors:
            raise errors[0]
        return code

    def status(self) -> dict[str, Any]:
        return self.folder.request("status")

    def starts(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in (self.folder.path / "starts.jsonl").read_text().splitlines()]

    def sizes(self) -> list[int]:
        """Executors of each stage."""
        return [int(start["WORLD_SIZE"]) for start in self.starts() if start["RANK"] == "0"]

    def said(self, text: str) -> bool:
        return any(text in line for line in self.lines)


def trained(stage: int, steps: int = 1) -> Callable[[Job], None]:
    """Wait until stage number `stage` (from 1) has done some steps."""

    def wait(job: Job) -> None:
        seen = None
        while True:
            time.sleep(0.01)
            try:
                now = job.status()
            except JobError:
                continue
            if now["stages"] == stage and now["state"] == "training":
                seen = now["step"] if seen is None else seen
                if now["step"] >= seen + steps:
                    return

    return wait


def resize(devices: str) -> Callable[[Job], None]:
    return lambda job: job.folder.request("resize", devices=devices) and None


def refused(devices: str, reason: str) -> Callable[[Job], None]:
    def check(job: Job) -> None:
        with pytest.raises(JobError, match=reason):
            job.folder.request("resize", devices=devices)

    return check


def stop(job: Job) -> None:
    job.folder.request("stop")


def kill(executor: int, number: int) -> Callable[[Job], None]:
    return lambda job: os.kill(job.status()["executors"][executor], number)


def me(number: int) -> Callable[[Job], None]:
    return lambda job: os.kill(os.getpid(), number)


def test_a_job_runs_to_its_end(tmp_path: Path) -> None:
    job = Job(tmp_path, 3, num_ests=4)
    assert job.run() == 0
    assert job.sizes() == [2]
    assert {start["EASYSCALE_NUM_ESTS"] for start in job.starts()} == {"4"}
    assert job.folder.read_state()["state"] == "finished"
    with pytest.raises(JobError, match="has finished"):
        job.folder.request("resize", devices="1")


@pytest.mark.fault("a full disk under the supervisor, nobody at its output")
def test_a_state_that_cannot_be_written_and_output_that_nobody_reads_do_not_end_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on to its end."""

    def full(**_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    job = Job(tmp_path, 3)
    monkeypatch.setattr(job.folder, "write_state", full)
    assert job.run() == 0
    assert job.said("the job's state cannot be written: [Errno 28] No space left on device")
    monkeypatch.setattr(sys, "stderr", Closed())
    say("nobody reads this")


def test_devices_change_while_it_runs_and_a_stop_can_be_continued(tmp_path: Path) -> None:
    job = Job(tmp_path, LONG)
    assert job.run(trained(1, 3), resize("4"), trained(2), resize("1"), trained(3), stop) == STOPPED
    assert job.sizes() == [2, 4, 1]
    step = int(job.folder.newest_checkpoint().removesuffix(".ckpt"))
    again = Job(tmp_path, step + 3)
    assert again.run() == 0
    assert again.said(f"from {step}.ckpt")


@pytest.mark.emulation
def test_typed_devices_start_with_their_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASYSCALE_EMULATE", "1")
    job = Job(tmp_path, LONG)
    assert job.run(trained(1), resize("v100:1,t4:2"), trained(2), stop) == STOPPED
    typed = {start["RANK"]: start for start in job.starts() if start["WORLD_SIZE"] == "3"}
    assert {start["EASYSCALE_DEVICES"] for start in typed.values()} == {"v100,t4,t4"}
    assert [typed[rank]["ATEN_CPU_CAPABILITY"] for rank in "012"] == [None, "default", "default"]
    assert job.starts()[0]["EASYSCALE_DEVICES"] is None
    assert job.said("2 devices -> 1 v100 + 2 t4")


@pytest.mark.fault("resize beyond N, to no device, to an unknown type, to the same, and during a resize")
def test_what_cannot_be_resized_is_refused_and_training_goes_on(tmp_path: Path) -> None:
    """One error each with reason and cure; the job goes on on the devices it had."""
    script = [
        refused("9", "9 devices for 4 ESTs"),
        refused("2", "runs on 2 devices already"),
        refused("z900:1", "`z900` is not on this machine"),
        refused("0", "names no device"),
        refused("v100:x", "the count 'x'"),
        resize("1"),
        refused("3", "on its way to 1 device already"),
        trained(2),
        stop,
    ]
    job = Job(tmp_path, LONG)
    assert job.run(trained(1), *script) == STOPPED
    assert job.sizes() == [2, 1]


@pytest.mark.fault("SIGKILL to executor 1 under the supervisor")
def test_a_killed_executor_is_started_again_from_the_newest_checkpoint(tmp_path: Path) -> None:
    """The others end, and all start again from the newest checkpoint."""
    job = Job(tmp_path, LONG)
    assert job.run(trained(1), kill(1, signal.SIGKILL), trained(2), resize("1"), trained(3), stop) == STOPPED
    assert job.sizes() == [2, 2, 1]
    assert job.said("executor 1 was killed by SIGKILL")
    assert job.said("from the beginning")


@pytest.mark.fault("SIGTERM to executors from outside the supervisor")
def test_an_executor_that_gets_sigterm_from_elsewhere_saves_and_starts_again(tmp_path: Path) -> None:
    """They save, and start again on as many devices."""
    job = Job(tmp_path, LONG)

    def everyone(job: Job) -> None:  # the real strategy tells the others itself
        for pid in job.status()["executors"]:
            os.kill(pid, signal.SIGTERM)

    assert job.run(trained(1), everyone, trained(2), stop) == STOPPED
    assert job.said("an executor was told to end")
    assert job.sizes() == [2, 2]


@pytest.mark.fault("SIGKILL to executor 0 while it saves for a resize")
def test_an_executor_killed_while_it_saves_costs_no_more_than_the_steps_since_the_last_checkpoint(
    tmp_path: Path,
) -> None:
    """The job starts on the new devices from the checkpoint before."""
    job = Job(tmp_path, LONG, "0:3:die")
    assert job.run(trained(1, 3), resize("1"), trained(2), stop) == STOPPED
    assert job.said("ended without a new checkpoint")
    assert job.sizes() == [2, 1]


@pytest.mark.fault("an exception that comes again at its step")
def test_an_error_that_comes_again_at_the_same_step_ends_the_job_with_that_error(tmp_path: Path) -> None:
    """One second chance; then the job fails with that exception, its EST and its exit code."""
    job = Job(tmp_path, LONG, "1:5:raise:9")
    assert job.run() == 1
    assert job.said("executor 1, EST 2, failed after step 5")
    assert job.said("ZeroDivisionError: on purpose")
    assert job.sizes() == [2, 2]
    assert job.folder.read_state()["state"] == "failed"


def test_an_error_that_does_not_come_again_is_survived(tmp_path: Path) -> None:
    job = Job(tmp_path, 12, "0:5:exit")
    assert job.run() == 0
    assert job.said("executor 0 failed after step 5: exit code 3")
    assert job.sizes() == [2, 2]


def test_an_error_before_the_first_step_ends_the_job_at_once(tmp_path: Path) -> None:
    job = Job(tmp_path, LONG, devices="5")
    assert job.run() == 1
    assert job.sizes() == [5]
    assert job.said("before its first step")


@pytest.mark.fault("resize to devices on which nothing runs")
def test_devices_that_do_not_work_are_given_up_for_the_ones_that_did(tmp_path: Path) -> None:
    """The job goes back to the devices before."""
    job = Job(tmp_path, LONG)
    job.supervisor.num_ests = None
    script: list[Callable[[Job], None]] = [trained(1), lambda job: setattr(job.supervisor, "num_ests", None)]
    assert job.run(*script, resize("8"), trained(3), stop) == STOPPED
    assert job.sizes() == [2, 8, 2]
    assert job.said("nothing has run on 8 devices; going back to 2 devices")


@pytest.mark.fault("SIGKILL at every start")
def test_crashes_without_progress_cost_devices_and_then_end_the_job(tmp_path: Path) -> None:
    """The device is left out, then the job fails; no endless restarts."""
    job = Job(tmp_path, LONG, "0:1:kill:9", devices="3", max_restarts=3)
    assert job.run() == 128 + signal.SIGKILL
    assert job.sizes() == [3, 3, 2, 1]
    assert job.said("3 restarts in a row have made no progress")


def test_an_error_after_training_does_not_train_again(tmp_path: Path) -> None:
    job = Job(tmp_path, 3, "0:3:after")
    assert job.run() == 1
    assert job.sizes() == [2]
    assert job.said("training had ended")


def test_after_training_nothing_is_moved_or_stopped(tmp_path: Path) -> None:
    job = Job(tmp_path, 30, "0:30:linger")

    def until_trained(job: Job) -> None:
        while job.status()["state"] != "ending":
            time.sleep(0.01)

    script = [trained(1), until_trained, refused("1", "training has ended: it takes no other devices"), stop]
    assert job.run(*script) == 0
    assert job.sizes() == [2]
    assert job.said("left to end by itself")


def test_sigterm_to_the_supervisor_saves(tmp_path: Path) -> None:
    job = Job(tmp_path, LONG)
    assert job.run(trained(1), me(signal.SIGTERM)) == STOPPED
    assert job.folder.newest_checkpoint() is not None


@pytest.mark.fault("second SIGINT to the supervisor")
def test_a_second_ctrl_c_is_immediate(tmp_path: Path) -> None:
    """It ends everything at once with code 130."""
    job = Job(tmp_path, LONG, "0:1:hang")
    began = time.monotonic()
    assert job.run(trained(1), me(signal.SIGINT), lambda _: time.sleep(0.3), me(signal.SIGINT)) == 130
    assert time.monotonic() - began < 15
    assert job.folder.newest_checkpoint() is None


@pytest.mark.fault("an executor that hangs on SIGTERM")
def test_an_executor_that_does_not_end_in_time_is_killed(tmp_path: Path) -> None:
    """It is killed after the grace period, and the resize goes on."""
    job = Job(tmp_path, LONG, "0:1:hang", grace=0.5)
    assert job.run(trained(1), resize("1"), trained(2), stop) == STOPPED
    assert job.said("executors [0] have not ended in time")


def test_a_checkpoint_that_is_removed_while_it_is_looked_at_is_not_the_newest(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    assert folder.newest_checkpoint() is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "gone.ckpt").symlink_to(tmp_path / "nothing")  # listed, and not there any more
    assert folder.newest_checkpoint() is None
    (tmp_path / "checkpoints" / "kept.ckpt").touch()
    assert folder.newest_checkpoint() == "kept.ckpt"


def test_two_supervisors_do_not_share_a_folder(tmp_path: Path) -> None:
    job = Job(tmp_path, LONG)

    def second(_: Job) -> None:
        running = pytest.raises(JobError, match=rf"\(pid {os.getpid()}\) runs the job")
        with running, JobFolder(tmp_path).locked():
            pass

    assert job.run(trained(1), second, stop) == STOPPED


@pytest.mark.fault("SIGKILL to the supervisor")
def test_what_a_killed_supervisor_leaves_is_recognised(tmp_path: Path) -> None:
    """Commands say so, and the same run command continues the job."""
    folder = JobFolder(tmp_path / "job")
    with pytest.raises(JobError, match="there is no job in"):
        folder.request("status")
    with folder.locked(), folder.listening():
        folder.write_state(state="running")
        os.rename(tmp_path / "job" / "supervisor.sock", tmp_path / "kept")
    os.rename(tmp_path / "kept", tmp_path / "job" / "supervisor.sock")
    with pytest.raises(JobError, match="its supervisor was killed. HINT: the same `run`"):
        folder.request("resize", devices="1")
    job = Job(tmp_path / "job", 3)
    assert job.run() == 0


def test_a_folder_with_a_long_name(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 120) / "job"
    job = Job(deep, LONG)
    assert job.run(trained(1), stop) == STOPPED
