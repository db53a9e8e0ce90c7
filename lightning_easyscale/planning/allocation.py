"""The plan of one job: how many ESTs each device hosts, and what that gives.

``plan`` is exact. Ties are broken in a fixed order: step time, fewest devices, least migration, earliest finish of
every EST (balance), device order. The same input therefore always gives the same plan, whatever machine computes it.

Measures follow the EasyScale paper (section 3.4): with ``C_g = t_ref / t_g`` and ``f = max A_g / C_g``,
``waste_abs = sum (C_g - A_g / f) + (nEST - P) / f``, ``waste = waste_abs / sum C_g`` and the speed-up over one
reference device is ``sum C_g - waste_abs``, which telescopes to ``P / f``. They look at computing only; `step_seconds`
has the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_easyscale.placement import Placement
from lightning_easyscale.planning.communication import Communication
from lightning_easyscale.planning.minimax import capacities, fewest_devices, fill_in_order_of_finish, smallest_limit
from lightning_easyscale.planning.step_time import NANOSECONDS, AffineStepTime, to_ns


@dataclass(frozen=True)
class Allocation:
    """ESTs per device, in device order, and the plan's measures.

    Args:
        devices: the type (or name) of each device.
        ests_per_device: ESTs each hosts; 0: the device stays idle.
        step_ns: predicted time of a global step, nanoseconds, costs and communication included.
        waste: share of the used devices' computing power that brings no progress, in 0..1 (the paper's).
        speedup: speed over all ESTs on one reference device, computing only (the paper's `perf`).
        moved: ESTs that change device against `previous`; 0 without one.
    """

    devices: tuple[str, ...]
    ests_per_device: tuple[int, ...]
    step_ns: int
    waste: float
    speedup: float
    moved: int = 0

    @property
    def num_ests(self) -> int:
        """P."""
        return sum(self.ests_per_device)

    @property
    def step_seconds(self) -> float:
        """Predicted seconds per global step."""
        return self.step_ns / NANOSECONDS

    @property
    def throughput(self) -> float:
        """Mini-batches (EST steps) per second."""
        return self.num_ests / self.step_seconds

    @property
    def used(self) -> tuple[int, ...]:
        """Indices of the devices that host an EST."""
        return tuple(i for i, ests in enumerate(self.ests_per_device) if ests)

    @property
    def placement(self) -> Placement:
        """The same as contiguous ranges of EST ranks over the used devices."""
        return Placement(tuple(self.ests_per_device[i] for i in self.used))


def waste_and_speedup(
    num_ests: int, ests: Sequence[int], est_seconds: Sequence[float], reference_seconds: float
) -> tuple[float, float]:
    """The paper's waste (0..1) and speed-up of devices that host `ests` ESTs each.

    Args:
        num_ests: P, at most ``sum(ests)``: the paper may give out more ESTs than the job has.
        ests: A per held device; a held device with 0 is all waste.
        est_seconds: one EST's time on each device.
        reference_seconds: one EST's time on the reference type.
    """
    power = [reference_seconds / t for t in est_seconds]
    overload = max(a / c for a, c in zip(ests, power, strict=True))
    absolute = sum(c - a / overload for a, c in zip(ests, power, strict=True)) + (sum(ests) - num_ests) / overload
    return absolute / sum(power), sum(power) - absolute


def expand_devices(devices: Sequence[str] | Mapping[str, int]) -> tuple[str, ...]:
    """Device types in device order, from a list or from counts per type.

    Raises:
        ValueError: if a count is negative or no whole number, or nothing is left.
    """
    if isinstance(devices, str):
        raise ValueError(f'`devices="{devices}"` is one string. HINT: give a list of types or counts per type.')
    if isinstance(devices, Mapping):
        for name, count in devices.items():
            if int(count) != count or count < 0:
                raise ValueError(
                    f"`devices={{{name!r}: {count}}}` is no count. HINT: give whole numbers, zero or more."
                )
        devices = [name for name, count in devices.items() for _ in range(int(count))]
    if not devices:
        raise ValueError("`devices` is empty. HINT: give at least one device.")
    return tuple(devices)


def plan(
    num_ests: int,
    devices: Sequence[str] | Mapping[str, int],
    step_seconds: Mapping[str, float],
    *,
    switch_seconds: float = 0.0,
    fixed_seconds: float = 0.0,
    max_ests: Mapping[str, int] | None = None,
    communication: Communication | None = None,
    previous: Sequence[int] | None = None,
    use_every_device: bool = False,
    mix_types: bool = True,
    reference: str | None = None,
) -> Allocation:
    """How many ESTs each device hosts so that the global step is shortest: exact, deterministic.

    Args:
        num_ests: P, the job's ESTs.
        devices: types in device order, or counts per type (expanded in the mapping's order). A name may also stand for
            one particular device, measured on its own: every name is looked up in `step_seconds`.
        step_seconds: seconds of one EST's mini-batch per type.
        switch_seconds: one context switch between two ESTs of a device.
        fixed_seconds: a step's cost on a device whatever its ESTs.
        max_ests: ESTs that fit into one device's memory, per type; a type that is left out has no limit.
        communication: gradient exchange; grows with the number of devices, so that fewer may be faster.
        previous: ESTs per device that run now (0 for new devices), in device order: ties then move the fewest ESTs.
        use_every_device: give every device at least one EST (a launcher that cannot leave one idle).
        mix_types: False (a job without D2): use devices of one type only, the one that gives the shortest step.
        reference: type the speed-up is counted in; default: the slowest of `devices`.

    Returns:
        The allocation, in device order.

    Raises:
        ValueError: if a number is out of range, a type is unknown, or the ESTs do not fit.
    """
    if num_ests < 1:
        raise ValueError(f"`num_ests={num_ests}` leaves nothing to run. HINT: a job has at least one EST.")
    names = expand_devices(devices)
    for name in {*names, *([reference] if reference else [])}:
        if name not in step_seconds:
            raise ValueError(
                f"`step_seconds` has no time for device type `{name}` (it has {sorted(step_seconds)})."
                " HINT: measure the type or add it to the profile."
            )
        if not 0 < step_seconds[name] < float("inf"):
            raise ValueError(
                f"`step_seconds[{name!r}]={step_seconds[name]}` is no step time. HINT: give positive seconds."
            )
    if previous is not None and (len(previous) != len(names) or min(previous) < 0 or sum(previous) > num_ests):
        raise ValueError(
            f"`previous={list(previous)}` does not describe {len(names)} devices that run {num_ests} ESTs."
            " HINT: one count of zero or more each, together at most `num_ests`."
        )
    base = step_seconds[reference] if reference else max(step_seconds[name] for name in names)
    old = [0] * len(names) if previous is None else list(previous)
    switch, fixed = to_ns(switch_seconds, "switch_seconds"), to_ns(fixed_seconds, "fixed_seconds")
    by_type = {
        name: AffineStepTime(max(1, to_ns(step_seconds[name])), switch, fixed, (max_ests or {}).get(name))
        for name in dict.fromkeys(names)
    }
    models = [by_type[name] for name in names]
    if mix_types or len(by_type) == 1:
        counts, step = _allocate(num_ests, models, old, communication, use_every_device)
    else:
        counts, step = _on_one_type(num_ests, names, models, old, communication, use_every_device)
    used = [i for i, ests in enumerate(counts) if ests]
    waste, speedup = waste_and_speedup(
        num_ests, [counts[i] for i in used], [step_seconds[names[i]] for i in used], base
    )
    moved = 0 if previous is None else num_ests - _kept(old, counts)
    return Allocation(names, tuple(counts), step, waste, speedup, moved)


def _kept(old: Sequence[int], new: Sequence[int]) -> int:
    """ESTs that stay where they are."""
    return sum(min(a, b) for a, b in zip(old, new, strict=True))


def _allocate(
    num_ests: int,
    models: Sequence[AffineStepTime],
    old: Sequence[int],
    communication: Communication | None,
    use_every_device: bool,
) -> tuple[list[int], int]:
    """ESTs per device and the step time in nanoseconds."""
    limit = smallest_limit(num_ests, models, at_least_one=use_every_device)
    if communication is not None and not use_every_device:
        limit = _limit_with_communication(num_ests, models, limit, communication)
    room = capacities(limit, models, num_ests)
    keep = [min(a, u) for a, u in zip(old, room, strict=True)]
    chosen = range(len(models)) if use_every_device else fewest_devices(num_ests, room, keep)
    lower, upper = [keep[i] for i in chosen], [room[i] for i in chosen]
    if use_every_device:
        first = [max(1, kept) for kept in lower]
        # Where new devices need more ESTs than are on the move, some that could stay must go; as few as possible.
        lower, upper = (first, upper) if sum(first) <= num_ests else ([1] * len(first), first)
    counts = [0] * len(models)
    filled = fill_in_order_of_finish(num_ests, [models[i] for i in chosen], lower, upper)
    for i, ests in zip(chosen, filled, strict=True):
        counts[i] = ests
    step = max(m.time_ns(a) for m, a in zip(models, counts, strict=True))
    if communication is not None:
        step += communication.ns(sum(1 for a in counts if a))
    return counts, step


def _on_one_type(
    num_ests: int,
    names: Sequence[str],
    models: Sequence[AffineStepTime],
    old: Sequence[int],
    communication: Communication | None,
    use_every_device: bool,
) -> tuple[list[int], int]:
    """The same with devices of one type only, by the same ties."""
    if use_every_device:
        raise ValueError(
            f"`mix_types=False` and `use_every_device=True` contradict each other on types {sorted(set(names))}."
            " HINT: give devices of one type."
        )
    found: list[tuple[tuple[int, int, int, int], list[int]]] = []
    problem = ""
    for order, name in enumerate(dict.fromkeys(names)):
        places = [i for i, other in enumerate(names) if other == name]
        try:
            part, step = _allocate(
                num_ests, [models[i] for i in places], [old[i] for i in places], communication, False
            )
        except ValueError as error:  # this type alone has too little memory; another one may do
            problem = str(error)
            continue
        counts = [0] * len(names)
        for i, ests in zip(places, part, strict=True):
            counts[i] = ests
        found.append(((step, sum(1 for a in counts if a), -_kept(old, counts), order), counts))
    if not found:
        raise ValueError(problem)
    rank, counts = min(found)
    return counts, rank[0]


def _limit_with_communication(
    num_ests: int, models: Sequence[AffineStepTime], lowest: int, communication: Communication
) -> int:
    """The limit that minimises computing plus exchange, when the exchange grows with the number of devices.

    A step that computes for ``f`` needs at least ``k(f)`` devices (the roomiest first), and ``k`` falls as ``f`` grows;
    so only the limits at which some device's capacity changes can be optimal.
    """
    distinct = set(models)
    limits = sorted(
        {m.time_ns(a) for m in distinct for a in range(1, num_ests + 1) if m.time_ns(a) >= lowest} | {lowest}
    )
    best_time, best_limit = None, lowest
    for limit in limits:
        total, size = 0, 0
        for room in sorted(capacities(limit, models, num_ests), reverse=True):
            if total >= num_ests:
                break
            total, size = total + room, size + 1
        time = limit + communication.ns(size)
        if best_time is None or time < best_time:
            best_time, best_limit = time, limit
        if size == 1:
            break
    return best_limit


def worth_moving(now_step_seconds: float, new_step_seconds: float, steps_left: float, cost_seconds: float) -> bool:
    """Whether a rescale pays: the time it saves until the end is more than it costs."""
    return (now_step_seconds - new_step_seconds) * steps_left > cost_seconds
