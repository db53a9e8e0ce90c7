"""What a user's script is to the harness: a function that builds it, named so that a fresh process can import it.

A scenario function takes its plain-data config and the run's folder and returns a `Script`. The harness runs the same
script under stock DDP and under EasyScale; nothing in it may depend on which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule, Trainer

# What scenarios note beside what the harness notes by itself: rank -> list of (name, value), in order.
_NOTES: dict[int, list[tuple[str, Any]]] = {}


def note(rank: int, name: str, value: Any) -> None:
    """Add something to what is compared."""
    from .exact import exact

    _NOTES.setdefault(rank, []).append((name, exact(value)))


def notes() -> dict[int, list[tuple[str, Any]]]:
    return _NOTES


def fit(trainer: Trainer, script: Script, make_trainer: Callable[..., Trainer]) -> None:
    trainer.fit(script.module, **script.data)


@dataclass
class Script:
    """A user's script, but for the strategy.

    Args:
        module: the module.
        data: arguments of `fit` that name the data.
        trainer: arguments of the Trainer; ``default_root_dir`` and quiet defaults come from the harness.
        ddp: arguments that stock DDP and EasyScale both take.
        main: what the script does with the trainer; may make another one.
    """

    module: LightningModule
    data: dict[str, Any]
    trainer: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    main: Callable[[Trainer, Script, Callable[..., Trainer]], None] = fit


@dataclass(frozen=True)
class Feature:
    """A scenario that stands for a feature of stock DDP.

    Args:
        name: as the table calls it.
        group: heading of the table.
        build: ``module:function``.
        config: its plain-data config.
        worlds: sizes N it is run with; None: one of 2, 3, 4.
        xfail: why it does not work yet.
        same_error: the type of the error that the script ends with, the same in both.
        files: whether the files that it writes are compared; ``"names"``: only which there are.
    """

    name: str
    group: str
    build: str
    config: tuple[tuple[str, Any], ...] = ()
    worlds: tuple[int, ...] | None = None
    xfail: str | None = None
    same_error: str | None = None
    files: bool | str = True


FEATURES: list[Feature] = []


def feature(name: str, group: str, *, xfail: str | None = None, **options: Any) -> Callable[[Any], Any]:
    """Register a scenario function as the test of a feature; may be given several times."""
    known = {key: options.pop(key) for key in ("worlds", "same_error", "files") if key in options}

    def register(build: Any) -> Any:
        path = f"{build.__module__}:{build.__name__}"
        FEATURES.append(Feature(name, group, path, tuple(sorted(options.items())), xfail=xfail, **known))
        return build

    return register
