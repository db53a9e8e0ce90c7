"""Sends a file from one host's folder to another's, over TCP.

One connection per file: the sender names it, the receiver answers that it is ready, the content follows with a digest,
and the answer is empty or says why the file was not kept. Only who knows the receiver's secret can write, and only
files of the folder. A receiver says under which addresses it might be reached; the sender takes the first that leads to
it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_CHUNK = 1 << 20
_CONNECT_SECONDS = 5.0
_SILENCE_SECONDS = 60.0  # a transfer that stands still for so long has failed
_DIGEST_BYTES = 16
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Address:
    """Where a receiver can be reached.

    Args:
        hosts: addresses of its host, the likely ones first.
        port: its port.
        secret: what it wants to hear.
    """

    hosts: tuple[str, ...]
    port: int
    secret: str

    def __str__(self) -> str:
        return f"{' or '.join(self.hosts)}, port {self.port}"


class Receiver:
    """Takes files while it is open, one after another, in a thread.

    Args:
        keep: called with a file's name and a function that writes its content to a file object; commits it.
    """

    def __init__(self, keep: Callable[[str, Callable[[BinaryIO], None]], None]) -> None:
        self._keep = keep
        self._server = _listen()
        self._connection: socket.socket | None = None
        self.address = Address(tuple(_own_addresses()), self._server.getsockname()[1], secrets.token_hex(16))
        self._thread = threading.Thread(target=self._serve, name="easyscale-receiver", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more; a file that is on its way is given up."""
        for end in filter(None, (self._server, self._connection)):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(_SILENCE_SECONDS)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            self._connection = connection
            with connection, suppress(OSError, ValueError):
                connection.settimeout(_SILENCE_SECONDS)
                self._take(connection)

    def _take(self, connection: socket.socket) -> None:
        stream = connection.makefile("rb")
        asked = json.loads(stream.readline(4096))
        if not secrets.compare_digest(str(asked["secret"]), self.address.secret):
            return
        connection.sendall(b"\n")
        why = ""
        try:
            self._keep(str(asked["name"]), lambda file: _copy_in(stream, file, int(asked["size"])))
        except Exception as error:  # noqa: BLE001 - told by the sender, whatever it is
            why = str(error) or type(error).__name__
            while stream.read(_CHUNK):
                pass  # closing on unread content would reset the connection and lose the answer
        connection.sendall(json.dumps(why).encode() + b"\n")


def send(path: Path, to: Address) -> None:
    """Send a file.

    Args:
        path: the file; it arrives under its name.
        to: the receiver.

    Raises:
        OSError: if it does not arrive whole.
    """
    with path.open("rb") as file, _connect(to, path.name, path.stat().st_size) as connection:
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            connection.sendall(chunk)
        connection.sendall(digest.digest())
        connection.shutdown(socket.SHUT_WR)
        line = connection.makefile("rb").readline()
    why = json.loads(line) if line else "the connection was lost"
    if why:
        raise OSError(errno.EIO, why)


def _connect(to: Address, name: str, size: int) -> socket.socket:
    """A connection whose other end is the receiver and is ready for the file."""
    question = json.dumps({"secret": to.secret, "name": name, "size": size}).encode() + b"\n"
    last = "no answer"
    for host in to.hosts:
        try:
            connection = socket.create_connection((host, to.port), _CONNECT_SECONDS)
        except OSError as error:
            last = error.strerror or str(error)
            continue
        with suppress(OSError):
            connection.sendall(question)
            if connection.recv(1) == b"\n":
                connection.settimeout(_SILENCE_SECONDS)
                return connection
        connection.close()  # another process, which happens to listen there
    raise OSError(errno.EHOSTUNREACH, f"{to} cannot be reached ({last})")


def _copy_in(stream: BinaryIO, file: BinaryIO, size: int) -> None:
    digest, left = hashlib.blake2b(digest_size=_DIGEST_BYTES), size
    while left:
        chunk = stream.read(min(left, _CHUNK))
        if not chunk:
            raise OSError(errno.EIO, "the connection was lost")
        digest.update(chunk)
        file.write(chunk)
        left -= len(chunk)
    if stream.read(_DIGEST_BYTES) != digest.digest():
        raise OSError(errno.EIO, "the file was changed on the way")


def _listen() -> socket.socket:
    with suppress(OSError):
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _own_addresses() -> list[str]:
    """All addresses of this host, loopback last."""
    found: dict[str, None] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, interface in socket.if_nameindex():
            with suppress(OSError):  # an interface without one
                asked = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
                found[socket.inet_ntoa(asked[20:24])] = None
    with suppress(OSError):
        found.update((str(info[4][0]), None) for info in socket.getaddrinfo(socket.gethostname(), None))
    return sorted(found, key=lambda host: host.startswith("127.") or host == "::1")
