"""What a function of shapes makes once: how an operation is split into launches, and the code that they start."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_SHAPES = 8192  # of a kind that are kept
_plans: list[Any] = []


def planned(plan: Callable[P, R]) -> Callable[P, R]:
    """Remember what `plan` makes of each of its arguments, until `forget_plans`."""
    remembered = lru_cache(_SHAPES)(plan)
    _plans.append(remembered)
    return remembered  # type: ignore[return-value]


def forget_plans() -> None:
    """Make all plans anew, because tile sizes are chosen otherwise now."""
    for remembered in _plans:
        remembered.cache_clear()
