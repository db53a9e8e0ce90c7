"""What a job finds in its way: one clear error each, training goes on where it can, and nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_easyscale import EasyScaleStrategy
from lightning_easyscale import checkpoint as ckpt
from lightning_easyscale.checkpoint import CheckpointError
from lightning_easyscale.runtime.peers import connect
from tests.folders import contents
from tests.launch.job import Classifier, loader, make_trainer, state_digest
from tests.ports import free_port

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
N = 2
LAST = 12  # steps of the job


class At(Callback):
    """Does something once, when a step is done."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act = step, act

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == 0:
            self.step = -1
            self.act()


class Crashed(Exception):
    pass


def crash() -> None:
    raise Crashed


def run(folder: Path | None, *callbacks: Callback, num_ests: int = N, every: int | None = 2, **options: Any) -> str:
    """The job from wherever its folder is; its last state."""
    pl.seed_everything(5, verbose=False)
    more = {"elastic_dir": folder, "snapshot_every_n_steps": every} if folder is not None else {}
    strategy = EasyScaleStrategy(num_ests=num_ests, **more)
    root = folder.parent if folder is not None else None
    trainer = make_trainer(root, strategy=strategy, callbacks=[Wait(), *callbacks], **options)
    trainer.fit(Classifier(), loader(), loader(shuffle=False))
    assert trainer.global_step == LAST
    return state_digest(trainer)


class Wait(Callback):
    """Lets every snapshot be written before the next is due."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        thread = trainer.strategy.session.snapshots._thread  # type: ignore[attr-defined]
        if thread is not None:
            thread.join()


@pytest.fixture(scope="module")
def whole() -> str:
    """The state at the end of a run that nothing disturbed."""
    return run(None)


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a crash after step 9 has left: snapshots of steps 6 and 8."""
    folder = tmp_path_factory.mktemp("crashed") / "job"
    with pytest.raises(Crashed):
        run(folder, At(9, crash))
    return folder


@pytest.fixture
def job(crashed: Path, tmp_path: Path) -> Path:
    shutil.copytree(crashed, tmp_path / "job")
    return tmp_path / "job"


def snapshots(job: Path) -> list[Path]:
    return sorted((job / "checkpoints").glob("*.ckpt"))


# -- checkpoints that are not what they seem ---------------------------------------------------------------------------
def half_written(path: Path) -> None:
    torn = path.with_name(f".{path.name}.x1.tmp")
    torn.write_bytes(path.read_bytes()[:2000])
    path.unlink()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def bit_flipped(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def of_stock_lightning(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint[ckpt.KEY]
    torch.save(checkpoint, path)


def no_checkpoint(path: Path) -> None:
    torch.save([1, 2, 3], path)


DAMAGES = [half_written, truncated, bit_flipped, empty, of_stock_lightning, no_checkpoint]


@pytest.mark.parametrize("damage", [pytest.param(d, id=d.__name__.replace("_", " ")) for d in DAMAGES])
@pytest.mark.fault("the newest checkpoint in the folder")
def test_a_checkpoint_that_cannot_be_used_is_passed_over(job: Path, whole: str, damage: Any, recwarn: Any) -> None:
    """One warning names it, the job goes on from the one before, and the rest has the bits it should."""
    newest = snapshots(job)[-1]
    damage(newest)
    again: list[int] = []
    assert run(job, At(7, lambda: again.append(7))) == whole
    assert again == [7]
    said = [str(w.message) for w in recwarn if "cannot be used" in str(w.message)]
    assert len(said) == (0 if damage is half_written else 1), said
    assert all(f"`{newest}` cannot be used: " in line for line in said)
    assert contents(job / "checkpoints").keys() <= {".identity"}, "something is left when training has ended"


@pytest.mark.fault("all checkpoints in the folder")
def test_where_no_checkpoint_can_be_used_the_job_begins_again(job: Path, whole: str) -> None:
    """Each is named in a warning, and all of the job has the bits it should."""
    for path in snapshots(job):
        truncated(path)
    with pytest.warns(UserWarning, match="cannot be used"):
        assert run(job) == whole


@pytest.mark.fault("a folder of another job")
def test_another_job_does_not_go_on_from_the_folder(job: Path) -> None:
    """One error names what differs and the cure; the folder stays as it is."""
    before = contents(job)
    with pytest.raises(CheckpointError, match=r"trained with `num_ests=2`, this job has `num_ests=3`. HINT: "):
        run(job, num_ests=3)
    assert contents(job) == before


# -- disks -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with room for a few checkpoints."""
    yield from mounted(tmp_path / "disk", "size=512k")


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path / "disk", "ro")


def mounted(path: Path, options: str) -> Iterator[Path]:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"file systems cannot be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def fill(disk: Path) -> None:
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.fault("snapshots after step 5: the disk is full")
def test_a_full_disk_costs_snapshots_and_not_the_run(small_disk: Path, whole: str) -> None:
    """One warning says so, training goes on to its end, and the older snapshots are still good."""
    job = small_disk / "job"
    kept: list[list[str]] = []
    with pytest.warns(UserWarning, match=r"a snapshot could not be written: .*No space left.* Training goes on"):
        state = run(job, At(5, lambda: fill(small_disk)), At(11, lambda: kept.append([p.name for p in snapshots(job)])))
    assert state == whole
    assert [[name[5:13] for name in names] for names in kept] == [["00000002", "00000004"]]


@pytest.mark.fault("a stop after step 5: the disk is full")
def test_a_stop_on_a_full_disk_is_one_error_and_keeps_the_older_snapshots(small_disk: Path, whole: str) -> None:
    """The error is the disk's; with room again, the job goes on from the newest snapshot to the bits it should have."""
    job = small_disk / "job"

    def stop() -> None:
        fill(small_disk)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(OSError, match="No space left on device"):
        run(job, At(5, stop))
    assert [path.name[5:13] for path in snapshots(job)] == ["00000002", "00000004"]
    assert not list((job / "checkpoints").glob(".*.tmp"))
    (small_disk / "filler").unlink()
    assert run(job) == whole


@pytest.mark.fault("start-up: the folder is read-only")
def test_a_read_only_folder_is_one_error_at_the_start(read_only_disk: Path) -> None:
    """The error names the folder and the cure, before a step is done."""
    begun: list[int] = []
    expected = rf"checkpoints cannot be written: `{read_only_disk}/job.* HINT: choose a folder"
    with pytest.raises(OSError, match=expected):
        run(read_only_disk / "job", At(1, lambda: begun.append(1)))
    assert begun == []


@pytest.mark.fault("snapshots after step 5: the folder is read-only")
def test_a_folder_that_becomes_read_only_costs_snapshots_and_not_the_run(small_disk: Path, whole: str) -> None:
    """One warning says so, and training goes on to its end."""

    def protect(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk)], check=True)

    with pytest.warns(UserWarning, match=r"a snapshot could not be written: .*Read-only.* Training goes on"):
        state = run(small_disk / "job", At(5, lambda: protect("ro")), At(11, lambda: protect("rw")))
    assert state == whole


# -- devices and peers -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("devices", [3, 5])
@pytest.mark.fault("start-up: more devices than ESTs")
def test_more_devices_than_ests_are_refused(job: Path, devices: int) -> None:
    """One error names both numbers and the cure; the folder stays as it is."""
    before = contents(job)
    with pytest.raises(ValueError, match=rf"`num_ests=2` cannot run on {devices} devices: .* HINT: set `devices<=2`"):
        run(job, devices=devices)
    assert contents(job) == before


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.fault("start-up: another executor does not come")
def test_a_peer_that_cannot_be_reached_is_one_error(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says who waited for whom, where and for how long, and where to look."""
    port = str(free_port())
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    expected = rf"executor {index} of 2 waited 1 s for the others at 127\.0\.0\.1:{port} in vain: .* HINT: "
    with pytest.raises(RuntimeError, match=expected):
        connect(index, 2, backend="gloo", timeout=timedelta(seconds=1))
