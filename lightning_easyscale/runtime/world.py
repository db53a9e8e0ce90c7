"""The virtual world: `torch.distributed` speaks of EST ranks while ESTs run.

`torch.distributed` keeps its state (default group, names, ranks) in one module-level object and documents it as a point
to override. `install` puts a delegating object there: inside an EST it shows that EST's world of N ranks; elsewhere the
process's own. A thread that user code starts inside an EST sees the world of the EST that holds the baton.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


class WorldState:
    """One EST's view of `torch.distributed`: same attributes as ``distributed_c10d._World``."""

    def __init__(self) -> None:
        self.default_pg: dist.ProcessGroup | None = None
        self.pg_map: dict[dist.ProcessGroup, tuple[str, dist.Store | None]] = {}
        self.pg_names: dict[dist.ProcessGroup, str] = {}
        self.pg_group_ranks: dict[dist.ProcessGroup, dict[int, int]] = {}
        self.pg_backend_config: dict[dist.ProcessGroup, str] = {}
        self.group_count = 0
        self.tags_to_pg: dict[str, list[dist.ProcessGroup]] = {}
        self.pg_to_tag: dict[dist.ProcessGroup, str] = {}
        self.pg_coalesce_state: dict[dist.ProcessGroup, list[Any]] = {}
        self.comms: list[Any] = []

    @property
    def pg_config_info(self) -> list[dict[str, Any]]:
        """Names and ranks of all groups, as `torch.distributed` prints them."""
        return [
            {"pg_name": name, "pg_desc": name, "backend_config": self.pg_backend_config[pg], "ranks": []}
            for pg, name in self.pg_names.items()
        ]

    def add(self, group: dist.ProcessGroup, name: str, ranks: tuple[int, ...], backend: str) -> None:
        """Register a group of this world."""
        self.pg_map[group] = (backend, None)
        self.pg_names[group] = name
        self.pg_group_ranks[group] = {rank: index for index, rank in enumerate(ranks)}
        self.pg_backend_config[group] = f"cpu:{backend},cuda:{backend}"
        self.pg_to_tag[group] = f"ptd:{name}"
        self.tags_to_pg.setdefault("", []).append(group)
        self.tags_to_pg.setdefault(f"ptd:{name}", []).append(group)

    def new_group(self, ranks: tuple[int, ...] | None, backend: str | None) -> Any:
        """Create a subgroup; called by every rank. Returns the group, or the non-member marker."""
        assert self.default_pg is not None
        return self.default_pg.subgroup(ranks, backend or self.pg_map[self.default_pg][0])  # type: ignore[attr-defined]


class _WorldSwitch:
    """Stands in for ``distributed_c10d._world`` and forwards to the world of the calling thread."""

    def __init__(self, outside: Any, current: Callable[[], WorldState | None]) -> None:
        object.__setattr__(self, "_outside", outside)
        object.__setattr__(self, "_current", current)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._current() or self._outside, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._current() or self._outside, name, value)


class _Registry:
    """Which world is in force: set by the EST that holds the baton, hidden by `physical_world`."""

    def __init__(self) -> None:
        self.installed: tuple[Any, Any] | None = None
        self.in_force: WorldState | None = None
        self.hidden = threading.local()

    def current(self) -> WorldState | None:
        return None if getattr(self.hidden, "depth", 0) else self.in_force


_registry = _Registry()


def install() -> None:
    """Put the delegating world in place; does nothing when it is there already."""
    if _registry.installed is not None:
        return
    outside, original_new_group = c10d._world, c10d._new_group_with_tag

    def new_group_with_tag(ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **kw: Any) -> Any:
        world = _registry.current()
        if world is None:
            return original_new_group(ranks, timeout, backend, *args, **kw)
        return world.new_group(None if ranks is None else tuple(sorted(ranks)), backend)

    _registry.installed = (outside, original_new_group)
    c10d._world = _WorldSwitch(outside, _registry.current)  # type: ignore[assignment]
    c10d._new_group_with_tag = new_group_with_tag


def uninstall() -> None:
    """Take the delegating world away again."""
    if _registry.installed is None:
        return
    c10d._world, c10d._new_group_with_tag = _registry.installed
    _registry.installed = None
    _registry.in_force = None


def set_world(world: WorldState | None) -> None:
    """Put `world` in force for the process (None: the process's own)."""
    _registry.in_force = world


@contextmanager
def physical_world() -> Iterator[None]:
    """The process's own `torch.distributed`, for the calling thread."""
    depth = getattr(_registry.hidden, "depth", 0)
    _registry.hidden.depth = depth + 1
    try:
        yield
    finally:
        _registry.hidden.depth = depth
