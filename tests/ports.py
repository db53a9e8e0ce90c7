"""Ports for the processes that a test starts."""

import itertools
import os
import socket

# Below what systems give to outgoing connections, so that none takes a port between its choice and its use. Processes
# that test beside each other start at different places.
_PORTS = itertools.cycle(range(10_000, 30_000))
for _ in range(os.getpid() * 199 % 20_000):
    next(_PORTS)


def free_port() -> int:
    """A port on which nothing listens and that this process has not chosen before."""
    for port in _PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise AssertionError("a cycle does not end")
