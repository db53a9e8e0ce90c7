"""Keeps data-loading worker processes alive through a stop signal.

A signal to a whole process group reaches the workers too, and a loader whose worker has died ends training before
anything is saved. In a shielded worker a stop signal counts only if the worker's own parent has sent it, which is how
loaders end workers that do not end by themselves.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def shield() -> None:
    """Ignore stop signals of others than the parent; called in a worker process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    threading.Thread(target=_obey_parent, name="easyscale-shield", daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo(_SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)


class ShieldedInit:
    """A loader's ``worker_init_fn`` that shields the worker first.

    Args:
        inner: the function that the loader had.
    """

    def __init__(self, inner: Callable[[int], None] | None) -> None:
        self.inner = inner

    def __call__(self, worker_id: int) -> None:
        """Called in the worker before it loads anything."""
        shield()
        if self.inner is not None:
            self.inner(worker_id)
