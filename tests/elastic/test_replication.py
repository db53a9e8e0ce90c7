"""Hosts with folders of their own: what one of them loses, the others have."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_easyscale import checkpoint as ckpt
from lightning_easyscale.elastic import folder as folders
from lightning_easyscale.elastic import transfer
from lightning_easyscale.elastic.folder import CheckpointFolder
from lightning_easyscale.elastic.replication import ReplicaError, Replication
from lightning_easyscale.elastic.transfer import Address, Receiver, send

NAMES = [f"step={step:08d}-batch={step:08d}.ckpt" for step in range(9)]


class Threads:
    """The executors of a job as threads, seen from one of them."""

    def __init__(self, index: int, size: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.index, self.size, self._board, self._barrier = index, size, board, barrier

    def all_gather_object(self, obj: Any) -> list[Any]:
        self._board[self.index] = obj
        self._barrier.wait()
        gathered = list(self._board)
        self._barrier.wait()
        return gathered

    def agree(self, tag: str) -> None:
        assert set(self.all_gather_object(tag)) == {tag}


class Job:
    """Executors, each with its folder, from one start to its end.

    Args:
        folders: one per executor; executors of one host share theirs.
        replicas: copies on other hosts.
    """

    def __init__(self, *folders: Path, replicas: int = 1) -> None:
        board, barrier = [None] * len(folders), threading.Barrier(len(folders), timeout=20)
        self.said: list[str] = []
        self.found: list[Any] = [None] * len(folders)
        self.executors = [
            Replication(CheckpointFolder(folder), Threads(i, len(folders), board, barrier), replicas=replicas)  # type: ignore[arg-type]
            for i, folder in enumerate(folders)
        ]

    def __enter__(self) -> Job:
        def begin(i: int) -> None:
            report = self.said.append if i == 0 else lambda _: None
            self.found[i] = self.executors[i].open(lambda entry: entry["boundary"]["loggers"], report)

        try:
            self.everyone(begin)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for executor in self.executors:
            executor.close()

    def everyone(self, act: Callable[[int], None]) -> None:
        errors: list[BaseException] = []

        def play(index: int) -> None:
            try:
                act(index)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=play, args=[i]) for i in range(len(self.executors))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            assert len({str(error) for error in errors}) == 1, errors
            assert len(errors) == len(self.executors), "some executors go on alone"
            raise errors[0]

    def commit(self, step: int) -> Path:
        return self.executors[0].commit(content(step), step=step, batch=step)


def content(step: int) -> dict[str, Any]:
    boundary = {"loggers": [{"step": step}]}
    return {"state_dict": {"w": torch.full((40_000,), float(step))}, ckpt.KEY: {"boundary": boundary}}


def held(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".ckpt", ".tmp"))


def good(folder: Path, step: int) -> bool:
    return bool(ckpt.load(folder / NAMES[step])["state_dict"]["w"][0] == step)


@pytest.fixture
def hosts(tmp_path: Path) -> list[Path]:
    return [tmp_path / name / "checkpoints" for name in "abcd"]


def test_a_job_survives_the_loss_of_the_host_that_wrote(hosts: list[Path]) -> None:
    a, b, c, _ = hosts
    with Job(a, b, c) as job:
        assert job.found == [None] * 3
        for step in (2, 4, 6):
            job.commit(step)
    assert held(a) == held(b) == [NAMES[4], NAMES[6]]
    assert held(c) == [], "one copy was wanted"
    shutil.rmtree(a.parent)
    with Job(c, b) as job:  # another executor is the first now, and its host lacks the checkpoint
        assert job.found == [(c / NAMES[6], [{"step": 6}]), (b / NAMES[6], [{"step": 6}])]
        assert good(c, 6)
        job.commit(8)
    assert held(b) == [NAMES[6], NAMES[8]]


def test_without_copies_the_loss_of_that_host_is_the_loss_of_the_job(hosts: list[Path]) -> None:
    a, b, *_ = hosts
    with Job(a, b, replicas=0) as job:
        job.commit(2)
    shutil.rmtree(a.parent)
    with Job(b) as job:
        assert job.found == [None]


def test_executors_that_share_a_folder_send_nothing(hosts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_easyscale.elastic.replication.Receiver", None)
    a, link = hosts[0], hosts[1]
    a.mkdir(parents=True)
    link.parent.mkdir()
    link.symlink_to(a)
    with Job(a, a, link) as job:
        job.commit(2)
    with Job(link, a) as job:
        assert [path for path, _ in job.found] == [link / NAMES[2], a / NAMES[2]]


def test_a_copied_folder_is_another_folder(hosts: list[Path]) -> None:
    a, b, *_ = hosts
    with Job(a) as job:
        job.commit(2)
    shutil.copytree(a, b)
    (b / NAMES[2]).unlink()
    with Job(b, a):
        assert good(b, 2)


@pytest.mark.fault("newest snapshots damaged on one host and gone on the other")
def test_the_newest_that_is_good_anywhere_replaces_damaged_ones(hosts: list[Path]) -> None:
    """The newest that is good on any host is used by all."""
    a, b, *_ = hosts
    with Job(a, b) as job:
        for step in (2, 4, 6):
            job.commit(step)
    (a / NAMES[6]).write_bytes((a / NAMES[6]).read_bytes()[:-100])
    (b / NAMES[6]).unlink()
    (a / NAMES[4]).write_bytes(b"")
    with Job(a, b) as job:
        assert job.found == [(a / NAMES[4], [{"step": 4}]), (b / NAMES[4], [{"step": 4}])]
        assert good(a, 4)
        assert len(job.said) == 2, job.said
        assert f"`{a / NAMES[6]}` cannot be used: " in job.said[0]
        job.commit(5)
        good_ones = {NAMES[4], NAMES[5]}
        assert good_ones <= {*held(a)}, "what cannot be used has crowded out what can"


@pytest.mark.fault("copying a snapshot: the other host cannot be reached")
def test_a_host_that_cannot_be_reached_costs_a_warning_and_another_one_gets_the_copy(hosts: list[Path]) -> None:
    """Another host gets it; without one, one warning, and the snapshot is committed here."""
    a, b, c, _ = hosts
    with Job(a, b, c) as job:
        job.executors[1].close()
        job.commit(2)
        assert held(b) == []
        assert held(a) == held(c) == [NAMES[2]]
        job.executors[2].close()
        with pytest.raises(
            ReplicaError, match=r"has 0 copies .*executor 2: .*cannot be reached.*executor 1: "
        ) as error:
            job.commit(4)
    assert error.value.path == a / NAMES[4]
    assert good(a, 4)


@pytest.mark.fault("copying a snapshot: the other host has no room")
def test_a_full_disk_of_the_other_host_is_told_and_leaves_what_it_had(
    hosts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One warning with its reason; what it had is still there."""
    a, b, *_ = hosts
    with Job(a, b) as job:
        job.commit(2)
        commit = folders.commit

        def full(path: Path, write: Any) -> None:
            if b in Path(path).parents:
                raise OSError(28, "No space left on device")
            commit(path, write)

        monkeypatch.setattr(folders, "commit", full)
        with pytest.raises(ReplicaError, match=r"executor 1: \[Errno 28\] No space left on device"):
            job.commit(4)
    assert held(b) == [NAMES[2]]


def test_a_folder_that_cannot_be_used_is_the_same_error_everywhere(hosts: list[Path]) -> None:
    a, b, *_ = hosts
    b.parent.mkdir()
    b.touch()
    with (
        pytest.raises(OSError, match=r"executor 1: the elastic folder cannot be used: .*/b/.* HINT: choose"),
        Job(a, b),
    ):
        pass


@pytest.mark.fault("start-up: a host has no room for the checkpoint that it lacks")
def test_a_host_that_cannot_take_what_it_needs_is_one_error_everywhere(
    hosts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error on all executors."""
    a, b, *_ = hosts
    with Job(a) as job:
        job.commit(2)
    monkeypatch.setattr(CheckpointFolder, "take", lambda *_: exec("raise OSError(28, 'No space left on device')"))
    with pytest.raises(OSError, match=r"from executor 1 to executor 0, which lacks it: .*No space.* HINT: "), Job(b, a):
        pass


def test_when_training_has_ended_all_folders_are_emptied(hosts: list[Path]) -> None:
    a, b, *_ = hosts
    with Job(a, b) as job:
        job.commit(2)
        job.everyone(lambda i: job.executors[i].clear())
    assert held(a) == held(b) == []


# -- the transfer ----------------------------------------------------------------------------------------------------
@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "from" / NAMES[1]
    path.parent.mkdir()
    path.write_bytes(os.urandom(3_000_000))
    return path


def test_nobody_writes_who_does_not_know_the_secret_or_the_names(tmp_path: Path, file: Path) -> None:
    folder = CheckpointFolder(tmp_path / "to")
    receiver = Receiver(folder.take)
    try:
        known = receiver.address
        with pytest.raises(OSError, match="cannot be reached"):
            send(file, Address(known.hosts, known.port, "guessed"))
        with pytest.raises(OSError, match="`passwd` is not the name of a checkpoint"):
            send(file.rename(file.with_name("passwd")), known)
        assert folder.names() == []
    finally:
        receiver.close()


def test_the_address_that_leads_to_the_receiver_is_found(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_CONNECT_SECONDS", 0.2)
    receiver = Receiver(CheckpointFolder(tmp_path / "to").take)
    try:
        known = receiver.address
        send(file, Address(("192.0.2.1", "no.such.host.invalid", *known.hosts), known.port, known.secret))
    finally:
        receiver.close()
    assert (tmp_path / "to" / file.name).read_bytes() == file.read_bytes()


def test_a_receiver_that_closes_does_not_wait_for_a_file_that_is_on_its_way(tmp_path: Path, file: Path) -> None:
    receiver = Receiver(CheckpointFolder(tmp_path / "to").take)
    with transfer._connect(receiver.address, file.name, file.stat().st_size) as connection:
        connection.sendall(b"the first of it")
        began = time.monotonic()
        receiver.close()
        assert time.monotonic() - began < 10
    assert held(tmp_path / "to") == []


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[: len(raw) // 2], lambda raw: raw[:-1] + b"?"], ids=["torn", "flip"]
)
@pytest.mark.fault("copying a snapshot: the connection breaks, a bit flips")
def test_what_arrives_torn_or_changed_is_not_kept(tmp_path: Path, file: Path, damage: Any) -> None:
    """The sender is told, and nothing is kept."""
    receiver = Receiver(CheckpointFolder(tmp_path / "to").take)
    try:
        connection = transfer._connect(receiver.address, file.name, file.stat().st_size)
        with connection:
            connection.sendall(damage(file.read_bytes()) + bytes(16))
            connection.shutdown(socket.SHUT_WR)
            assert b"on the way" in (answer := connection.makefile("rb").readline()) or b"lost" in answer
        assert held(tmp_path / "to") == []
    finally:
        receiver.close()
