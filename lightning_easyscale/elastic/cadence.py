"""How often snapshots are taken where the job is to find out: as often as a budget allows (CheckFreq, FAST '21, 5.1).

Executor 0 looks at the clock at every boundary of its first EST. A snapshot's cost is what training loses by it: how
much longer the steps take from the copy until the file is committed (the copy included) than the steps before them did,
whatever the reason, and at least the copy. Nothing waits for a device: while a step is queued faster than it is
computed, the queue soon holds it back. Noise falls on single steps and single snapshots, so both are medians. Of the
first few only what exceeds the noise of steps counts, so that one of a bad moment does not put off the others.

The next snapshot is due when a snapshot costs no more than the budget allows for the time since the last one. Then
executor 0 asks for it, and the request travels with the next rendezvous of all ESTs, as a stop does: all of them take
it at the same boundary, and no step has a collective more. When bits are taken they are the same, so the clock decides
nothing but when.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Literal, NamedTuple

BUDGET = 0.01
SHORTEST_S = 1.0
LONGEST_S = 600.0
FIRST_STEPS = 6
FIRST_S = 30.0

_SPARE = 0.8  # share of the budget that is spent: a cost may be measured too low
_STEPS = 32  # undisturbed steps that are remembered
_COSTS = 15  # snapshots that are remembered
_FEW = 5  # fewer have no median
_PAUSE_STEPS, _PAUSE_S = 8, 1.0  # a step that is longer than both is a pause that no snapshot has made
_LONGER = 1.5  # an interval so much longer or shorter than the one that was told is told


class _Cost(NamedTuple):
    """Seconds that a snapshot has cost: in all, at least, and while it was copied."""

    excess: float
    beyond_noise: float
    copy: float


Every = int | Literal["auto"] | None


class Cadence:
    """Says when a snapshot is due; used by executor 0 alone.

    The first is due after `FIRST_STEPS` steps or `FIRST_S` seconds. Later ones are at least `SHORTEST_S` seconds of
    training apart, and at most `LONGEST_S` seconds, whatever they cost.

    Args:
        budget: share of training time that snapshots may cost.
        clock: seconds.
        tell: takes a line about what was measured and chosen: the first time, and when it has changed much.
    """

    def __init__(
        self, budget: float, *, clock: Callable[[], float] = time.perf_counter, tell: Callable[[str], None]
    ) -> None:
        self._budget = budget
        self._clock = clock
        self._tell = tell
        self._told: float | None = None
        self._is_second = False  # of all snapshots, the one that is written
        self._step: int | None = None
        self._since = self._began = clock()  # the step that goes on; the last snapshot
        self._measured = False  # whether that step is like others
        self._left_training = False  # a validation goes on
        self._trained = 0.0  # seconds of steps since the last snapshot
        self._quiet: deque[float] = deque(maxlen=_STEPS)
        self._asked = False
        self._usual: float | None = None  # seconds of a step before the snapshot that is being written
        self._noise = 0.0  # standard deviation of such a step
        self._excess, self._steps, self._copy = 0.0, 0, 0.0
        self._costs: deque[_Cost] = deque(maxlen=_COSTS)

    @property
    def cost(self) -> float | None:
        """Seconds that training loses by a snapshot; None while unknown."""
        if not self._costs:
            return None
        if len(self._costs) < _FEW:
            return max(max(cost.beyond_noise, cost.copy) for cost in self._costs)
        return max(median(cost.excess for cost in self._costs), median(cost.copy for cost in self._costs))

    @property
    def interval(self) -> float | None:
        """Seconds of training from one snapshot to the next; None while unknown."""
        cost = self.cost
        return None if cost is None else min(max(cost / (_SPARE * self._budget), SHORTEST_S), LONGEST_S)

    def reached(self, step: int, following: str, *, writing: bool) -> bool:
        """Called at every boundary; whether to ask for a snapshot.

        Args:
            step: optimizer steps done.
            following: what comes next, see `_lightning_loops.py`.
            writing: whether a snapshot is being written.
        """
        now = self._clock()
        if step == self._step or self._step is None:
            if self._left_training or self._step is None:
                self._since, self._left_training = now, False
            self._step = step
        else:
            self._end_step(now, step - self._step, like_others=self._measured and following != "next_epoch")
            self._since, self._step, self._measured = now, step, True
            self._left_training = following == "validation"
            if self._usual is not None and not writing:
                self._end_snapshot()
        if following == "next_epoch":
            self._measured = False  # loaders begin anew
        if self._asked or self._usual is not None or not self._is_due(now):
            return False
        self._asked = True
        return True

    def took(self, copying: float) -> None:
        """A snapshot was taken at the boundary that was reached last.

        Args:
            copying: seconds for which training waited for the copy.
        """
        self._asked, self._trained, self._began = False, 0.0, self._since
        self._excess, self._steps, self._copy = 0.0, 0, copying
        self._usual = usual = median(self._quiet)
        self._noise = 1.48 * median(abs(seconds - usual) for seconds in self._quiet)

    def _end_step(self, now: float, steps: int, *, like_others: bool) -> None:
        seconds = now - self._since
        if self._quiet and seconds > self._copy + max(_PAUSE_STEPS * steps * median(self._quiet), _PAUSE_S):
            return  # of the process, or of what it waits for
        self._trained += seconds
        if not like_others:
            return
        if self._usual is None:
            self._quiet.append(seconds / steps)
        else:
            self._excess += seconds - steps * self._usual
            self._steps += steps

    def _end_snapshot(self) -> None:
        if self._is_second:
            # The first one has made memory and a process besides.
            self._costs.popleft()
        self._is_second = self._told is None
        sure = self._excess - 2 * self._noise * math.sqrt(self._steps)
        self._costs.append(_Cost(self._excess, sure, self._copy))
        self._usual = None
        cost, interval = self.cost, self.interval
        assert cost is not None and interval is not None  # noqa: PT018
        if self._told is not None and interval < _LONGER * self._told and self._told < _LONGER * interval:
            return
        self._told = interval
        step = median(self._quiet)
        self._tell(
            f"EasyScale: a snapshot costs training {1e3 * cost:.0f} ms, a step takes {1e3 * step:.0f} ms: with"
            f" `snapshot_budget={self._budget}` one follows every {interval:.1f} s."
        )

    def _is_due(self, now: float) -> bool:
        interval = self.interval
        if interval is None:
            return len(self._quiet) >= FIRST_STEPS or (self._trained >= FIRST_S and bool(self._quiet))
        return self._trained >= interval or now - self._began >= LONGEST_S


def check_interval(every: Every, budget: float, *, folder: bool, variable: str) -> None:
    """Refuse what is no interval of snapshots.

    Args:
        every: optimizer steps, ``"auto"``, or None for no snapshots.
        budget: share of training time for ``"auto"``.
        folder: whether there is a folder for them.
        variable: what names one, too.

    Raises:
        ValueError: with the value and the cure.
    """
    if every is not None and every != "auto" and (not isinstance(every, int) or every < 1):
        raise ValueError(f'`snapshot_every_n_steps={every!r}` is not an interval. HINT: give at least 1, or "auto".')
    if every is not None and not folder:
        raise ValueError(
            f"`snapshot_every_n_steps={every!r}` has nowhere to write. HINT: set `elastic_dir`, or the variable"
            f" {variable}."
        )
    if not 0 < budget < 1:
        raise ValueError(
            f"`snapshot_budget={budget}` is not a share of training time. HINT: give more than 0 and less than 1, such"
            f" as {BUDGET}."
        )
    if budget != BUDGET and every != "auto":
        raise ValueError(
            f"`snapshot_budget={budget}` has no meaning with `snapshot_every_n_steps={every}`. HINT: set that to"
            ' "auto", or leave the budget out.'
        )
