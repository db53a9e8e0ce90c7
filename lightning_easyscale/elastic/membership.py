"""Which executors a job consists of while it changes devices in place: processes stay, worlds follow each other.

The supervisor writes the next world into a file and then sends every executor a stop signal. The ESTs agree on a step,
save and stop as for any signal; an executor that finds itself in the next world does not end then but enters it, and
goes on from the checkpoint. Newcomers have entered it long before: they wait in its process group until the others
come.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

WORLD_VARIABLE = "EASYSCALE_WORLD"
"""Names the file in which the supervisor announces worlds."""

MEMBER_VARIABLE = "EASYSCALE_MEMBER"
"""The name of this process among all executors that the job ever has."""

GENERATION_VARIABLE = "EASYSCALE_GENERATION"
"""The number of the world that this process is in."""

DEVICES_VARIABLE = "EASYSCALE_DEVICES"
"""The device type of every executor of a host, in order, where the supervisor decides about types."""


@dataclass(frozen=True)
class World:
    """The executors between two changes of devices.

    Args:
        generation: counts the worlds of a supervisor.
        members: the executors' names, in executor order.
        types: their device types; empty where the script's accelerator decides.
        port: where they meet.
    """

    generation: int
    members: tuple[str, ...]
    types: tuple[str, ...]
    port: int

    def announce(self, file: Path) -> None:
        """Let executors find this world; before they are told to stop."""
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self)))
        temporary.replace(file)

    def variables(self, index: int) -> dict[str, str]:
        """Environment variables of the executor at `index`; the names are torchrun's where it has one."""
        variables = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
            "WORLD_SIZE": str(len(self.members)),
            "LOCAL_WORLD_SIZE": str(len(self.members)),
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "RANK": str(index),
            "LOCAL_RANK": str(index),
            MEMBER_VARIABLE: self.members[index],
            GENERATION_VARIABLE: str(self.generation),
        }
        return {**variables, DEVICES_VARIABLE: ",".join(self.types)} if self.types else variables


def generation() -> int:
    """The number of the world that this process is in; 0 where none is counted."""
    return int(os.environ.get(GENERATION_VARIABLE, 0))


def is_member() -> bool:
    """Whether this process belongs to a job that changes its executors in place."""
    return bool(os.environ.get(WORLD_VARIABLE) and os.environ.get(MEMBER_VARIABLE))


def next_world() -> World | None:
    """The world that this process enters instead of ending; None: it ends."""
    if not is_member():
        return None
    member = os.environ[MEMBER_VARIABLE]
    try:
        raw = json.loads(Path(os.environ[WORLD_VARIABLE]).read_text())
    except FileNotFoundError:
        return None
    world = World(raw["generation"], tuple(raw["members"]), tuple(raw["types"]), raw["port"])
    return world if world.generation > generation() and member in world.members else None


def enter(world: World) -> None:
    """Take this process's place in `world`; takes effect when the executors connect again."""
    index = world.members.index(os.environ[MEMBER_VARIABLE])
    os.environ.pop(DEVICES_VARIABLE, None)
    os.environ.update(world.variables(index))
