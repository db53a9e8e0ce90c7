"""The collector against stock DDP, for the `tree` order with the ordered hook, in real processes over gloo."""

from __future__ import annotations

import pytest

from lightning_easyscale.placement import Placement

from .pool import Pool
from .tasks import compositions
from .training import STEPS, collected, stock

SCENARIOS = ("plain", "accumulate", "kept", "zeroed", "two_backwards", "unused", "static", "hooked", "reordered")
_expected: dict[tuple[int, str, str, bool], dict[int, list[str]]] = {}


def expected(pool: Pool, n: int, scenario: str, order: str = "tree", view: bool = False) -> dict[int, list[str]]:
    key = n, scenario, order, view
    if key not in _expected:
        answers = pool.run(n, stock, scenario=scenario, order=order, view=view)
        _expected[key] = {rank: seen for answer in answers for rank, seen in answer.items()}
    return _expected[key]


def ours(pool: Pool, scenario: str, placement: tuple[int, ...], **options: object) -> dict[int, list[str]]:
    answers = pool.run(len(placement), collected, scenario=scenario, placement=placement, **options)
    return {rank: seen for answer in answers for rank, seen in answer.items()}


@pytest.mark.parametrize("announced", [False, True], ids=["untold", "told"])
@pytest.mark.parametrize("placement", [(3,), (1, 1, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_collected_gradients_equal_stock_ddp_with_the_ordered_hook(
    pool: Pool, scenario: str, placement: tuple[int, ...], announced: bool
) -> None:
    reference = expected(pool, sum(placement), scenario)
    assert ours(pool, scenario, placement, announced=announced) == reference
    assert all(len(set(seen)) == STEPS for seen in reference.values())


@pytest.mark.parametrize("announced", [False, True], ids=["untold", "told"])
@pytest.mark.parametrize("placement", [(3,), (1, 1, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("scenario", [*SCENARIOS, "aliased"])
def test_collected_buckets_equal_stock_ddp(
    pool: Pool, scenario: str, placement: tuple[int, ...], announced: bool
) -> None:
    got = ours(pool, scenario, placement, order="ddp", announced=announced)
    assert got == expected(pool, sum(placement), scenario, "ddp")


@pytest.mark.parametrize("announced", [False, True], ids=["untold", "told"])
@pytest.mark.parametrize("placement", [(3,), (1, 3)], ids=str)
@pytest.mark.parametrize("scenario", [*SCENARIOS, "aliased"])
def test_buckets_that_wait_on_the_host_equal_stock_ddp(
    pool: Pool, scenario: str, placement: tuple[int, ...], announced: bool
) -> None:
    reference = expected(pool, sum(placement), scenario, "ddp")
    assert ours(pool, scenario, placement, order="ddp", announced=announced, waits=True) == reference
    if scenario in ("plain", "hooked", "aliased"):
        # Of each executor the first EST alone has gradients.
        got = ours(pool, scenario, placement, order="ddp", announced=announced, waits=True, private=False)
        for ests in Placement(placement).ranges:
            assert got[ests.start] == reference[ests.start]


@pytest.mark.parametrize("scenario", ["plain", "accumulate", "kept", "zeroed", "unused", "static", "aliased"])
def test_gradient_as_bucket_view_scales_as_stock_ddp(pool: Pool, scenario: str) -> None:
    got = ours(pool, scenario, (2, 1), order="ddp", view=True)
    assert got == expected(pool, 3, scenario, "ddp", view=True)


@pytest.mark.parametrize("scenario", ["plain", "kept", "unused"])
def test_gradient_as_bucket_view_changes_no_bits_under_the_hook(pool: Pool, scenario: str) -> None:
    assert expected(pool, 3, scenario, view=True) == expected(pool, 3, scenario)


@pytest.mark.matrix
@pytest.mark.parametrize("placement", [c for n in range(2, 6) for c in compositions(n)], ids=str)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_collected_gradients_equal_stock_ddp_for_every_placement(
    pool: Pool, scenario: str, placement: tuple[int, ...]
) -> None:
    for announced in (False, True):
        got = ours(pool, scenario, placement, announced=announced)
        assert got == expected(pool, sum(placement), scenario)
    for view in (False, True):
        got = ours(pool, scenario, placement, order="ddp", view=view, announced=not view)
        assert got == expected(pool, sum(placement), scenario, "ddp", view)
