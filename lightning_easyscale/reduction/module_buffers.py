"""The buffers of a module, found again only where the module has changed.

DDP looks through all modules for them before every forward, which takes Python longer than copying them. What makes the
list is remembered instead: every module's children and dictionary of buffers, in the order of `modules()`.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

_values = dict.values


class ModuleBuffers:
    """What ``[b for name, b in module.named_buffers() if name not in ignored]`` gives, sooner.

    Args:
        module: whose buffers.
        ignored: names to leave out; then nothing is remembered.
    """

    def __init__(self, module: nn.Module, ignored: Collection[str]) -> None:
        self._module = module
        self._ignored = ignored
        self._parents: list[dict[str, Any]] = []  # of modules with children
        self._children: list[nn.Module | None] = []
        self._holders: list[dict[str, Tensor | None]] = []
        self._empty: list[dict[str, Any]] = []  # modules without children, modules without buffers
        self._entries: list[Tensor | None] = []
        self._groups: list[list[Tensor]] | None = None

    def __call__(self) -> list[list[Tensor]]:
        """The buffers that hold anything, each once, in order, those of one type and device together."""
        if self._ignored:
            return _by_type(b for name, b in self._module.named_buffers() if name not in self._ignored)
        if self._groups is None or any(self._empty) or _all_values(self._parents) != self._children:
            modules = list(self._module.modules())
            self._parents = [m._modules for m in modules if m._modules]
            self._children = _all_values(self._parents)
            self._holders = [m._buffers for m in modules if m._buffers]
            self._empty = [d for m in modules for d in (m._modules, m._buffers) if not d]
            self._groups = None
        entries = _all_values(self._holders)
        if self._groups is None or len(entries) != len(self._entries) or not all(map(is_, entries, self._entries)):
            self._entries = entries
            self._groups = _by_type({id(b): b for b in entries if b is not None}.values())
        return self._groups


def _all_values(tables: list[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(_values, tables)))


def _by_type(buffers: Any) -> list[list[Tensor]]:
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for buffer in buffers:
        if buffer.numel():
            kinds.setdefault((buffer.dtype, buffer.device), []).append(buffer)
    return list(kinds.values())
