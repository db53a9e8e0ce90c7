"""Which gradients of an EST are final, found out for a group of parameters at a time.

A hook on every parameter costs Python a few microseconds each, which for hundreds of small ones is more than their
arithmetic. Where gradients begin anew with every backward, one hook on the parameter of a group that was the last to
get its gradient is enough, if the others' are looked at then: the engine adds to `.grad` once per backward, so a
gradient that is there is final. `disturbed` finds those that changed afterwards all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_

from torch import Tensor
from torch.nn import Parameter

from ..runtime.bulk import any_gradient, gradients, has_none

_version = attrgetter("_version")


class Arrivals:
    """The gradients of one EST during one backward.

    Args:
        parameters: of the EST.

    Attributes:
        begun: whether a backward that began without gradients is running.
        groups: indices of the parameters that are looked at together.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._parameters = parameters
        self._members: list[list[Parameter]] = []
        self._taken: list[int] = []
        self._left: list[tuple[int, list[Tensor], list[int]]] = []
        self.begun = False
        self.groups: Sequence[Sequence[int]] = ()

    def group(self, groups: Sequence[Sequence[int]]) -> None:
        """Look at these groups from now on."""
        self.groups = groups
        self._members = [[self._parameters[i] for i in members] for members in groups]

    def begin(self) -> bool:
        """A backward is about to run; returns whether no parameter has a gradient yet."""
        self.begun = not any_gradient(self._parameters)
        return self.begun

    def end(self) -> None:
        """That backward is over."""
        self.begun = False
        self.forget()

    def forget(self) -> None:
        """What was handed on belongs to others from here on, who may free it."""
        self._taken, self._left = [], []

    def final(self, number: int) -> list[Tensor] | None:
        """The gradients of a group; None as long as one of them has not come."""
        grads = gradients(self._members[number])
        return None if has_none(grads) else grads  # type: ignore[return-value]

    def came(self) -> list[int]:
        """The parameters whose gradients came and are still there."""
        return [i for i, p in enumerate(self._parameters) if p.grad is not None]

    def took(self, number: int, left: list[Tensor]) -> None:
        """A group's gradients were handed on; what is left in their place, nothing or themselves, stays as it is."""
        if left:
            self._left.append((number, left, list(map(_version, left))))
        else:
            self._taken.append(number)

    def disturbed(self) -> int | None:
        """A parameter to whose gradient something was added after it had been handed on."""
        for number in self._taken:
            if any_gradient(self._members[number]):
                return self._first_other(number, [None] * len(self._members[number]))
        for number, left, versions in self._left:
            if not all(map(is_, gradients(self._members[number]), left)):
                return self._first_other(number, left)
            if list(map(_version, left)) != versions:
                changed = [grad._version != version for grad, version in zip(left, versions, strict=True)]
                return self.groups[number][changed.index(True)]
        return None

    def _first_other(self, number: int, expected: Sequence[Tensor | None]) -> int:
        here = gradients(self._members[number])
        return next(i for i, a, b in zip(self.groups[number], here, expected, strict=True) if a is not b)
