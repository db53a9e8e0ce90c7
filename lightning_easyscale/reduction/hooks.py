"""Hooks on the nodes of the graph that add to parameters' gradients.

That is where DDP listens: after the user's own hooks on a parameter, whenever made, and also to no gradient at all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class GradientHooks:
    """Calls a method with a parameter's index whenever its gradient is done, as long as the method's object lives.

    Args:
        parameters: by index; nobody is listened to at first.
        heard: a bound method.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], heard: Callable[[int], None]) -> None:
        # A node is one and the same as long as somebody holds it.
        self._nodes = [_accumulator(p) for p in parameters]
        self._heard = weakref.WeakMethod(heard)
        self._handles: dict[int, RemovableHandle] = {}
        self._finalizer = weakref.finalize(heard.__self__, _remove, self._handles)  # type: ignore[attr-defined]

    @property
    def listening(self) -> frozenset[int]:
        """The parameters that are listened to."""
        return frozenset(self._handles)

    def listen(self, indices: Collection[int]) -> None:
        """Hear of these gradients, and of no other."""
        for index in self._handles.keys() - set(indices):
            self._handles.pop(index).remove()
        for index in indices:
            if index not in self._handles:
                self._handles[index] = self._nodes[index].register_hook(partial(_on_gradient, self._heard, index))

    def close(self) -> None:
        """Hear of nothing any more."""
        self._finalizer()
        self._nodes.clear()


def _accumulator(parameter: nn.Parameter) -> Any:
    with torch.enable_grad():
        made = parameter.view_as(parameter).grad_fn
    assert made is not None
    return made.next_functions[0][0]


def _on_gradient(heard: weakref.WeakMethod[Callable[[int], None]], index: int, *_: Any) -> None:
    method = heard()
    if method is not None:
        method(index)


def _remove(handles: dict[int, RemovableHandle]) -> None:
    for handle in handles.values():
        handle.remove()
    handles.clear()
