"""How long one device needs for its share of a global step.

A device that hosts ``a`` ESTs runs them one after another, so its share of a step takes ``T(a)``: nothing at ``a = 0``
and nondecreasing in ``a``. Everything the planner does rests on these two properties only. Times are integer
nanoseconds, so that "fits within the threshold" is decided exactly and never by the last bit of a float.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Protocol

NANOSECONDS = 1_000_000_000


def to_ns(seconds: float, argument: str = "seconds") -> int:
    """Seconds as integer nanoseconds, rounded to nearest.

    Raises:
        ValueError: if the value is negative, infinite or not a number.
    """
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"`{argument}={seconds}` is not a time. HINT: give finite seconds, zero or more.")
    return round(seconds * NANOSECONDS)


def ests_that_fit(device_bytes: int, *, fixed_bytes: int, est_bytes: int) -> int | None:
    """ESTs that one device's memory can host: what they share once, plus what each of them keeps while it waits.

    Args:
        device_bytes: memory of the device.
        fixed_bytes: context, parameters, optimizer state and one set of activations, whatever the number of ESTs.
        est_bytes: what every EST keeps (gradients in `ddp` order, buffers); 0: no limit.

    Returns:
        The number for `plan`'s `max_ests`; None without a limit.

    Raises:
        ValueError: if a size is negative.
    """
    if min(device_bytes, fixed_bytes, est_bytes) < 0:
        raise ValueError(
            f"`device_bytes={device_bytes}`, `fixed_bytes={fixed_bytes}`, `est_bytes={est_bytes}`: a size is negative."
            " HINT: give bytes, zero or more."
        )
    if device_bytes < fixed_bytes:
        return 0
    return (device_bytes - fixed_bytes) // est_bytes if est_bytes else None


class StepTime(Protocol):
    """The step time of one device as a function of the ESTs it hosts."""

    @property
    def max_ests(self) -> int | None:
        """The most ESTs that fit (memory), or None without a limit."""

    def time_ns(self, ests: int) -> int:
        """Nanoseconds for `ests` ESTs; 0 for none; nondecreasing."""

    def capacity(self, limit_ns: int) -> int | None:
        """The largest number of ESTs whose time is within `limit_ns`; None without a limit."""


@dataclass(frozen=True)
class AffineStepTime:
    """``T(a) = fixed + a * est + (a - 1) * switch`` for ``a >= 1``.

    Args:
        est_ns: one EST's mini-batch (forward and backward), nanoseconds, at least 1.
        switch_ns: one context switch between two ESTs.
        fixed_ns: what a step costs whatever the number of ESTs (optimizer, launch).
        max_ests: the most ESTs that fit into the device's memory; None: no limit.

    Raises:
        ValueError: if a time is negative, `est_ns` is not positive, or `max_ests` is negative.
    """

    est_ns: int
    switch_ns: int = 0
    fixed_ns: int = 0
    max_ests: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.est_ns < 1:
            raise ValueError(f"`est_ns={self.est_ns}` is no step time. HINT: an EST needs at least 1 ns.")
        for name in ("switch_ns", "fixed_ns"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}={getattr(self, name)}` is negative. HINT: times are zero or more.")
        if self.max_ests is not None and self.max_ests < 0:
            raise ValueError(f"`max_ests={self.max_ests}` is negative. HINT: use None for no limit.")

    def time_ns(self, ests: int) -> int:
        """Nanoseconds for `ests` ESTs."""
        if ests == 0:
            return 0
        return self.fixed_ns + ests * self.est_ns + (ests - 1) * self.switch_ns

    def capacity(self, limit_ns: int) -> int:
        """The largest number of ESTs within `limit_ns`, in closed form."""
        if limit_ns < self.fixed_ns + self.est_ns:
            return 0
        fit = (limit_ns - self.fixed_ns + self.switch_ns) // (self.est_ns + self.switch_ns)
        return fit if self.max_ests is None else min(fit, self.max_ests)


@dataclass(frozen=True)
class TabulatedStepTime:
    """Measured times: ``times_ns[a - 1]`` is the time of ``a`` ESTs; more than were measured do not fit.

    Raises:
        ValueError: if a time is not positive or the table decreases.
    """

    times_ns: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the ranges."""
        if any(t < 1 for t in self.times_ns) or list(self.times_ns) != sorted(self.times_ns):
            raise ValueError(
                f"`times_ns={list(self.times_ns)}` must be positive and nondecreasing: one more EST never makes a"
                " device faster. HINT: smooth the measurements (running maximum) first."
            )

    @property
    def max_ests(self) -> int:
        """The largest number of ESTs that was measured."""
        return len(self.times_ns)

    def time_ns(self, ests: int) -> int:
        """Nanoseconds for `ests` ESTs."""
        return self.times_ns[ests - 1] if ests else 0

    def capacity(self, limit_ns: int) -> int:
        """The largest measured number of ESTs within `limit_ns`."""
        return bisect_right(self.times_ns, limit_ns)
