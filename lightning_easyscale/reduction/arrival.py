"""Which gradients of an EST are final, found out for a group of parameters at a time.

A hook on every parameter costs Python a few microseconds each, which for hundreds of small ones is more than their
arithmetic. Where gradients begin anew with every backward, one hook on the parameter of a group that was the last to
get its gradient is enough, if the others' are looked at then: the engine adds to `.grad` once per backward, so a
gradient that is there is final. `disturbed` finds those that changed afterwards all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import Parameter


class Arrivals:
    """The gradients of one EST during one backward.

    Args:
        parameters: of the EST.

    Attributes:
        begun: whether a backward that began without gradients is running.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._parameters = parameters
        self._taken: list[int] = []
        self._left: list[tuple[int, Tensor, int]] = []
        self.begun = False

    def begin(self) -> bool:
        """A backward is about to run; returns whether no parameter has a gradient yet."""
        self.begun = all(p.grad is None for p in self._parameters)
        return self.begun

    def end(self) -> None:
        """That backward is over."""
        self.begun = False
        self._taken, self._left = [], []

    def final(self, members: Sequence[int]) -> list[Tensor] | None:
        """The members' gradients; None as long as one of them has not come."""
        parameters = self._parameters
        grads = [grad for i in members if (grad := parameters[i].grad) is not None]
        return grads if len(grads) == len(members) else None

    def came(self) -> list[int]:
        """The parameters whose gradients came and are still there."""
        return [i for i, p in enumerate(self._parameters) if p.grad is not None]

    def took(self, members: Sequence[int], left: list[Tensor]) -> None:
        """The members' gradients were handed on; what is left in their place, nothing or themselves, stays as it is."""
        if left:
            self._left += [(i, grad, grad._version) for i, grad in zip(members, left, strict=True)]
        else:
            self._taken += members

    def disturbed(self) -> int | None:
        """A parameter to whose gradient something was added after it had been handed on."""
        parameters = self._parameters
        new = [i for i in self._taken if parameters[i].grad is not None]
        new += [i for i, grad, version in self._left if parameters[i].grad is not grad or grad._version != version]
        return new[0] if new else None
