"""Schema of `overhead`: every key that may be set, with its type."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, List, Optional  # noqa: UP035  OmegaConf reads these at run time

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from ._config import ConfigError

COMPARISONS = ("est_vs_accumulation", "est_vs_ddp", "switch", "memory", "collectives", "snapshots")


@dataclass
class ModelConf:
    """How one model is run.

    Args:
        image_size: pixels along an edge.
        batch_size: samples per batch.
        steps: optimizer steps of a timed block.
        warmup: steps before the first.
    """

    image_size: int = MISSING
    batch_size: int = MISSING
    steps: int = MISSING
    warmup: int = MISSING


@dataclass
class BenchConf:
    """Sizes.

    Args:
        blocks: timed blocks of each side.
        models: model -> how it is run.
        calls: calls of a collective, and a thousandth of the hand-overs, in a timed block.
        snapshot_steps: optimizer steps of a block with one snapshot.
        automatic_steps: of a block with as many snapshots as the budget allows.
    """

    blocks: int = MISSING
    models: Dict[str, ModelConf] = MISSING  # noqa: UP006
    calls: int = MISSING
    snapshot_steps: int = MISSING
    automatic_steps: int = MISSING


@dataclass
class OverheadConf:
    """The whole configuration.

    Args:
        bench: group.
        ests: k, the ESTs of one process and the batches that the stock run accumulates.
        executors: processes of the comparison with stock DDP.
        accelerator: ``auto``, ``cpu`` or ``gpu``.
        threads: CPU threads per process; default ``max(1, cpu_count // ests)``.
        reduction: order of gradient reduction.
        only: comparisons to run; default: all.
        plot_only: print and draw again what is in ``hydra.run.dir``.
        timeout_s: longest time a comparison may take, in seconds.
    """

    bench: BenchConf = field(default_factory=BenchConf)
    ests: int = 4
    executors: int = 2
    accelerator: str = "auto"
    threads: Optional[int] = None  # noqa: UP045
    reduction: str = "ddp"
    only: List[str] = field(default_factory=lambda: list(COMPARISONS))  # noqa: UP006
    plot_only: bool = False
    timeout_s: float = 900.0


def register() -> None:
    """Make the schema known to Hydra."""
    ConfigStore.instance().store(name="overhead_schema", node=OverheadConf)


def check(conf: OverheadConf) -> None:
    """Refuse what cannot be measured.

    Raises:
        ConfigError: naming the key and the cure.
    """
    if unknown := set(conf.only) - set(COMPARISONS):
        raise ConfigError(f"`only` has {sorted(unknown)[0]!r}. HINT: there are {', '.join(COMPARISONS)}.")
    if conf.ests < 2 or conf.executors < 2:
        raise ConfigError(f"`ests={conf.ests}` and `executors={conf.executors}` must be at least 2.")
    if conf.accelerator not in ("auto", "cpu", "gpu"):
        raise ConfigError(f"`accelerator={conf.accelerator}` is unknown. HINT: use 'auto', 'cpu' or 'gpu'.")
    if missing := {"resnet18", "tiny", "empty"} - set(conf.bench.models):
        raise ConfigError(f"`bench.models` lacks {sorted(missing)[0]!r}. HINT: give resnet18, tiny and empty.")
    for key in ("blocks", "calls", "snapshot_steps", "automatic_steps"):
        if (value := getattr(conf.bench, key)) < 1:
            raise ConfigError(f"`bench.{key}={value}` is too few. HINT: at least 1.")
