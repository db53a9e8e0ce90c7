"""Copies of state that training goes on changing."""

from __future__ import annotations

import copy
from typing import Any

import torch


def host_copy(value: Any) -> Any:
    """Nested containers around copies of all tensors in host memory; other leaves are shared."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # a state dict has attributes
        copied.update((key, host_copy(item)) for key, item in value.items())
        return copied
    if type(value) in (list, tuple):
        return type(value)(host_copy(item) for item in value)
    return value
