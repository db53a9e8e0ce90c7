"""Loader workers across changes of placement inside an epoch: the bits of an undisturbed stock run."""

from __future__ import annotations

import pytest

from .harness import RunFailedError, Runs, compare
from .scenario import FEATURES, Feature

# What a checkpoint cannot know: a counter in a worker's dataset, what a hook has set there when the epoch began.
HIDDEN = ("every generator, worker information, mutated datasets", "a worker each", "dataset changed between epochs")
CHANGED = [f for f in FEATURES if f.group == "Loader workers" and f.name not in HIDDEN and not f.same_error]
CHEAP = ("worker_init_fn", "persistent_workers", "generator=", "iterable dataset with a state", "StatefulDataLoader,")


def cases() -> list[object]:
    found = []
    for number, item in enumerate(CHANGED):
        # In the first epoch, at its first batch, and in a later one.
        short = "validation" in item.name  # four batches
        for stop in (1, 2, 3) if short else (1, 2 + number % 2, 7):
            cheap = stop == (2 + number % 2, 7)[number % 2] and item.name.startswith(CHEAP)
            marks = [] if cheap else [pytest.mark.matrix]
            found.append(pytest.param(item, stop, id=f"{item.name.replace(' ', '_')}-{stop}", marks=marks))
    return found


@pytest.mark.parametrize(("scenario", "stop"), cases())
def test_workers_go_on_inside_an_epoch_on_another_placement(runs: Runs, scenario: Feature, stop: int) -> None:
    config = dict(scenario.config)
    if "skip_without" in config:
        pytest.importorskip(config["skip_without"])
    reference = runs.reference(scenario.build, config, 3)
    if reference.error is not None:
        raise RunFailedError(reference.error["traceback"])
    compare(reference, runs.elastic(scenario.build, config, [((2, 1), stop), ((3,), stop + 1), ((1, 2), None)]))
