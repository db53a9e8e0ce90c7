"""A job's checkpoints where every host may have a folder of its own, which is lost with the host.

When training starts, the executors compare their folders. Executors that see the same folder (one host, or shared
storage) need one of them to look after it, its keeper. If there are several folders, the checkpoints that executor 0
commits are sent on to other keepers (`transfer.py`), as many as the job wants copies. At the next start the executors,
whoever is left of them, agree on the newest checkpoint that is good in one of their folders, and it is sent to those
that lack it. Everything is decided at start-up, and copying goes on in the thread that writes the snapshot, so a
training step has no collective more than before.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..checkpoint import CheckpointError
from ..runtime.peers import Peers
from .folder import CheckpointFolder, Save, save_sealed
from .transfer import Address, Receiver, send

T = TypeVar("T")


class ReplicaError(OSError):
    """A checkpoint was committed to `path`, but there are fewer copies of it on other hosts than were wanted."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(errno.EIO, why)
        self.path = path


class Replication:
    """The folders of a job, seen from one executor.

    Args:
        folder: this executor's.
        peers: the executors.
        replicas: how many other hosts get each checkpoint.
    """

    def __init__(self, folder: CheckpointFolder, peers: Peers, *, replicas: int) -> None:
        self.folder = folder
        self._peers = peers
        self._replicas = replicas
        self._receiver: Receiver | None = None
        self._keepers = [0]
        self._others: list[tuple[int, Address]] = []  # keepers, in the order in which they get copies

    def open(self, about: Callable[[dict[str, Any]], Any], report: Callable[[str], None]) -> tuple[Path, Any] | None:
        """Compare the folders and find the newest good checkpoint; a collective of all executors.

        Args:
            about: takes from a checkpoint's ``easyscale`` entry what all executors have to know of it.
            report: told of each checkpoint that cannot be used.

        Returns:
            Its path in this executor's folder, and what `about` returned.

        Raises:
            OSError: if a folder cannot be used, or a checkpoint does not reach an executor that needs it; the same on
                all executors.
        """
        seen = self._everyone(self._look)
        identities = [identity for identity, _ in seen]
        self._keepers = sorted({identities.index(identity) for identity in identities})
        if len(self._keepers) > 1:
            self._introduce()
        held = {k: seen[k][1] for k in self._keepers}
        for name in sorted({n for names in held.values() for n in names}, key=self.folder.order, reverse=True):
            mine = name in held.get(self._peers.index, ())
            checked = self._peers.all_gather_object(self._check(name, about) if mine else (None, ""))
            for k, (_, why) in enumerate(checked):
                if why:
                    report(
                        f"`{self.folder.path / name}` cannot be used" + (f" on executor {k}" if k else "") + f": {why}"
                    )
            good = [k for k in held if name in held[k] and not checked[k][1]]
            if good:
                self._everyone(lambda: self._distribute(name, good))  # noqa: B023 - called at once
                return self.folder.path / name, checked[good[0]][0]
        return None

    def commit(self, checkpoint: dict[str, Any], *, step: int, batch: int, save: Save = save_sealed) -> Path:
        """Commit a checkpoint and copy it to other hosts; executor 0's affair. See `CheckpointFolder.commit`.

        Raises:
            OSError: if it cannot be written.
            ReplicaError: if it was written here and could not be copied.
        """
        path = self.folder.commit(checkpoint, step=step, batch=batch, save=save)
        copies, failures = 0, []
        for keeper, address in list(self._others):
            if copies == self._replicas:
                break
            try:
                send(path, address)
                copies += 1
            except OSError as error:
                failures.append(f"executor {keeper}: {_why(error)}")
                self._others.append(self._others.pop(self._others.index((keeper, address))))  # asked last from now on
        if copies < min(self._replicas, len(self._others)):
            raise ReplicaError(path, f"`{path}` has {copies} copies on other hosts ({'; '.join(failures)})")
        return path

    def clear(self) -> None:
        """Training has ended by itself: remove the checkpoints from all folders; a collective of all executors."""
        if len(self._keepers) > 1:
            self._peers.agree("finished")  # executor 0 sends no more
        if self._peers.index in self._keepers:
            self.folder.clear()

    def close(self) -> None:
        """Take no more copies."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None

    def _look(self) -> tuple[str, list[str]]:
        """This executor's folder and what is in it."""
        if self._peers.index == 0:
            self.folder.prepare()
        return self.folder.identity(), self.folder.names()

    def _introduce(self) -> None:
        """Let the keepers know where they take copies."""

        def listen() -> Address | None:
            if self._peers.index not in self._keepers:
                return None
            if self._peers.index != 0:
                self.folder.prepare()
            self._receiver = Receiver(self.folder.take)
            return self._receiver.address

        addresses = self._everyone(listen)
        self._others = [(k, a) for k, a in enumerate(addresses) if a is not None and k != self._peers.index]

    def _check(self, name: str, about: Callable[[dict[str, Any]], Any]) -> tuple[Any, str]:
        """What is to be known of a good checkpoint; why a bad one is none."""
        try:
            return about(self.folder.entry(name)), ""
        except (CheckpointError, OSError) as error:
            return None, str(error)

    def _distribute(self, name: str, good: list[int]) -> None:
        """Let all keepers have a checkpoint that some of them have."""
        if self._peers.index != good[0]:
            return
        for keeper, address in self._others:
            if keeper not in good:
                try:
                    send(self.folder.path / name, address)
                except OSError as error:
                    raise OSError(
                        error.errno,
                        f"the checkpoint `{name}` cannot be sent from executor {good[0]} to executor {keeper}, which"
                        f" lacks it: {_why(error)}. HINT: correct that, or start without that host",
                    ) from error

    def _everyone(self, act: Callable[[], T]) -> list[T]:
        """What `act` returns on every executor.

        Raises:
            OSError: on all of them, if one fails.
        """
        mine: tuple[T | None, tuple[int | None, str] | None]
        try:
            mine = act(), None
        except OSError as error:
            mine = None, (error.errno, _why(error))
        gathered = self._peers.all_gather_object(mine)
        for executor, (_, failed) in enumerate(gathered):
            if failed is not None:
                number, why = failed
                raise OSError(number, f"executor {executor}: {why}" if self._peers.size > 1 else why)
        return [value for value, _ in gathered]


def _why(error: OSError) -> str:
    return error.strerror or str(error)
