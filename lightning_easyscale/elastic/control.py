"""A job's folder, and how commands reach the supervisor that runs in it.

The supervisor holds a lock on the folder and listens on a Unix socket in it: one request per connection, a line of
JSON each way. Executors inherit the lock, so a folder counts as in use until the last of them has ended, whatever
became of the supervisor. What a killed supervisor leaves (a socket nobody listens on, a state that says "running") is
recognised, because the kernel releases locks.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "EASYSCALE_ELASTIC_DIR"
"""Names the job's folder where the script does not."""

_TIMEOUT = 10.0  # seconds; the supervisor answers at once


class JobError(RuntimeError):
    """A command that cannot be carried out; the message has the reason and the cure."""


class JobFolder:
    """Names and state of one job.

    Args:
        path: the folder; made when a supervisor starts in it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.events = self.path / "events.jsonl"
        self._lock = self.path / "supervisor.lock"
        self._socket = self.path / "supervisor.sock"
        self._state = self.path / "supervisor.json"

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Be the folder's only supervisor; yields the descriptor that executors have to inherit.

        Raises:
            JobError: if another supervisor, or an executor of an earlier one, is there.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise JobError(self._why_locked()) from None
            yield descriptor
        finally:
            os.close(descriptor)

    def _why_locked(self) -> str:
        try:
            pid = self.request("status")["pid"]
        except JobError:
            return (
                f"executors of an earlier supervisor still run in `{self.path}`; they were told to save and to end."
                " HINT: wait for them and start again."
            )
        return f"a supervisor (pid {pid}) runs the job in `{self.path}` already. HINT: give another `--dir`."

    def write_state(self, **state: Any) -> None:
        """Replace the state that `read_state` reads."""
        temporary = self._state.with_suffix(".tmp")
        temporary.write_text(json.dumps({"time": time.time(), **state}))
        temporary.replace(self._state)

    def read_state(self) -> dict[str, Any]:
        """What the newest supervisor wrote last; empty if there was none."""
        try:
            state: dict[str, Any] = json.loads(self._state.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return state

    def newest_checkpoint(self) -> str | None:
        """The file name of the newest committed checkpoint."""
        found = []
        for file in (self.path / "checkpoints").glob("*.ckpt"):
            with suppress(FileNotFoundError):  # an executor has just removed it: there is a newer one
                found.append((file.stat().st_mtime_ns, file.name))
        return max(found)[1] if found else None

    def request(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Ask the supervisor.

        Raises:
            JobError: if there is none, or it refuses.
        """
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_TIMEOUT)
            try:
                with _short_name(self._socket) as name:
                    connection.connect(name)
                connection.sendall(json.dumps({"do": what, **arguments}).encode() + b"\n")
                raw = connection.makefile("rb").readline()
            except (FileNotFoundError, NotADirectoryError, ConnectionError):
                raise JobError(self._why_no_answer()) from None
            except TimeoutError:
                raise JobError(f"the supervisor of `{self.path}` does not answer. HINT: try again.") from None
        if not raw:
            raise JobError(self._why_no_answer())
        answer: dict[str, Any] = json.loads(raw)
        if "error" in answer:
            raise JobError(answer["error"])
        return answer

    def _why_no_answer(self) -> str:
        state = self.read_state()
        if not state:
            return (
                f"there is no job in `{self.path}`. HINT: start one with `run --dir {self.path}`, or correct `--dir`."
            )
        if state["state"] == "finished":
            return f"the job in `{self.path}` has finished."
        ended = "its supervisor was killed" if state["state"] == "running" else f"it has {state['state']}"
        return (
            f"the job in `{self.path}` does not run: {ended}. HINT: the same `run` command continues it from its"
            " newest checkpoint."
        )

    @contextmanager
    def listening(self) -> Iterator[socket.socket]:
        """The socket for requests; only for who holds the lock."""
        self._socket.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as server:
            with _short_name(self._socket) as name:
                server.bind(name)
            server.listen()
            server.setblocking(False)
            try:
                yield server
            finally:
                self._socket.unlink(missing_ok=True)


def receive(server: socket.socket) -> tuple[socket.socket, dict[str, Any]] | None:
    """The next request and the connection that waits for its answer; None if there is none or it makes no sense."""
    try:
        connection, _ = server.accept()
    except BlockingIOError:
        return None
    connection.settimeout(1.0)
    try:
        request = json.loads(connection.makefile("rb").readline())
        if isinstance(request, dict):
            return connection, request
    except (OSError, ValueError):
        pass
    connection.close()
    return None


def answer(connection: socket.socket, **fields: Any) -> None:
    """Answer a request and hang up."""
    with connection, suppress(OSError):
        connection.sendall(json.dumps(fields).encode() + b"\n")


@contextmanager
def _short_name(path: Path) -> Iterator[str]:
    """A name for a socket that fits into its 108 bytes, however deep the folder is."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
