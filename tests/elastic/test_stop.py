"""A stop signal at any moment: one checkpoint, one exit code, and the bits of a run that nobody disturbed."""

from __future__ import annotations

from typing import Any

import pytest

from ..integration.harness import Runs
from .faults import Fault
from .lives import check_finished, check_stopped, check_tail

JOB = "tests.elastic.jobs:job"
TWICE = {"val_check_interval": 2}
PLATEAU = {**TWICE, "plateau": "step"}
ACCUMULATE = {"accumulate_grad_batches": 3, "plateau": "epoch"}
MICRO = {"accumulate_grad_batches": 8, "batch": 2}
STEPS = {"max_epochs": None, "max_steps": 10}
LONG = {"val_batch": 1}
COMPILED = {"compiled": True, "num_sanity_val_steps": 0}
full = pytest.mark.matrix


def case(
    name: str,
    fault: Fault | list[Fault],
    first: Any,
    second: Any,
    config: Any,
    position: Any,
    boundary: str,
    *marks: Any,
) -> Any:
    """A signal, the placements before and after, the job, and the batch (and step) and boundary at which all stop."""
    return pytest.param(fault, first, second, config, position, boundary, id=name, marks=marks)


def at(rank: int, step: int, phase: str, nth: int = 1, action: str = "SIGTERM") -> Fault:
    return Fault(rank, step, phase, action, nth)


TRAINING, SAVING = "on_train_batch_start", "on_save_checkpoint"
STOPS = [
    case("training", at(2, 2, TRAINING), (2, 1), (3,), {}, 3, "next_batch"),
    case("training, before a validation", at(2, 3, TRAINING), (2, 1), (3,), {}, 4, "validation", full),
    case("after a batch", at(0, 6, "on_train_batch_end"), (3,), (1, 2), TWICE, 6, "validation", full),
    case("mid-epoch validation due", at(1, 5, "on_after_backward"), (3,), (2, 1), TWICE, 6, "validation"),
    case("accumulating", at(0, 2, TRAINING, 2), (2, 1), (3,), ACCUMULATE, (3, 7), "next_batch", full),
    case("in a long accumulation", at(1, 0, TRAINING, 2), (2, 1), (3,), MICRO, (0, 4), "next_batch"),
    case("validating", at(1, 4, "on_validation_batch_start"), (2, 1), (3,), LONG, 4, "validation"),
    case("in a short validation", at(0, 6, "on_validation_batch_end", 2), (3,), (2, 1), TWICE, 6, "next_batch", full),
    case("validation ends", at(2, 4, "on_validation_end"), (2, 1), (3,), {}, 4, "next_epoch", full),
    case("mid-epoch validation ends", at(0, 6, "on_validation_end"), (2, 1), (3,), PLATEAU, 6, "next_batch"),
    case("writing a checkpoint", at(0, 4, SAVING, 2), (2, 1), (3,), {}, 4, "next_epoch", full),
    case("epoch ends", at(1, 4, "on_train_epoch_end"), (2, 1), (3,), {}, 4, "next_epoch"),
    case("epoch ends under max_steps", at(1, 4, "on_train_epoch_end"), (2, 1), (3,), STEPS, 4, "next_epoch", full),
    case("epoch starts", at(2, 8, "on_train_epoch_start"), (2, 1), (3,), {}, 9, "next_batch", full),
    case("compiling", at(0, 0, "compile"), (2, 1), (3,), COMPILED, 1, "next_batch", full),
    case("to every executor", [at(0, 2, TRAINING), at(2, 2, TRAINING)], (2, 1), (3,), {}, 3, "next_batch", full),
    case("SIGUSR1", at(2, 2, TRAINING, action="SIGUSR1"), (2, 1), (1, 1, 1), {}, 3, "next_batch", full),
    case("tree order", at(2, 2, TRAINING), (3,), (2, 1), {"reduction": "tree"}, 3, "next_batch", full),
]


@pytest.mark.parametrize(("fault", "first", "second", "config", "position", "boundary"), STOPS)
def test_a_stop_loses_no_bit(
    runs: Runs,
    fault: Fault | list[Fault],
    first: tuple[int, ...],
    second: tuple[int, ...],
    config: dict[str, Any],
    position: int | tuple[int, int],
    boundary: str,
) -> None:
    """All ESTs stop at one boundary with one checkpoint; stop and resumption have the bits of stock DDP."""
    options = dict(config)
    faults = fault if isinstance(fault, list) else [fault]
    reduction = options.pop("reduction", "ddp")
    reference = runs.reference(JOB, options, sum(first), reduction)
    lives = runs.lives(JOB, options, [first, second], faults, reduction)
    step, batch = position if isinstance(position, tuple) else (position, position)
    saved = {f"step={step:08d}-batch={batch:08d}.ckpt": boundary}
    check_stopped(lives[0], ranks=sum(first), saved=saved)
    check_finished(reference, lives)


@pytest.mark.parametrize(
    ("fault", "placement"),
    [
        pytest.param(at(2, 0, "setup"), (2, 1), id="start-up"),
        pytest.param(at(0, 0, "on_sanity_check_start"), (3,), id="sanity check", marks=full),
        pytest.param(at(1, 0, "on_train_start"), (2, 1), id="training starts", marks=full),
    ],
)
def test_before_the_first_step_there_is_nothing_to_save(runs: Runs, fault: Fault, placement: tuple[int, ...]) -> None:
    """Every process ends with exit code 75, nothing is saved and no step is done."""
    (life,) = runs.lives(JOB, {}, [placement], [fault])
    check_stopped(life, ranks=3, saved={})
    assert not [name for name, _ in life.notes[0] if name.startswith("train ")]


@full
@pytest.mark.parametrize("fault", [pytest.param(at(1, 4, SAVING, 1, "SIGTERM twice"), id="a second signal")])
def test_a_second_signal_ends_a_process_at_once(runs: Runs, fault: Fault) -> None:
    """The process ends before the step does; the snapshot before it is the one to go on from."""
    reference = runs.reference(JOB, {"pause": 0.02}, 3)
    first, second = runs.lives(JOB, {"pause": 0.02}, [(3,), (2, 1)], [fault], snapshot_every_n_steps=2)
    assert [error["type"] for error in first.errors if error] == ["Lost"]
    newest = max(first.left)
    assert int(newest[5:13]) <= 4
    check_tail(reference, second, again_from=int(newest[5:13]))


@pytest.mark.parametrize("fault", [pytest.param(at(1, 1, TRAINING, action="group"), id="to the process group")])
def test_loader_workers_outlive_a_signal_to_the_process_group(runs: Runs, fault: Fault) -> None:
    """Loader workers, which get the signal too, serve until the ESTs have stopped and saved."""
    (life,) = runs.lives(JOB, {"workers": 2}, [(3,)], [fault])
    check_stopped(life, ranks=3, saved={"step=00000002-batch=00000002.ckpt": "next_batch"})


def test_without_an_elastic_folder_the_checkpoint_goes_to_the_default_root(runs: Runs) -> None:
    (life,) = runs.lives(JOB, {}, [(3,)], [at(1, 1, TRAINING)], elastic_dir=None)
    check_stopped(life, ranks=3, saved={})
    assert "easyscale/step=00000002-batch=00000002.ckpt" in life.files
    assert "ckpt_path='" in life.logs[0]


def test_a_finished_run_is_not_gone_on_with(runs: Runs) -> None:
    first, second = runs.lives(JOB, {"max_epochs": 1, "logger": False}, [(3,), (2, 1)], [], snapshot_every_n_steps=1)
    assert first.left == second.left == {}
    assert first.notes == second.notes
