"""The cluster: device types, counts, and which node a device sits in.

Every node holds devices of one type. A request is packed: into the fullest node that still has room for all of it, else
into the emptiest nodes first, so that jobs span few nodes. The choice depends on the order of requests only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_easyscale.planning.by_type import Counts


@dataclass(frozen=True)
class ClusterSpec:
    """Devices of a cluster.

    Args:
        devices: counts per type, in the cluster's order.
        devices_per_node: devices in a full node.

    Raises:
        ValueError: if there is no device, or a count is negative.
    """

    devices: Mapping[str, int]
    devices_per_node: int = 8

    def __post_init__(self) -> None:
        """Check the counts."""
        for name, count in self.devices.items():
            if int(count) != count or count < 0:
                raise ValueError(
                    f"`devices={{{name!r}: {count}}}` is no count. HINT: give whole numbers, zero or more, per type."
                )
        if sum(self.devices.values()) < 1:
            raise ValueError("`devices` is empty: the cluster has no device. HINT: give at least one.")
        if self.devices_per_node < 1:
            raise ValueError(f"`devices_per_node={self.devices_per_node}`. HINT: a node holds at least one device.")

    @property
    def types(self) -> tuple[str, ...]:
        """Type names."""
        return tuple(self.devices)

    @property
    def capacity(self) -> Counts:
        """Devices per type."""
        return tuple(int(n) for n in self.devices.values())


class NodePool:
    """Free devices by node.

    Args:
        spec: the cluster; the last node of a type may be smaller.
    """

    def __init__(self, spec: ClusterSpec) -> None:
        """Build the nodes, all free."""
        size = spec.devices_per_node
        self.type_of: list[int] = []
        self.size_of: list[int] = []
        self._free: list[int] = []
        self._down: set[int] = set()
        # Nodes by free devices; dicts keep insertion order, which makes every choice reproducible.
        self._buckets: list[list[dict[int, None]]] = []
        for index, count in enumerate(spec.capacity):
            self._buckets.append([{} for _ in range(size + 1)])
            for start in range(0, count, size):
                node, room = len(self.type_of), min(size, count - start)
                self.type_of.append(index)
                self.size_of.append(room)
                self._free.append(room)
                self._buckets[index][room][node] = None

    def _set(self, node: int, free: int) -> None:
        buckets = self._buckets[self.type_of[node]]
        if node not in self._down:
            del buckets[self._free[node]][node]
            buckets[free][node] = None
        self._free[node] = free

    def take(self, device_type: int, count: int) -> dict[int, int]:
        """Take `count` free devices of a type; returns devices per node.

        Raises:
            RuntimeError: if fewer are free (a policy over-committed the cluster).
        """
        buckets = self._buckets[device_type]
        taken: dict[int, int] = {}
        while count:
            fits = next((b for b in buckets[count:] if b), None) if count < len(buckets) else None
            bucket = fits or next((b for b in reversed(buckets[1:]) if b), None)
            if bucket is None:
                raise RuntimeError(f"{count} devices of type {device_type} are missing: the cluster is over-committed.")
            node = next(iter(bucket))
            part = min(count, self._free[node])
            self._set(node, self._free[node] - part)
            taken[node] = part
            count -= part
        return taken

    def give(self, devices: Mapping[int, int]) -> None:
        """Give devices back."""
        for node, count in devices.items():
            self._set(node, self._free[node] + count)

    def fail(self, node: int) -> int:
        """Take a node out of service; returns the devices that were free on it."""
        del self._buckets[self.type_of[node]][self._free[node]][node]
        self._down.add(node)
        return self._free[node]

    def repair(self, node: int) -> int:
        """Put a node back; returns the devices that are free on it."""
        self._down.remove(node)
        self._buckets[self.type_of[node]][self._free[node]][node] = None
        return self._free[node]
