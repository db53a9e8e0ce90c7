"""Schedules of stages for a live job: written down, or drawn at random from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ._config import ConfigError


@dataclass(frozen=True)
class LiveStage:
    """Devices, and when to leave them.

    Args:
        devices: device type -> count, in executor order.
        steps: leave after so many optimizer steps; None: `seconds` decides.
        seconds: leave after so much time of training; None, as `steps`: stay to the end.
    """

    devices: dict[str, int]
    steps: int | None = None
    seconds: float | None = None

    @property
    def text(self) -> str:
        """As for ``--devices``: ``v100:1,p100:2``."""
        return ",".join(f"{name}:{count}" for name, count in self.devices.items())


def check_stages(stages: Sequence[LiveStage], num_ests: int) -> list[LiveStage]:
    """The stages, if they can be run.

    Raises:
        ConfigError: with the stage, its value and the cure.
    """
    if not stages:
        raise ConfigError("`live_schedule.stages` is empty. HINT: name at least one stage, or `live_schedule=random`.")
    for index, stage in enumerate(stages):
        where, count = f"live_schedule.stages[{index}]", sum(stage.devices.values())
        if count < 1 or min(stage.devices.values()) < 1:
            raise ConfigError(f"`{where}.devices={stage.devices}` must give every type a count of at least 1.")
        if count > num_ests:
            raise ConfigError(
                f"`{where}.devices={stage.devices}` are {count} devices for `live_schedule.num_ests={num_ests}`."
                " HINT: every device needs at least one EST."
            )
        if stage.steps is not None and stage.seconds is not None:
            raise ConfigError(f"`{where}` ends by `steps` and by `seconds`. HINT: give one of the two.")
        if stage.steps is None and stage.seconds is None and index < len(stages) - 1:
            raise ConfigError(f"`{where}` never ends, and stages follow it. HINT: give `steps` or `seconds`.")
        length = stage.seconds if stage.steps is None else stage.steps
        if length is not None and length <= 0:
            raise ConfigError(f"`{where}` lasts {length}. HINT: give more than nothing.")
    return list(stages)


def random_stages(
    seed: int, *, num_ests: int, types: Sequence[str], count: int, steps: tuple[int, int]
) -> list[LiveStage]:
    """A schedule that is the same for the same arguments; neighbouring stages have different devices.

    Args:
        seed: of all draws.
        num_ests: N; a stage has 1..N devices.
        types: device types to draw from.
        count: number of stages.
        steps: least and most steps of a stage.
    """
    if num_ests == 1 and len(types) == 1 and count > 1:
        raise ConfigError("one EST on one type of device cannot move. HINT: raise `num_ests` or give more `types`.")
    choose = random.Random(seed)
    stages: list[LiveStage] = []
    while len(stages) < count:
        names = [choose.choice(types) for _ in range(choose.randint(1, num_ests))]
        devices = {name: names.count(name) for name in types if name in names}
        if not stages or devices != stages[-1].devices:
            stages.append(LiveStage(devices, steps=choose.randint(*steps)))
    return stages
