"""Exact allocation of P ESTs to devices: minimise the slowest device's step time.

Threshold view: at a limit ``f`` device ``g`` can take ``u_g(f) = max{a: T_g(a) <= f}`` ESTs, so ``f`` is feasible
exactly when ``sum u_g(f) >= P``. Feasibility is monotone in ``f``; bisecting integer nanoseconds finds the smallest
feasible limit without a tolerance. Heap view: P times give the next EST to the device on which it would finish first;
optimal for every prefix, and the ESTs' finish times are then, rank by rank, as early as they can be. Both are
polynomial and are tested against an integer program.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from lightning_easyscale.planning.step_time import StepTime


def capacities(limit_ns: int, models: Sequence[StepTime], num_ests: int) -> list[int]:
    """ESTs each device can take within `limit_ns`, never more than `num_ests`."""
    fits = (model.capacity(limit_ns) for model in models)
    return [num_ests if fit is None else min(fit, num_ests) for fit in fits]


def smallest_limit(num_ests: int, models: Sequence[StepTime], *, at_least_one: bool = False) -> int:
    """The optimal step time f* in nanoseconds.

    Args:
        num_ests: P, at least 1.
        models: one step-time function per device.
        at_least_one: every device must host an EST.

    Raises:
        ValueError: if the devices cannot hold P ESTs (memory), or there are more devices than ESTs to give one each.
    """
    room = [num_ests if m.max_ests is None else min(m.max_ests, num_ests) for m in models]
    if sum(room) < num_ests:
        raise ValueError(
            f"`num_ests={num_ests}` do not fit: the {len(models)} devices hold {sum(room)} ESTs by their memory limits."
            " HINT: add devices or raise `max_ests`."
        )
    low = 0
    if at_least_one:
        if len(models) > num_ests or 0 in room:
            raise ValueError(
                f"`num_ests={num_ests}` cannot run on {len(models)} devices: every device needs at least one EST."
                f" HINT: set `devices<={num_ests}`, raise `num_ests`, or leave `use_every_device` off."
            )
        low = max(m.time_ns(1) for m in models) - 1
    # Every device full is always enough.
    high = max(m.time_ns(a) for m, a in zip(models, room, strict=True))
    while high - low > 1:
        middle = (low + high) // 2
        if sum(capacities(middle, models, num_ests)) >= num_ests:
            high = middle
        else:
            low = middle
    return high


def fill_in_order_of_finish(
    num_ests: int, models: Sequence[StepTime], lower: Sequence[int], upper: Sequence[int]
) -> list[int]:
    """Give ESTs one by one to the device on which the next one finishes first, between bounds.

    Args:
        num_ests: P; ``sum(lower) <= P <= sum(upper)``.
        models: one step-time function per device.
        lower: ESTs each device starts with.
        upper: ESTs each device may not exceed.

    Returns:
        ESTs per device. Ties go to the earlier device, so the result is a function of the input alone.
    """
    counts = list(lower)
    heap = [(m.time_ns(a + 1), i) for i, (m, a, u) in enumerate(zip(models, counts, upper, strict=True)) if a < u]
    heapq.heapify(heap)
    for _ in range(num_ests - sum(counts)):
        _, i = heapq.heappop(heap)
        counts[i] += 1
        if counts[i] < upper[i]:
            heapq.heappush(heap, (models[i].time_ns(counts[i] + 1), i))
    return counts


def fewest_devices(num_ests: int, room: Sequence[int], keep: Sequence[int]) -> list[int]:
    """The smallest set of devices with enough room; among these the one that keeps the most ESTs where they are.

    Exact: the smallest size k is known from filling the roomiest devices first; a knapsack over (size, room) then
        maximises
    the ESTs kept. Devices are taken in order on ties.

    Args:
        num_ests: P.
        room: ``u_g`` per device.
        keep: ``min(a_old, u_g)`` per device; all zero when nothing runs yet.

    Returns:
        Indices in ascending order.
    """
    order = sorted(range(len(room)), key=lambda i: (-room[i], i))
    size, total = 0, 0
    while total < num_ests:
        total += room[order[size]]
        size += 1
    if not any(keep):
        return sorted(order[:size])
    # best[k][r] = (ESTs kept, devices) with k devices and room r (r capped at P); devices as a chain of pairs.
    best: list[dict[int, tuple[int, tuple | None]]] = [{} for _ in range(size + 1)]
    best[0][0] = (0, None)
    for i, (u, kept) in enumerate(zip(room, keep, strict=True)):
        if u == 0:
            continue
        for k in range(min(i, size - 1), -1, -1):
            for r, (value, chain) in best[k].items():
                cell = min(num_ests, r + u)
                if cell not in best[k + 1] or best[k + 1][cell][0] < value + kept:
                    best[k + 1][cell] = (value + kept, (i, chain))
    chain = best[size][num_ests][1]
    chosen = []
    while chain is not None:
        i, chain = chain
        chosen.append(i)
    return sorted(chosen)
