"""Gradients in bulk: no step of Python, and none of autograd's, for each of many small ones.

Attributes are read and written by C loops (`map` over a C function), and tensors that no graph knows are cut, copied
and put together below autograd's part of the dispatch, which takes half of such an operation's time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import repeat
from operator import attrgetter, is_, is_not

import torch
from torch import Tensor

_grad = attrgetter("grad")
_set_grad = vars(torch._C.TensorBase)["grad"].__set__
_AUTOGRAD = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.ADInplaceOrView
)


def below_autograd() -> AbstractContextManager[None]:
    """Inside, nothing is recorded, version counters stay, and what is cut from a tensor is not known as its view."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOGRAD)  # type: ignore[no-any-return]


def gradients(parameters: Iterable[Tensor]) -> list[Tensor | None]:
    """The gradients of parameters, None where there is none."""
    return list(map(_grad, parameters))


def any_gradient(parameters: Iterable[Tensor]) -> bool:
    """Whether a parameter has a gradient."""
    return any(map(is_not, map(_grad, parameters), repeat(None)))


def has_none(values: Iterable[object]) -> bool:
    """Whether one is None."""
    return any(map(is_, values, repeat(None)))


def assign(parameters: Iterable[Tensor], grads: Iterable[Tensor | None]) -> None:
    """Set the gradients of parameters."""
    deque(map(_set_grad, parameters, grads), maxlen=0)


def drop(parameters: Sequence[Tensor]) -> None:
    """Leave parameters without gradients."""
    assign(parameters, repeat(None))
