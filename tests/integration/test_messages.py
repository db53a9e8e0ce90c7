"""Executors exchange two messages per training step beside the gradients themselves, and the bits stay stock DDP's."""

from __future__ import annotations

import re

import pytest

from .harness import RunFailedError, Runs, compare

JOB = "tests.integration.scenarios.buffers:buffers_job"


@pytest.mark.parametrize("placement", [(1, 1), (1, 1, 1), (2, 1)])
def test_buffers_of_every_type_are_rank_0s_with_two_messages_per_step(runs: Runs, placement: tuple[int, ...]) -> None:
    config = {"n": sum(placement)}
    reference = runs.reference(JOB, config, sum(placement))
    got = runs.easyscale(JOB, config, placement)
    for name, outcome in (("reference", reference), ("run", got)):
        if outcome.error is not None:
            raise RunFailedError(f"the {name} failed: {outcome.error['traceback']}\n{outcome.error['log']}")
    compare(reference, got)
    for log in got.logs:
        epochs = re.findall("messages per step: ([0-9 ]+)", log)
        assert epochs
        for steps in epochs:
            # Executors first see twice what follows gradients; validations take messages of their own.
            assert steps.split()[-6:] == ["2"] * 6, steps
