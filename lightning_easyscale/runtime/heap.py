"""One heap for all EST threads.

glibc gives every thread a heap ("arena") of its own, so that memory which one EST frees is kept for that EST and cannot
serve the next: each would hold its own activations' worth. ESTs run one at a time and gain nothing from it.
"""

from __future__ import annotations

import ctypes

_M_ARENA_MAX = -8  # glibc, malloc.h


def share_heap() -> bool:
    """Let threads that start from now on allocate from one heap; whether the C library can (glibc).

    It holds for the process and the rest of its life.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_ARENA_MAX, 1))
