"""Schema of `profile`: every key that may be set, with its type."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import List, Optional  # noqa: UP035  OmegaConf reads these at run time

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from lightning_easyscale.devices import parse_devices

from ._config import ConfigError, WorkloadConf

LEVELS = {"d1": "D1", "d1+d2": "D2"}
"""Determinism level -> the kernels that a profile calls it."""


@dataclass
class ExchangeConf:
    """Exchanges that tell latency from bandwidth.

    Args:
        bytes: sizes of the gradients.
        executors: devices that take part, one EST each.
        rounds: how often each is measured.
        device_type: their type.
    """

    bytes: List[int] = MISSING  # noqa: UP006
    executors: List[int] = MISSING  # noqa: UP006
    rounds: int = MISSING
    device_type: str = MISSING


@dataclass
class ProfileConf:
    """The whole configuration.

    Args:
        workload: group.
        file: the profile; what is in it is not measured again, so an interrupted run goes on and workloads add up.
        devices: what there is, as for the accelerator: ``v100:2,t4:1``.
        emulate: whether types are emulated.
        num_ests: job sizes.
        batch_sizes: samples per EST; default: the workload's.
        levels: ``d1`` (one type per job) and ``d1+d2`` (types mixed).
        steps: steps that are timed.
        warmup: steps before them.
        pace: seconds that an EST sleeps in its mini-batch, by type, for emulated speeds: ``v100:0.05,t4:0.13``.
        exchange: runs for the communication model.
        threads_per_est: CPU threads of an EST.
        seed: of the runs.
        timeout_s: longest time one run may take, in seconds.
    """

    workload: WorkloadConf = field(default_factory=WorkloadConf)
    file: str = MISSING
    devices: str = MISSING
    emulate: bool = True
    num_ests: List[int] = MISSING  # noqa: UP006
    batch_sizes: Optional[List[int]] = None  # noqa: UP006, UP045
    levels: List[str] = MISSING  # noqa: UP006
    steps: int = MISSING
    warmup: int = MISSING
    pace: str = ""
    exchange: ExchangeConf = field(default_factory=ExchangeConf)
    threads_per_est: int = 1
    seed: int = 1
    timeout_s: float = 600.0


def register() -> None:
    """Make the schema known to Hydra."""
    ConfigStore.instance().store(name="profile_schema", node=ProfileConf)


def counts(conf: ProfileConf) -> dict[str, int]:
    """Devices per type, in the order they were named.

    Raises:
        ValueError: if `devices` cannot be read, or names what is not there.
    """
    return dict(Counter(parse_devices(conf.devices, emulate=conf.emulate)))


def read_pace(text: str) -> dict[str, float]:
    """Seconds by device type.

    Raises:
        ConfigError: for an entry that is not ``type:seconds``, or a negative time.
    """
    pace = {}
    for entry in filter(None, text.split(",")):
        name, _, seconds = entry.partition(":")
        try:
            pace[name.strip()] = float(seconds)
        except ValueError:
            raise ConfigError(f"`pace={text}` has {entry!r}. HINT: write `v100:0.05,t4:0.13`.") from None
        if not 0 <= pace[name.strip()] < float("inf"):
            raise ConfigError(f"`pace={text}` has {entry!r}. HINT: seconds, zero or more.")
    return pace


def check(conf: ProfileConf) -> None:
    """Refuse what cannot be measured.

    Raises:
        ConfigError: naming the key and the cure.
    """
    if unknown := set(conf.levels) - set(LEVELS):
        raise ConfigError(f"`levels` has {sorted(unknown)[0]!r}. HINT: there are {', '.join(LEVELS)}.")
    if not conf.num_ests or min(conf.num_ests) < 1:
        raise ConfigError(f"`num_ests={list(conf.num_ests)}` has no job size. HINT: give sizes of at least 1.")
    if conf.steps < 3 or conf.warmup < 0:
        raise ConfigError(f"`steps={conf.steps}`, `warmup={conf.warmup}`: HINT: time at least 3 steps.")
    if unknown := set(read_pace(conf.pace)) - set(counts(conf)):
        raise ConfigError(f"`pace` has {sorted(unknown)[0]!r}, `devices` does not. HINT: pace types that are there.")
    if min(conf.exchange.executors, default=2) < 2:
        raise ConfigError(f"`exchange.executors={list(conf.exchange.executors)}`. HINT: an exchange takes two or more.")
    if min(conf.exchange.bytes, default=1) < 1 or conf.exchange.rounds < 1:
        raise ConfigError(
            f"`exchange.bytes={list(conf.exchange.bytes)}`, `exchange.rounds={conf.exchange.rounds}`. HINT: give sizes"
            " and rounds of at least 1."
        )
