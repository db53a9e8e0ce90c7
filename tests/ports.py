"""Ports for the processes that a test starts."""

import random
import socket

# Below what systems give to outgoing connections, so that none takes a port between its choice and its use.
_RANGE = range(10_000, 30_000)


def free_port() -> int:
    """A port on which nothing listens; tests that run beside each other hardly ever choose the same."""
    while True:
        port = random.SystemRandom().choice(_RANGE)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
