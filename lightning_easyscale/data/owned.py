"""Generators that samplers and datasets hold as attributes, beside the process's global ones."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from ..rng import GENERATOR_KINDS, generator_state, set_generator_state

_DEEPEST = 4
_CONTAINERS = (list, tuple, dict)


def owned_generators(roots: Iterable[object]) -> list[Any]:
    """The generators found in attributes (and containers in attributes) of `roots`, each once, in a fixed order.

    Attributes of tensors, arrays and modules are not looked at, nor long containers; the process's global generators
    are left out.
    """
    found: list[Any] = []
    seen = {id(random._inst), id(np.random.mtrand._rand), id(torch.default_generator)}  # type: ignore[attr-defined]
    for root in roots:
        _collect(root, 0, seen, found)
    return found


def _collect(value: object, depth: int, seen: set[int], found: list[Any]) -> None:
    if id(value) in seen or depth > _DEEPEST or isinstance(value, (torch.Tensor, np.ndarray, torch.nn.Module, type)):
        return
    seen.add(id(value))
    if isinstance(value, GENERATOR_KINDS):
        found.append(value)
    elif isinstance(value, _CONTAINERS):
        if len(value) <= 64:
            for item in value.values() if isinstance(value, dict) else value:
                _collect(item, depth + 1, seen, found)
    elif hasattr(value, "__dict__"):
        for item in list(vars(value).values()):
            if not isinstance(item, (str, int, float, bytes)):
                _collect(item, depth + 1, seen, found)


def states_of(generators: Iterable[Any]) -> list[Any]:
    """Plain values and tensors."""
    return [generator_state(generator) for generator in generators]


def load_states(generators: list[Any], states: list[Any]) -> None:
    """Put `states_of` back.

    Raises:
        ValueError: if there are not as many generators as states.
    """
    if len(generators) != len(states):
        raise ValueError(
            f"the data holds {len(generators)} generators of its own, the checkpoint {len(states)}."
            " HINT: resume with the same samplers and datasets."
        )
    for generator, state in zip(generators, states, strict=True):
        set_generator_state(generator, state)
