"""The process that writes snapshots: ``python -m lightning_easyscale.elastic.snapshot_process``, and how it is asked.

It shares neither the interpreter's lock nor the address space with training, and yields the CPU to it. It imports
nothing but the standard library (NumPy only for tensors that are not in row-major order), so that it starts in a tenth
of a second and needs few megabytes. Tensors reach it through the memory of `HostMemory`, whose descriptor comes with
each order; nothing has a name that could be left behind.

It serves one parent. When that ends, however it does, what is being written is dropped and the process ends: of a job
that was killed no snapshot appears later. Stop signals, which a cluster may send to all processes, are the parent's.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lightning_easyscale.commit import commit

_NICE = 10  # with 19 it starves where training keeps all cores busy, and the newest snapshot is an old one
_LOOK_SECONDS = 1.0  # how soon a process without orders notices that its parent has ended
_CHUNK = 16 << 20
_ALIGNMENT = 64  # of records, as in torch's files
_LENGTH = struct.Struct("<Q")
_LEFT_TO_PARENT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Piece:
    """Bytes in the shared memory.

    Args:
        offset: where they begin.
        size: how many they are.
        strided: if not in row-major order, the shape, the strides in bytes and the bytes of an element.
    """

    offset: int
    size: int
    strided: tuple[tuple[int, ...], tuple[int, ...], int] | None = None


@dataclass(frozen=True)
class Order:
    """A checkpoint to be committed.

    Args:
        path: where to.
        size: bytes of the shared memory that are used.
        pickled: what `torch.load` unpickles; `blank` stands where the digest is to be.
        blank: as long as the digest.
        records: the tensors' bytes, by the order of their keys.
        digested: what the digest is made of, in order.
        digest_bytes: its size.
    """

    path: str
    size: int
    pickled: bytes
    blank: bytes
    records: Sequence[Piece | bytes]
    digested: Sequence[Piece | bytes]
    digest_bytes: int


class SnapshotProcess:
    """The parent's end; starts the process."""

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair()
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), str(os.getpid())],
                env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def commit(self, order: Order, memory: int) -> None:
        """Have a checkpoint committed, and wait until it is.

        Args:
            order: the checkpoint.
            memory: descriptor of the shared memory.

        Raises:
            OSError: if it cannot be written, or the process was ended.
        """
        try:
            said = pickle.dumps(order)
            socket.send_fds(self._connection, [_LENGTH.pack(len(said))], [memory])
            self._connection.sendall(said)
            answer = _receive(self._connection, _LENGTH.unpack(_receive(self._connection, _LENGTH.size))[0])
        except (ConnectionError, EOFError):
            raise ChildProcessError("the process that writes snapshots was ended") from None
        error = pickle.loads(answer)
        if error is not None:
            raise error

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):  # it may have ended
            # A close alone would not tell it: loader workers that were forked since have the connection, too.
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        self._process.wait()


def _receive(connection: socket.socket, size: int) -> bytes:
    raw = bytearray(size)
    view = memoryview(raw)
    while view:
        got = connection.recv_into(view)
        if got == 0:
            raise EOFError
        view = view[got:]
    return bytes(raw)


def _serve(connection: socket.socket, parent: int) -> None:
    """Carry out orders until the parent closes its end, or ends."""
    while os.getppid() == parent:
        if not select.select([connection], [], [], _LOOK_SECONDS)[0]:
            continue  # a worker that the parent has forked may hold the other end open
        raw, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, 1)
        if not raw:
            return
        raw += _receive(connection, _LENGTH.size - len(raw))
        order = pickle.loads(_receive(connection, _LENGTH.unpack(raw)[0]))
        answer = pickle.dumps(_carry_out(order, descriptors[0], parent))
        connection.sendall(_LENGTH.pack(len(answer)) + answer)


def _carry_out(order: Order, descriptor: int, parent: int) -> Exception | None:
    try:
        memory = memoryview(mmap.mmap(descriptor, order.size, prot=mmap.PROT_READ)) if order.size else memoryview(b"")
        digest = _digest(order, memory)
        pickled = order.pickled.replace(order.blank, digest)

        def write(file: BinaryIO) -> None:
            _write(file, pickled, [_view(record, memory) for record in order.records])
            file.flush()
            os.fsync(file.fileno())  # here, as it may take long: the parent is looked for behind it
            if os.getppid() != parent:
                raise ChildProcessError("nobody wants the snapshot any more")

        commit(order.path, write)
    except Exception as error:  # noqa: BLE001 - the parent's to tell
        return error
    finally:
        os.close(descriptor)
    return None


def _digest(order: Order, memory: memoryview) -> bytes:
    digest = hashlib.blake2b(digest_size=order.digest_bytes)
    for part in order.digested:
        if isinstance(part, Piece) and part.strided is not None:
            digest.update(_in_row_major_order(part, memory))
        else:
            digest.update(_view(part, memory))
    return digest.hexdigest().encode()


def _view(part: Piece | bytes, memory: memoryview) -> memoryview:
    return memory[part.offset : part.offset + part.size] if isinstance(part, Piece) else memoryview(part)


def _in_row_major_order(piece: Piece, memory: memoryview) -> bytes:
    import numpy as np

    assert piece.strided is not None
    shape, strides, item = piece.strided
    return np.ndarray(shape, f"V{item}", memory, piece.offset, strides).tobytes()


def _write(file: BinaryIO, pickled: bytes, records: Iterable[memoryview]) -> None:
    """A file as `torch.save` makes it."""
    with zipfile.ZipFile(file, "w") as archive:
        _add(archive, "data.pkl", pickled)
        _add(archive, "byteorder", sys.byteorder.encode())
        for key, record in enumerate(records):
            _add(archive, f"data/{key}", record)
        _add(archive, "version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    info = zipfile.ZipInfo(f"archive/{name}")
    info.file_size = len(content)
    # A header of 30 bytes, the name, a field with the sizes of a large record, and one that fills up to where the
    # content begins, which `mmap=True` wants aligned.
    sizes = 20 if info.file_size * 1.05 > zipfile.ZIP64_LIMIT else 0
    gap = -(archive.fp.tell() + 30 + len(info.filename) + sizes + 4) % _ALIGNMENT  # type: ignore[union-attr]
    info.extra = struct.pack("<2sH", b"FB", gap) + bytes(gap)
    with archive.open(info, "w") as entry:
        for begin in range(0, len(content), _CHUNK):
            entry.write(content[begin : begin + _CHUNK])


def main() -> None:
    """Serve the parent whose end of the connection and process id are given."""
    for number in _LEFT_TO_PARENT:
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICE)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        _serve(connection, int(sys.argv[2]))


if __name__ == "__main__":
    sys.modules["lightning_easyscale.elastic.snapshot_process"] = sys.modules[__name__]  # where orders come from
    main()
