"""Processes that an agent has started beyond the number of ESTs: they wait until the job ends or needs them.

Under torchrun every agent starts its processes, however many ESTs there are. When an agent leaves, torchrun ends all
processes and starts them again with other ranks, and a former spare may then host ESTs. Spares are in no process group.
They wait at the store that the agent names (``MASTER_ADDR``, ``MASTER_PORT``), where executor 0 says when training has
finished; it goes on when they have heard it, because the store ends with its process.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import NoReturn

from torch.distributed import DistError, TCPStore

_FINISHED, _HEARD = "easyscale/finished", "easyscale/spares"
_HEARING_SECONDS = 30.0
_CONNECT_SECONDS = 10.0


class Spares:
    """The spares of a job, seen from executor 0.

    Args:
        count: how many there are.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        # Process groups of this process, if there are any, share the server.
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._store = _meeting_point(serve=not by_agent)

    def release(self) -> None:
        """Training has finished: let them end."""
        self._store.set(_FINISHED, "1")
        deadline = time.monotonic() + _HEARING_SECONDS
        while self._store.add(_HEARD, 0) < self._count and time.monotonic() < deadline:
            time.sleep(0.02)


def wait_as_spare(*, interval: float = 1.0) -> NoReturn:
    """Wait until the job has finished, then end this process well.

    Args:
        interval: seconds between attempts to find executor 0, which may not be there yet.

    Raises:
        SystemExit: with 0, when the job has finished.
    """
    store: TCPStore | None = None
    while True:
        try:
            store = store or _meeting_point(serve=False)
            if store.check([_FINISHED]):
                store.add(_HEARD, 1)
                raise SystemExit(0)
        except DistError:
            store = None  # not there yet; or it has failed, and the agent will end this process
        time.sleep(interval)


def _meeting_point(*, serve: bool) -> TCPStore:
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=serve,
        timeout=timedelta(seconds=_CONNECT_SECONDS),
        wait_for_workers=False,
        multi_tenant=True,
    )
