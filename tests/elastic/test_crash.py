"""Snapshots: whatever kills a process, the newest good one is left, and the rest of the run has the bits it should."""

from __future__ import annotations

import pytest

from ..integration.harness import Runs
from .faults import Fault
from .lives import check_tail

JOB = "tests.elastic.jobs:job"
full = pytest.mark.matrix
KILL = "SIGKILL"


@pytest.mark.parametrize(
    ("fault", "placement"),
    [
        pytest.param(Fault(1, 7, "on_train_batch_start", KILL), (3,), id="killed in training"),
        pytest.param(Fault(2, 7, "on_train_batch_start", KILL), (2, 1), id="one of two killed", marks=full),
        pytest.param(Fault(0, 8, "on_validation_batch_start", KILL), (3,), id="killed in validation", marks=full),
        pytest.param(Fault(1, 6, "on_train_batch_start", "SIGKILL in a save"), (3,), id="killed in a save"),
        pytest.param(Fault(1, 7, "on_train_batch_start", "exception"), (2, 1), id="an exception", marks=full),
    ],
)
def test_a_crash_costs_the_steps_since_the_newest_snapshot(
    runs: Runs, fault: Fault, placement: tuple[int, ...]
) -> None:
    config = {"pause": 0.02}  # a snapshot that comes while another one is written is left out
    reference = runs.reference(JOB, config, 3)
    first, second = runs.lives(JOB, config, [placement, (2, 1)], [fault], snapshot_every_n_steps=2)
    assert all(first.errors)
    newest = max(first.left)
    assert newest in ("step=00000004-batch=00000004.ckpt", "step=00000006-batch=00000006.ckpt")
    check_tail(reference, second, again_from=int(newest[5:13]))
    assert f"checkpoints/{newest}`" in second.logs[0]
