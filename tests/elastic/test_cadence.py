"""The automatic interval of snapshots, on a clock of the test's own."""

from __future__ import annotations

import random
from statistics import median

import pytest

from lightning_easyscale import EasyScaleStrategy
from lightning_easyscale.elastic import cadence
from lightning_easyscale.elastic.cadence import Cadence

NEXT = "next_batch"


class Training:
    """Steps of a job whose snapshots cost time.

    Args:
        budget: share of time for snapshots.
        step: seconds of a step.
        copy: seconds of a snapshot's copy.
        slow: seconds by which a step is longer while a snapshot is written.
        writing: steps that it takes to write one.
        noise: standard deviation of a step, as a share of it.
    """

    def __init__(
        self,
        budget: float = 0.01,
        *,
        step: float = 0.1,
        copy: float = 0.01,
        slow: float = 0.02,
        writing: int = 3,
        noise: float = 0.0,
    ) -> None:
        self.now, self.step, self.copy, self.slow, self.writing, self.noise = 0.0, step, copy, slow, writing, noise
        self.told: list[str] = []
        self.cadence = Cadence(budget, clock=lambda: self.now, tell=self.told.append)
        self.steps, self.left, self.lost, self.asked = 0, 0, 0.0, False
        self.taken: list[float] = []
        self.random = random.Random(1)
        self.cadence.reached(0, "next_epoch", writing=False)

    def run(self, steps: int, following: str = NEXT) -> None:
        for _ in range(steps):
            self.now += self.step * max(self.random.gauss(1, self.noise), 0.1)
            if self.left:
                self.now += self.slow
                self.lost += self.slow
                self.left -= 1
            self.steps += 1
            wanted = self.cadence.reached(self.steps, following, writing=self.left > 0)
            if self.asked and following != "validation":  # the request of the step before has reached all ESTs
                self.take()
            self.asked |= wanted

    def take(self) -> None:
        self.asked, self.left = False, self.writing
        self.taken.append(self.now)
        self.now += self.copy
        self.lost += self.copy
        self.cadence.took(self.copy)


@pytest.mark.parametrize("budget", [0.003, 0.01, 0.05])
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
def test_snapshots_cost_no_more_than_the_budget_and_most_of_it(budget: float, noise: float) -> None:
    """Whatever the noise of steps; the first ones, before anything is known, aside."""
    training = Training(budget, noise=noise)
    training.run(500)
    began, lost = training.now, training.lost
    training.run(40_000)
    share = (training.lost - lost) / (training.now - began)
    assert share <= budget
    assert share >= 0.4 * budget


def test_the_first_snapshot_comes_early_and_the_next_when_its_cost_is_earned() -> None:
    training = Training()
    training.run(400)
    cost = training.copy + training.writing * training.slow
    assert training.taken[0] <= (cadence.FIRST_STEPS + 3) * training.step
    assert training.cadence.cost == pytest.approx(cost)
    assert training.taken[1] - training.taken[0] >= cost / 0.01
    (line,) = training.told
    assert "a snapshot costs training 70 ms, a step takes 100 ms: with `snapshot_budget=0.01` one follows every" in line


def test_where_steps_are_long_the_first_snapshot_waits_for_few() -> None:
    training = Training(step=20.0)
    training.run(5)
    assert len(training.taken) == 1


def test_a_snapshot_costs_at_least_its_copy() -> None:
    """Noise may hide what it costs, not that training has waited."""
    training = Training(copy=0.05, slow=-0.02)
    training.run(5000)
    assert training.cadence.cost == pytest.approx(0.05)


def test_intervals_have_bounds() -> None:
    dear = Training(copy=30.0, step=1.0)
    dear.run(5000)
    apart = [b - a for a, b in zip(dear.taken, dear.taken[1:], strict=False)]
    assert cadence.LONGEST_S <= median(apart) <= cadence.LONGEST_S + 40
    cheap = Training(copy=0.0, slow=0.0)
    cheap.run(1000)
    apart = [b - a for a, b in zip(cheap.taken, cheap.taken[1:], strict=False)]
    assert min(apart) >= cadence.SHORTEST_S


def test_a_validation_and_a_pause_are_no_cost_and_earn_nothing() -> None:
    """Two runs with the same steps take as many snapshots, whatever lies between."""

    def taken(*, pauses: bool) -> int:
        training = Training()
        for _ in range(60):
            training.run(10)
            if pauses:
                training.now += 3.0
            training.run(9)
            training.run(1, "validation")
            if pauses:
                training.now += 0.6
            training.cadence.reached(training.steps, NEXT, writing=training.left > 0)
        assert training.cadence.cost == pytest.approx(0.07)
        return len(training.taken)

    assert taken(pauses=False) > 10
    assert taken(pauses=False) - 2 <= taken(pauses=True) <= taken(pauses=False)


def test_a_single_slow_step_does_not_decide() -> None:
    """One hiccup while a snapshot is written is outvoted by the other snapshots."""
    training = Training()
    training.run(5000)
    before = training.cadence.interval
    while not training.left:
        training.run(1)
    training.now += 0.9
    training.run(10)
    assert training.cadence.interval == pytest.approx(before)


def test_what_changes_much_is_told_and_followed() -> None:
    training = Training()
    training.run(5000)
    assert len(training.told) == 1
    training.slow = 0.3
    training.run(20_000)
    assert len(training.told) >= 2
    assert training.cadence.cost == pytest.approx(0.01 + 3 * 0.3)


BAD = [
    ({"snapshot_every_n_steps": "often"}, r"`snapshot_every_n_steps='often'` is not an interval. HINT: .*\"auto\""),
    ({"snapshot_every_n_steps": 0}, r"`snapshot_every_n_steps=0` is not an interval. HINT: "),
    ({"snapshot_every_n_steps": 2.5}, r"`snapshot_every_n_steps=2.5` is not an interval. HINT: "),
    ({"snapshot_every_n_steps": "auto", "snapshot_budget": 0}, r"`snapshot_budget=0` is not a share .* HINT: "),
    ({"snapshot_every_n_steps": "auto", "snapshot_budget": 1.5}, r"`snapshot_budget=1.5` is not a share .* HINT: "),
    ({"snapshot_every_n_steps": 10, "snapshot_budget": 0.1}, r"`snapshot_budget=0.1` has no meaning with .*=10`. HINT"),
    (
        {"snapshot_every_n_steps": "auto", "elastic_dir": None},
        r"='auto'` has nowhere to write. HINT: set `elastic_dir`",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_a_bad_interval_is_one_error_with_value_and_cure(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EasyScaleStrategy(**{"num_ests": 2, "elastic_dir": "somewhere", **arguments})
