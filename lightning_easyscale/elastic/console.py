"""What people who watch a job are told."""

from __future__ import annotations

import sys
import time
from contextlib import suppress


def say(text: str) -> None:
    """Print a line with the time of day, beside the output of the executors."""
    now = time.time()
    clock = time.strftime("%H:%M:%S", time.localtime(now))
    with suppress(OSError):  # whoever read it is gone; the job goes on
        print(f"easyscale {clock}.{int(now % 1 * 1000):03d} | {text}", file=sys.stderr, flush=True)
