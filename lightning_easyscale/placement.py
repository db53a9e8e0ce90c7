"""Placement: which executor hosts which EasyScaleThreads (ESTs).

A placement is a split of the EST ranks ``0..N-1`` into contiguous ranges, one per executor, in executor order. It is
all that reduction, checkpointing and launching need to know about "where"; device types live in `devices.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Placement:
    """Contiguous ranges of EST ranks, one per executor.

    Args:
        ests_per_executor: how many ESTs each executor hosts, in executor order; each at least 1.

    Raises:
        ValueError: if there is no executor, or one would host no EST.
    """

    ests_per_executor: tuple[int, ...]

    def __post_init__(self) -> None:
        counts = tuple(int(c) for c in self.ests_per_executor)
        if not counts or min(counts) < 1:
            raise ValueError(
                f"`ests_per_executor={list(counts)}` leaves an executor without an EST."
                " HINT: give every executor at least one EST and leave spare devices out."
            )
        object.__setattr__(self, "ests_per_executor", counts)

    @classmethod
    def even(cls, num_ests: int, num_executors: int) -> Placement:
        """The most balanced split; the first executors take the remainder.

        Raises:
            ValueError: if there are more executors than ESTs.
        """
        if num_executors < 1 or num_ests < num_executors:
            raise ValueError(
                f"`num_ests={num_ests}` cannot run on {num_executors} devices: every device needs at least one EST."
                f" HINT: set `devices<={num_ests}` or raise `num_ests`."
            )
        base, extra = divmod(num_ests, num_executors)
        return cls(tuple(base + (i < extra) for i in range(num_executors)))

    @classmethod
    def check(cls, ests_per_executor: Sequence[int], num_ests: int) -> Placement:
        """A given split, checked against the number of ESTs.

        Raises:
            ValueError: if the counts do not add up to `num_ests`.
        """
        placement = cls(tuple(ests_per_executor))
        if placement.num_ests != num_ests:
            raise ValueError(
                f"`ests_per_executor={list(ests_per_executor)}` adds up to {placement.num_ests}, not to"
                f" `num_ests={num_ests}`. HINT: correct the counts; every EST runs on exactly one executor."
            )
        return placement

    @property
    def num_ests(self) -> int:
        """N, the size of the virtual world."""
        return sum(self.ests_per_executor)

    @property
    def num_executors(self) -> int:
        """Number of executors (processes, devices)."""
        return len(self.ests_per_executor)

    @property
    def ranges(self) -> tuple[range, ...]:
        """The EST ranks of each executor, in executor order."""
        ends = list(accumulate(self.ests_per_executor))
        return tuple(range(end - count, end) for end, count in zip(ends, self.ests_per_executor, strict=True))

    def executor_of(self, rank: int) -> int:
        """The executor that hosts EST `rank`.

        Raises:
            IndexError: if there is no such EST.
        """
        for executor, ests in enumerate(self.ranges):
            if rank in ests:
                return executor
        raise IndexError(f"EST rank {rank} is not in 0..{self.num_ests - 1}.")

    def __iter__(self) -> Iterator[range]:
        return iter(self.ranges)
