"""Snapshots: whatever kills a process, the newest good one is left, and the rest of the run has the bits it should."""

from __future__ import annotations

from typing import Any

import pytest

from ..integration.harness import Runs
from .faults import Fault
from .lives import check_finished, check_tail

JOB = "tests.elastic.jobs:job"
full = pytest.mark.matrix
KILL = "SIGKILL"


ACCUMULATE = {"accumulate_grad_batches": 3}
WORKERS = {"workers": 2}


def case(name: str, fault: Fault, placement: tuple[int, ...], config: dict[str, Any], *marks: Any) -> Any:
    return pytest.param(fault, placement, config, id=name, marks=marks)


def at(rank: int, step: int, phase: str, action: str = KILL, nth: int = 1) -> Fault:
    return Fault(rank, step, phase, action, nth)


TRAINING, WORKER = "on_train_batch_start", "SIGKILL to a loader worker"
CRASHES = [
    case("killed in training", at(1, 7, TRAINING), (3,), {}),
    case("one of two killed", at(2, 7, TRAINING), (2, 1), {}, full),
    case("the one that saves is killed", at(0, 7, TRAINING), (2, 1), {}, full),
    case("killed in backward", at(1, 7, "on_before_backward"), (2, 1), {}, full),
    case("killed before the optimizer steps", at(1, 7, "on_before_optimizer_step"), (3,), {}, full),
    case("killed in an accumulation", at(2, 4, TRAINING, nth=2), (2, 1), ACCUMULATE, full),
    case("killed in validation", at(0, 8, "on_validation_batch_start"), (3,), {}, full),
    case("killed between epochs", at(1, 8, "on_train_epoch_end"), (2, 1), {}, full),
    case("killed while it writes a snapshot", at(1, 6, TRAINING, "SIGKILL in a save"), (3,), {}),
    case("killed while a user's checkpoint is written", at(0, 8, "on_save_checkpoint"), (2, 1), {}, full),
    case("a loader worker is killed", at(0, 6, TRAINING, WORKER), (2, 1), WORKERS, full),
    case("an exception in training", at(1, 7, TRAINING, "exception"), (2, 1), {}, full),
    case("an exception in validation", at(2, 8, "on_validation_batch_start", "exception"), (2, 1), {}, full),
    case("an exception while saving", at(1, 8, "on_save_checkpoint", "exception"), (3,), {}, full),
]


@pytest.mark.parametrize(("fault", "placement", "config"), CRASHES)
def test_a_crash_costs_the_steps_since_the_newest_snapshot(
    runs: Runs, fault: Fault, placement: tuple[int, ...], config: dict[str, Any]
) -> None:
    """The job goes on from the newest good snapshot on other executors; the rest has the bits of stock DDP."""
    config = {"pause": 0.02, **config}  # a snapshot that comes while another one is written is left out
    reference = runs.reference(JOB, config, 3)
    first, second = runs.lives(JOB, config, [placement, (2, 1)], [fault], snapshot_every_n_steps=2)
    assert all(first.errors), [error and error["message"] for error in first.errors]
    newest = max(first.left)
    step, batch = int(newest[5:13]), int(newest[20:28])
    assert fault.step - 3 <= step <= fault.step, newest
    check_tail(reference, second, again_from=batch)
    assert f"checkpoints/{newest}`" in second.logs[0]


@full
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(at(1, 0, "setup"), id="killed in start-up"),
        pytest.param(at(2, 0, "on_sanity_check_start"), id="killed in the sanity check"),
    ],
)
def test_a_crash_before_the_first_snapshot_costs_all(runs: Runs, fault: Fault) -> None:
    """The job begins again, with a new version of its logs, and all of it has the bits of stock DDP."""
    reference = runs.reference(JOB, {}, 3)
    first, second = runs.lives(JOB, {}, [(2, 1), (3,)], [fault], snapshot_every_n_steps=2)
    assert all(first.errors)
    assert first.left == {}
    check_finished(reference, [second], files=False)
