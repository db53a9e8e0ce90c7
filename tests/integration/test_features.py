"""Every feature of stock DDP, with the bits of stock DDP."""

from __future__ import annotations

import zlib

import pytest

from .harness import RunFailedError, Runs, compare
from .scenario import FEATURES, Feature

PLACEMENTS = {2: [(2,), (1, 1)], 3: [(3,), (2, 1)], 4: [(4,), (1, 3)]}


def worlds() -> list[tuple[Feature, int]]:
    """Every feature with each N that it is run with; one without a wish gets one that depends on its name alone."""
    return [(f, n) for f in FEATURES for n in f.worlds or ((2, 3, 4)[zlib.crc32(f.name.encode()) % 3],)]


def cases() -> list[object]:
    """Every feature on one placement of its first N; all N on both in the full product."""
    found: list[object] = []
    for item, n in worlds():
        chosen = (zlib.crc32(item.name.encode()) + n) % 2
        for i, placement in enumerate(PLACEMENTS[n]):
            marks = [pytest.mark.xfail(strict=True, reason=item.xfail)] if item.xfail else []
            first = n == (item.worlds or (n,))[0]
            marks += [] if first and i == chosen else [pytest.mark.matrix]
            name = f"{item.name}-{'+'.join(map(str, placement))}".replace(" ", "_")
            found.append(pytest.param(item, placement, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("item", "placement"), cases())
def test_feature_equals_stock_ddp(runs: Runs, item: Feature, placement: tuple[int, ...]) -> None:
    config = dict(item.config)
    if "skip_without" in config:
        pytest.importorskip(config["skip_without"])
    reference = runs.reference(item.build, config, sum(placement))
    got = runs.easyscale(item.build, config, placement)
    if item.same_error:
        errors = [e for e in reference.errors if e is not None and e["type"] == item.same_error]
        assert errors, reference.errors
        # Every executor ends, and the first to fail shows the very error.
        assert all(got.errors)
        shown = [(e["type"], e["message"]) for e in got.errors]
        assert (errors[0]["type"], errors[0]["message"]) in shown, shown
        return
    for name, outcome in (("reference", reference), ("run", got)):
        if outcome.error is not None:
            raise RunFailedError(f"the {name} failed: {outcome.error['traceback']}\n{outcome.error['log']}")
    compare(reference, got, files=item.files)
