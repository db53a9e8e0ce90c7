"""Time of the gradient exchange: ``latency + bytes / bandwidth``, fitted to measurements.

An all-reduce over k executors moves ``2 (k - 1) / k`` times the gradient bytes through each link, in ``2 (k - 1)``
rounds. One executor alone communicates nothing. Crossing nodes may have its own latency and bandwidth. The fit
minimises the relative error, because a model that is right for 500 MB and ten times off for 10 MB plans badly for small
models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_easyscale.planning.step_time import NANOSECONDS


@dataclass(frozen=True)
class Link:
    """One kind of link.

    Args:
        latency_s: seconds per round, zero or more.
        bytes_per_s: bandwidth, positive.

    Raises:
        ValueError: if a number is out of range.
    """

    latency_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.latency_s >= 0 or not self.bytes_per_s > 0:
            raise ValueError(
                f"`Link(latency_s={self.latency_s}, bytes_per_s={self.bytes_per_s})` is no link."
                " HINT: latency is zero or more, bandwidth is positive."
            )

    def ring_seconds(self, num_bytes: float, executors: int) -> float:
        """Seconds of a ring all-reduce of `num_bytes` over `executors`; 0 for one."""
        if executors <= 1:
            return 0.0
        rounds = 2 * (executors - 1)
        return rounds * self.latency_s + rounds / executors * num_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Communication:
    """Exchange time of a job with `num_bytes` of gradients.

    Args:
        num_bytes: bytes of all gradients.
        local: the link inside a node.
        remote: the link between nodes; None: the same as `local`.
    """

    num_bytes: float
    local: Link
    remote: Link | None = None

    def seconds(self, executors: int, nodes: int = 1) -> float:
        """Seconds per global step with `executors` devices on `nodes` nodes."""
        link = self.remote if nodes > 1 and self.remote is not None else self.local
        return link.ring_seconds(self.num_bytes, executors)

    def ns(self, executors: int, nodes: int = 1) -> int:
        """The same in integer nanoseconds."""
        return round(self.seconds(executors, nodes) * NANOSECONDS)


@dataclass(frozen=True)
class LinkFit:
    """A fitted link and how far it is from what it was fitted to.

    Args:
        link: the fit.
        mean_relative_error: mean of ``|predicted - measured| / measured``.
        max_relative_error: the largest of these.
        points: number of measurements.
    """

    link: Link
    mean_relative_error: float
    max_relative_error: float
    points: int


def fit_link(measurements: Sequence[tuple[float, int, float]]) -> LinkFit:
    """Fit latency and bandwidth to measured exchanges.

    Minimises ``(predicted - measured)^2 / (predicted * measured)``, which treats twice as long and half as long alike,
    by least squares with weights from the previous round.

    Args:
        measurements: (bytes, executors, seconds) each, executors at least 2, seconds positive.

    Raises:
        ValueError: if fewer than two different measurements are given or one is out of range.
    """
    rows = []
    for num_bytes, executors, seconds in measurements:
        if executors < 2 or seconds <= 0 or num_bytes < 0:
            raise ValueError(
                f"`measurements` has ({num_bytes}, {executors}, {seconds}): an exchange needs two executors or more and"
                " takes time. HINT: leave single-device runs out."
            )
        rounds = 2 * (executors - 1)
        rows.append((float(rounds), rounds / executors * num_bytes, seconds))
    if len({round(b / a, 12) for a, b, _ in rows}) < 2:
        raise ValueError(
            f"`measurements` has {len(rows)} rows that do not tell latency from bandwidth."
            " HINT: measure at least two different sizes."
        )
    latency, inverse = _weighted(rows, [1.0 / y**2 for *_, y in rows])
    for _ in range(200):
        weights = [1.0 / (y * max(latency * a + inverse * b, 1e-12)) for a, b, y in rows]
        latency, inverse = _weighted(rows, weights)
    errors = [abs(latency * a + inverse * b - y) / y for a, b, y in rows]
    return LinkFit(Link(latency, 1.0 / inverse), sum(errors) / len(errors), max(errors), len(errors))


def _weighted(rows: Sequence[tuple[float, float, float]], weights: Sequence[float]) -> tuple[float, float]:
    """Latency and seconds per byte, neither negative, that minimise the weighted squares."""
    aa = ab = bb = ay = by = 0.0
    for (a, b, y), w in zip(rows, weights, strict=True):
        aa, ab, bb = aa + w * a * a, ab + w * a * b, bb + w * b * b
        ay, by = ay + w * a * y, by + w * b * y
    determinant = aa * bb - ab * ab
    latency, inverse = (ay * bb - by * ab) / determinant, (by * aa - ay * ab) / determinant
    if latency < 0:  # the best nonnegative pair lies on an axis
        return 0.0, by / bb
    return (latency, inverse) if inverse > 0 else (ay / aa, 1e-15)
