import lightning.pytorch as pl
import pytest

from lightning_easyscale import Rebalance, rebalance
from lightning_easyscale.rebalance import StepSeconds, find_move


def test_ests_go_where_a_step_takes_least():
    move = find_move(10, (2, 2), (1.0, 2.6), steps_left=100, cost_seconds=30.0)
    assert move is not None
    assert move.ests_per_executor == (3, 1)
    assert (move.step_seconds_before, move.step_seconds) == (5.2, 3.0)


def test_nothing_moves_where_the_rest_is_too_short_or_all_is_well():
    assert find_move(10, (2, 2), (1.0, 2.6), steps_left=13, cost_seconds=30.0) is None
    assert find_move(10, (3, 1), (1.0, 2.6), steps_left=1e9, cost_seconds=0.0) is None


def test_every_executor_keeps_an_est():
    move = find_move(0, (2, 2), (1.0, 50.0), steps_left=float("inf"), cost_seconds=30.0)
    assert move is not None
    assert move.ests_per_executor == (3, 1)


def test_no_executor_gets_more_ests_than_fit():
    where = {"steps_left": float("inf"), "cost_seconds": 30.0}
    assert find_move(0, (2, 2), (1.0, 50.0), max_ests=(2, None), **where) is None
    move = find_move(0, (2, 3), (1.0, 50.0), max_ests=(3, None), **where)
    assert move is not None
    assert move.ests_per_executor == (3, 2)


def test_waiting_and_pauses_are_no_work(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 100.0, 101.0])
    monkeypatch.setattr(rebalance.time, "perf_counter", lambda: next(clock))
    measured = StepSeconds(8)
    assert measured.seconds is None
    measured.mark(0.0)
    measured.mark(0.25)  # 1 s, of which 0.25 s waiting
    measured.mark(1.0)  # 2 s, of which 0.75 s waiting
    measured.pause()  # validation
    measured.mark(1.0)
    measured.mark(1.5)
    assert measured.seconds == 0.75  # the median of 0.75, 1.25 and 0.5


@pytest.mark.parametrize(
    ("arguments", "words"), [({"every_n_steps": 1}, "`every_n_steps=1`"), ({"cost_seconds": -1}, "`cost_seconds=-1`")]
)
def test_bad_arguments_are_named(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        Rebalance(tmp_path, **arguments)


def test_other_strategies_are_refused(tmp_path):
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(TypeError, match="`Rebalance` needs `EasyScaleStrategy`"):
        Rebalance(tmp_path).setup(trainer, pl.LightningModule(), "fit")
