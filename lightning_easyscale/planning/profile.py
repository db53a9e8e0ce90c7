"""Measured speeds of workloads on device types, as a JSON file that planner and simulator replay.

A profile is a list of rows (workload, device type, kernels, batch size, seconds per mini-batch of one EST). `kernels`
says under which determinism the row was measured: ``"stock"``, ``"D1"`` or ``"D2"``. Every row states where it comes
from through the profile's `source`. Asking for what was not measured is an error, never a guess, with one exception
that the profile itself must name: how the time depends on the batch size outside the measured sizes.

Where whole configurations of a job were measured (so many ESTs on these devices), the simulator replays their step
times and uses the rows for all others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_easyscale.planning.communication import Link

FORMAT = "easyscale-profile/1"
KERNELS = ("stock", "D1", "D2")
BATCH_RULES = ("constant", "proportional", "interpolate")


@dataclass(frozen=True)
class Measurement:
    """One row.

    Args:
        workload: name, lower case.
        device_type: name of the type.
        kernels: one of `KERNELS`.
        batch_size: samples per mini-batch of one EST.
        seconds: per mini-batch, positive.
        fixed_seconds: of a global step on one device, whatever its ESTs.

    Raises:
        ValueError: if a field is out of range.
    """

    workload: str
    device_type: str
    kernels: str
    batch_size: int
    seconds: float
    fixed_seconds: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.kernels not in KERNELS:
            raise ValueError(f"`kernels={self.kernels!r}` is unknown. HINT: one of {', '.join(KERNELS)}.")
        if self.batch_size < 1 or not 0 < self.seconds < float("inf"):
            raise ValueError(
                f"`batch_size={self.batch_size}`, `seconds={self.seconds}` of {self.workload} on {self.device_type} are"
                " out of range. HINT: both are positive."
            )
        if not 0 <= self.fixed_seconds < float("inf"):
            raise ValueError(
                f"`fixed_seconds={self.fixed_seconds}` of {self.workload} on {self.device_type} is no time."
                " HINT: finite seconds, zero or more."
            )


@dataclass(frozen=True)
class Configuration:
    """The measured step time of a job under one placement.

    Args:
        workload: name, lower case.
        kernels: one of `KERNELS`.
        batch_size: samples per mini-batch of one EST.
        devices: type of each device, in device order.
        ests_per_device: ESTs of each.
        seconds: per global step, exchange included.
        busy_seconds: of each device per global step, waiting for the others left out.

    Raises:
        ValueError: if devices and ESTs do not match, or a time is not positive.
    """

    workload: str
    kernels: str
    batch_size: int
    devices: tuple[str, ...]
    ests_per_device: tuple[int, ...]
    seconds: float
    busy_seconds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("devices", "ests_per_device", "busy_seconds"):  # lists, where they come from a file
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.devices) != len(self.ests_per_device) or not self.devices or min(self.ests_per_device) < 1:
            raise ValueError(
                f"`devices={self.devices}` and `ests_per_device={self.ests_per_device}` of {self.workload} do not"
                " match. HINT: at least one EST for every device."
            )
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"`seconds={self.seconds}` of {self.workload} is no step time. HINT: it is positive.")

    @property
    def key(self) -> tuple[str, str, int, tuple[str, ...], tuple[int, ...]]:
        """What was measured."""
        return self.workload, self.kernels, self.batch_size, self.devices, self.ests_per_device


@dataclass(frozen=True)
class Exchange:
    """A measured exchange of gradients, with nothing computed meanwhile.

    Args:
        num_bytes: bytes of gradients.
        executors: devices that take part, at least two.
        seconds: until the last one is done.

    Raises:
        ValueError: if a field is out of range.
    """

    num_bytes: float
    executors: int
    seconds: float

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.num_bytes < 0 or self.executors < 2 or not 0 < self.seconds < float("inf"):
            raise ValueError(
                f"`num_bytes={self.num_bytes}`, `executors={self.executors}`, `seconds={self.seconds}` are no exchange."
                " HINT: two executors or more, and a time above zero."
            )


@dataclass
class Profile:
    """Speeds of workloads on device types.

    Args:
        name: short name.
        source: where the numbers come from, in words.
        measurements: the rows.
        batch_rule: time against batch size: ``"constant"``: the nearest measured size's; ``"proportional"``: scaled
            from the nearest measured size; ``"interpolate"``: linear between measured sizes, an error outside them.
        samples_per_epoch: per workload, where the profile knows it.
        switch_seconds: cost of a context switch between ESTs.
        configurations: placements that were measured as a whole.
        exchanges: exchanges of gradients that were measured.
        gradient_bytes: per workload, bytes that are exchanged in a step, where the profile knows them.
        communication: a link fitted to measured exchanges, and its error: the fields of `LinkFit`, the link's among
            them; None without one.
        conditions: under which it was measured (machine, versions, ...).

    Raises:
        ValueError: if the rule is unknown or two rows contradict each other.
    """

    name: str
    source: str
    measurements: tuple[Measurement, ...]
    batch_rule: str = "interpolate"
    samples_per_epoch: dict[str, float] = field(default_factory=dict)
    switch_seconds: float = 0.0
    configurations: tuple[Configuration, ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    gradient_bytes: dict[str, float] = field(default_factory=dict)
    communication: dict[str, float] | None = None
    conditions: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.batch_rule not in BATCH_RULES:
            raise ValueError(f"`batch_rule={self.batch_rule!r}` is unknown. HINT: one of {', '.join(BATCH_RULES)}.")
        self._table: dict[tuple[str, str, str], dict[int, float]] = {}
        for m in self.measurements:
            sizes = self._table.setdefault((m.workload, m.device_type, m.kernels), {})
            if sizes.setdefault(m.batch_size, m.seconds) != m.seconds:
                raise ValueError(
                    f"`measurements` has two times for {m.workload}, {m.device_type}, {m.kernels}, batch"
                    f" {m.batch_size}. HINT: keep one, or average them."
                )

    @property
    def workloads(self) -> list[str]:
        """Names, sorted."""
        return sorted({m.workload for m in self.measurements})

    @property
    def device_types(self) -> list[str]:
        """Names, in the order of the rows."""
        return list(dict.fromkeys(m.device_type for m in self.measurements))

    def batch_sizes(self, workload: str, device_type: str, kernels: str) -> list[int]:
        """Measured sizes, ascending; empty where nothing was measured."""
        return sorted(self._table.get((workload, device_type, kernels), {}))

    def seconds(self, workload: str, device_type: str, kernels: str, batch_size: int) -> float:
        """Seconds of one EST's mini-batch.

        Raises:
            KeyError: if the workload, type or kernels were not measured, or the size lies outside under "interpolate".
        """
        table = self._table.get((workload, device_type, kernels))
        if table is None:
            raise KeyError(
                f"profile `{self.name}` has no times of `{workload}` on `{device_type}` with {kernels} kernels"
                f" (workloads {self.workloads}, types {self.device_types}). HINT: measure it, or correct the name."
            )
        if batch_size in table:
            return table[batch_size]
        nearest = min(table, key=lambda size: (abs(size - batch_size), size))
        if self.batch_rule == "constant":
            return table[nearest]
        if self.batch_rule == "proportional":
            return table[nearest] * batch_size / nearest
        sizes = sorted(table)
        for low, high in zip(sizes, sizes[1:], strict=False):
            if low < batch_size < high:
                return table[low] + (table[high] - table[low]) * (batch_size - low) / (high - low)
        raise KeyError(
            f"profile `{self.name}` measured `{workload}` on `{device_type}` at batch sizes {sizes}, not at"
            f" {batch_size}."
            ' HINT: measure it, or set `batch_rule` to "constant" or "proportional".'
        )

    def fixed_seconds(self, workload: str, device_type: str, kernels: str, batch_size: int) -> float:
        """A global step's cost on one device whatever its ESTs; 0 where that was not measured."""
        wanted = (workload, device_type, kernels, batch_size)
        rows = (m for m in self.measurements if (m.workload, m.device_type, m.kernels, m.batch_size) == wanted)
        return next((m.fixed_seconds for m in rows), 0.0)

    def measured_steps(
        self, workload: str, kernels: str, batch_size: int, num_ests: int, types: Sequence[str]
    ) -> dict[tuple[int, ...], float]:
        """Measured seconds per global step of a job, by devices per type in the order of `types`."""
        found = {}
        for c in self.configurations:
            wanted = (c.workload, c.kernels, c.batch_size, sum(c.ests_per_device))
            if wanted == (workload, kernels, batch_size, num_ests) and set(c.devices) <= set(types):
                found[tuple(c.devices.count(name) for name in types)] = c.seconds
        return found

    @property
    def link(self) -> Link | None:
        """The fitted link, if there is one."""
        if self.communication is None:
            return None
        return Link(self.communication["latency_s"], self.communication["bytes_per_s"])

    def to_json(self) -> str:
        """The file's text."""
        body = {
            "format": FORMAT,
            "name": self.name,
            "source": self.source,
            "batch_rule": self.batch_rule,
            "switch_seconds": self.switch_seconds,
            "samples_per_epoch": self.samples_per_epoch,
            "gradient_bytes": self.gradient_bytes,
            "communication": self.communication,
            "conditions": self.conditions,
            "measurements": [asdict(m) for m in self.measurements],
            "configurations": [asdict(c) for c in self.configurations],
            "exchanges": [asdict(e) for e in self.exchanges],
        }
        return json.dumps(body, indent=1)

    @classmethod
    def from_json(cls, text: str, origin: str = "profile") -> Profile:
        """Read the file's text.

        Raises:
            ValueError: if the text is no profile of this format, or a row or field is wrong.
        """
        try:
            body = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{origin} is not JSON: {error}. HINT: write it with `Profile.to_json`.") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError(f"{origin} is not in format `{FORMAT}`. HINT: write it with `Profile.to_json`.")
        body.pop("format")
        try:
            rows = tuple(Measurement(**row) for row in body.pop("measurements"))
            whole = tuple(Configuration(**row) for row in body.pop("configurations", ()))
            exchanges = tuple(Exchange(**row) for row in body.pop("exchanges", ()))
            return cls(measurements=rows, configurations=whole, exchanges=exchanges, **body)
        except (TypeError, KeyError) as error:
            raise ValueError(f"{origin} has missing or unknown fields: {error}.") from error

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a file."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"), origin=str(path))

    def save(self, path: str | Path) -> None:
        """Write a file, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(self.to_json(), encoding="utf-8")
        temporary.replace(path)


def rows(workload: str, batch_size: int, times: Iterable[tuple[str, float, float, float]]) -> list[Measurement]:
    """Measurements of one workload from (device type, stock, D1, D2) seconds."""
    return [
        Measurement(workload, device_type, kernels, batch_size, seconds)
        for device_type, *by_kernels in times
        for kernels, seconds in zip(KERNELS, by_kernels, strict=True)
    ]
