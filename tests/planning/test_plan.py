import random
from itertools import product

import pytest

from lightning_easyscale.placement import Placement
from lightning_easyscale.planning import Communication, Link, ests_that_fit, plan, waste_and_speedup, worth_moving

SECONDS = {"v100": 0.25, "p100": 0.42, "t4": 0.6}


def step(counts, seconds):
    return max(a * t for a, t in zip(counts, seconds, strict=True))


def test_ests_come_in_device_order_for_lists_and_counts():
    by_list = plan(4, ["p100", "v100", "p100"], {"v100": 0.5, "p100": 1.0})
    assert by_list.ests_per_device == (1, 2, 1)
    assert by_list.step_seconds == 1.0
    by_counts = plan(4, {"v100": 1, "p100": 2}, {"v100": 0.5, "p100": 1.0})
    assert by_counts.devices == ("v100", "p100", "p100")
    assert by_counts.ests_per_device == (2, 1, 1)
    assert by_counts.placement.ests_per_executor == (2, 1, 1)


def test_uneven_counts_on_equal_devices_reach_the_minimum_with_exactly_p_ests():
    allocation = plan(8, {"v100": 3}, SECONDS)
    assert sorted(allocation.ests_per_device) == [2, 3, 3]
    assert allocation.num_ests == 8


def test_equal_speeds_give_the_even_split():
    for n in range(1, 20):
        for k in range(1, n + 1):
            found = plan(n, {"a": k // 2, "b": k - k // 2}, {"a": 1.0, "b": 1.0}, use_every_device=True)
            assert found.placement == Placement.even(n, k)


def test_devices_that_add_no_speed_stay_idle():
    allocation = plan(4, {"v100": 3}, SECONDS)  # ceil(4/3) = ceil(4/2): the third is of no use
    assert allocation.ests_per_device == (2, 2, 0)
    assert allocation.used == (0, 1)
    assert plan(4, {"v100": 3}, SECONDS, use_every_device=True).ests_per_device == (2, 1, 1)


def test_plan_matches_enumeration_with_all_ties():
    """Step time, then fewest devices, then least migration: against every possible allocation."""
    rng = random.Random(3)
    for _ in range(250):
        n, num_ests = rng.randint(1, 4), rng.randint(1, 6)
        names = [rng.choice(["a", "b", "c"]) for _ in range(n)]
        seconds = {"a": rng.randint(1, 6), "b": rng.randint(1, 6), "c": rng.randint(1, 6)}
        times = [seconds[x] for x in names]
        old = [0] * n
        for _ in range(num_ests):
            old[rng.randrange(n)] += 1
        every = rng.random() < 0.3 and n <= num_ests
        found = plan(num_ests, names, seconds, previous=old, use_every_device=every)
        options = [
            c for c in product(range(num_ests + 1), repeat=n) if sum(c) == num_ests and (not every or min(c) > 0)
        ]

        def rank(c, times=times, old=old, num_ests=num_ests):
            kept = sum(min(a, b) for a, b in zip(c, old, strict=True))
            return step(c, times), sum(a > 0 for a in c), num_ests - kept

        best = min(map(rank, options))
        assert rank(found.ests_per_device) == best
        assert found.moved == best[2]
        assert found.step_seconds == pytest.approx(best[0])


def test_communication_can_make_fewer_devices_faster():
    slow = Communication(1e9, Link(0.0, 1e9))
    rng = random.Random(4)
    for _ in range(150):
        n, num_ests = rng.randint(1, 5), rng.randint(1, 6)
        names = [rng.choice("ab") for _ in range(n)]
        seconds = {"a": rng.uniform(0.1, 2), "b": rng.uniform(0.1, 2)}
        found = plan(num_ests, names, seconds, communication=slow)
        times = [seconds[x] for x in names]
        best = min(
            step(c, times) + slow.seconds(sum(a > 0 for a in c))
            for c in product(range(num_ests + 1), repeat=n)
            if sum(c) == num_ests
        )
        assert found.step_seconds == pytest.approx(best, abs=1e-8)


def test_switching_and_memory_limits_count():
    allocation = plan(6, {"v100": 1, "t4": 2}, {"v100": 0.1, "t4": 1.0}, max_ests={"v100": 4}, switch_seconds=0.01)
    assert allocation.ests_per_device == (4, 1, 1)
    only = plan(4, {"v100": 1}, {"v100": 0.1}, switch_seconds=0.01, fixed_seconds=0.5)
    assert only.step_ns == 500_000_000 + 4 * 100_000_000 + 3 * 10_000_000


def test_without_d2_one_type_is_used_the_fastest_way():
    two_fast = plan(8, {"v100": 1, "t4": 4}, {"v100": 0.25, "t4": 0.6}, mix_types=False)
    assert two_fast.ests_per_device == (0, 2, 2, 2, 2)
    assert two_fast.step_seconds == pytest.approx(1.2)
    assert plan(8, {"v100": 2, "t4": 4}, {"v100": 0.25, "t4": 0.6}, mix_types=False).used == (0, 1)
    rng = random.Random(6)
    for _ in range(100):
        n, num_ests = rng.randint(1, 5), rng.randint(1, 6)
        names = [rng.choice("ab") for _ in range(n)]
        seconds = {"a": rng.randint(1, 5), "b": rng.randint(1, 5)}
        best = min(
            step(c, [seconds[x] for x in names])
            for c in product(range(num_ests + 1), repeat=n)
            if sum(c) == num_ests and len({x for x, a in zip(names, c, strict=True) if a}) == 1
        )
        found = plan(num_ests, names, seconds, mix_types=False)
        assert found.step_seconds == best
        assert len({names[i] for i in found.used}) == 1
    with pytest.raises(ValueError, match="contradict"):
        plan(4, ["v100", "t4"], SECONDS, mix_types=False, use_every_device=True)
    with pytest.raises(ValueError, match="do not fit"):
        plan(4, ["v100", "t4"], SECONDS, mix_types=False, max_ests={"v100": 3, "t4": 3})


def test_memory_gives_the_number_of_ests():
    assert ests_that_fit(16, fixed_bytes=6, est_bytes=3) == 3
    assert ests_that_fit(16, fixed_bytes=6, est_bytes=0) is None
    assert ests_that_fit(4, fixed_bytes=6, est_bytes=1) == 0
    with pytest.raises(ValueError, match="est_bytes=-1"):
        ests_that_fit(4, fixed_bytes=6, est_bytes=-1)


def test_one_slow_device_is_planned_by_its_own_name():
    seconds = {"v100": 0.25, "v100:1": 0.50}
    assert plan(6, ["v100", "v100:1"], seconds).ests_per_device == (4, 2)


def test_speedup_telescopes_to_p_over_f():
    rng = random.Random(5)
    for _ in range(2000):
        n = rng.randint(1, 6)
        ests = [rng.randint(0, 6) for _ in range(n)]
        if not sum(ests):
            continue
        times = [rng.uniform(0.1, 1.0) for _ in range(n)]
        num_ests = rng.randint(1, sum(ests))
        waste, speedup = waste_and_speedup(num_ests, ests, times, 1.0)
        overload = max(a * t for a, t in zip(ests, times, strict=True))
        assert speedup == pytest.approx(num_ests / overload, rel=1e-12)
        assert -1e-12 <= waste < 1


def test_throughput_is_ests_per_second():
    allocation = plan(4, {"v100": 2}, SECONDS)
    assert allocation.throughput == pytest.approx(8.0)
    assert allocation.speedup == pytest.approx(2.0)
    assert plan(4, {"v100": 2}, SECONDS, reference="t4").speedup == pytest.approx(2 * 0.6 / 0.25)
    assert allocation.waste == pytest.approx(0.0)


def test_moving_pays_only_beyond_its_cost():
    assert worth_moving(1.0, 0.9, 1000, 20.0)
    assert not worth_moving(1.0, 0.9, 100, 20.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, {"v100": 1}, SECONDS), "num_ests=0"),
        ((4, {"v100": -1}, SECONDS), r"'v100': -1"),
        ((4, {"v100": 0}, SECONDS), "`devices` is empty"),
        ((4, [], SECONDS), "`devices` is empty"),
        ((4, "v100", SECONDS), "one string"),
        ((4, ["a100"], SECONDS), "no time for device type `a100`"),
        ((4, ["x"], {"x": 0.0}), r"step_seconds\['x'\]=0.0"),
        ((4, ["x"], {"x": float("nan")}), "nan"),
    ],
)
def test_bad_input_is_named(arguments, words):
    with pytest.raises(ValueError, match=words) as caught:
        plan(*arguments)
    assert "HINT" in str(caught.value)


def test_previous_must_describe_the_devices():
    with pytest.raises(ValueError, match="previous"):
        plan(4, {"v100": 2}, SECONDS, previous=[4])
    with pytest.raises(ValueError, match="previous"):
        plan(4, {"v100": 2}, SECONDS, previous=[4, 4])
