"""Errors of the runtime.

`ESTAborted` unwinds the ESTs that are still well when another one failed. It derives from `BaseException` because host
loops wrap collectives in ``except Exception`` and must not swallow it.
"""

from __future__ import annotations


class ESTAborted(BaseException):
    """Raised inside an EST that has to end because another EST failed."""


class CollectiveMismatch(RuntimeError):
    """Ranks of one group called different collectives (or the same one with different shapes)."""


class ESTHang(RuntimeError):
    """An EST or an executor did not arrive at a rendezvous within the timeout."""


class RemoteESTError(RuntimeError):
    """An EST of another executor failed; the message carries its rank and its error."""
