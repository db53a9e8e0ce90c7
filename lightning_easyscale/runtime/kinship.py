"""Clones that outlive one call: the second `fit` or `validate` continues with the clones of the first.

A DDP rank is a process that runs the user's whole script; what the script changes between two trainer calls, it changes
on every rank. An EST other than the lead runs trainer calls only. So between two calls the lead's objects are compared
with what they were when the last call ended, and every attribute that the script (or the trainer on entry) has changed
since is changed on the clones too. What ESTs did to their own objects during a call stays their own.

Noticed are: attributes set, replaced or deleted on any object that was cloned; lists, dicts and sets that are attribute
values and got other items; tensors that were written in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ._cloner import Cloner
from .clone import clone_with

_Snapshot = dict[str, tuple[Any, Any]]


class Kinship:
    """The clones of one EST and the originals they stand for.

    Args:
        share: says of an object that every EST uses the same one.
    """

    def __init__(self, share: Callable[[object], bool]) -> None:
        self._share = share
        self._pairs: dict[int, tuple[object, object]] = {}
        self._snapshots: dict[int, _Snapshot] = {}
        self._versions: dict[int, int] = {}

    def clone(self, roots: Sequence[object]) -> list[Any]:
        """Joint clones of `roots`; objects that have a clone keep it, brought up to date.

        Raises:
            CloneError: if an object can neither be copied nor shared; the message has its attribute path.
        """

        def make() -> Cloner:
            cloner = Cloner(self._share)
            cloner.update({key: copy for key, (_, copy) in self._pairs.items()})
            self._update(cloner)
            return cloner

        cloner, copies = clone_with(make, roots)
        for original in cloner.originals:
            copy = dict.get(cloner, id(original), original)
            if copy is not original:
                self._pairs[id(original)] = (original, copy)
        return copies

    def knows(self, original: object) -> bool:
        """Whether `original` has a clone."""
        return id(original) in self._pairs

    def settle(self) -> None:
        """Remember the lead's objects as they are now, at the end of a call."""
        self._snapshots = {
            key: {name: (value, _content(value)) for name, value in vars(original).items()}
            for key, (original, _) in self._pairs.items()
            if hasattr(original, "__dict__") and not isinstance(original, type)
        }
        self._versions = {
            key: original._version
            for key, (original, _) in self._pairs.items()
            if isinstance(original, torch.Tensor) and not isinstance(original, torch.nn.Parameter)
        }

    def _update(self, cloner: Cloner) -> None:
        for key, version in self._versions.items():
            original, copy = self._pairs[key]
            if original._version != version:  # type: ignore[attr-defined]
                with torch.no_grad():
                    copy.copy_(original)  # type: ignore[attr-defined]
        for key, snapshot in self._snapshots.items():
            original, copy = self._pairs[key]
            attributes = vars(original)
            for name in snapshot.keys() - attributes.keys():
                vars(copy).pop(name, None)
            for name, value in attributes.items():
                known = snapshot.get(name)
                if known is not None and known[0] is value and _same(known[1], _content(value)):
                    continue
                self._carry_over(cloner, vars(copy), name, value)

    def _carry_over(self, cloner: Cloner, target: dict[str, Any], name: str, value: Any) -> None:
        pair = self._pairs.get(id(value))
        if pair is None:
            target[name] = cloner.clone(value)
            return
        mine = pair[1]
        if isinstance(value, list):
            mine[:] = [cloner.clone(item) for item in value]  # type: ignore[index]
        elif isinstance(value, (dict, set)):
            fresh = type(value)(
                ((cloner.clone(k), cloner.clone(v)) for k, v in value.items())
                if isinstance(value, dict)
                else map(cloner.clone, value)
            )
            mine.clear()  # type: ignore[attr-defined]
            mine.update(fresh)  # type: ignore[attr-defined]
        target[name] = mine


def _content(value: Any) -> list[Any] | None:
    """What changes when `value` is changed in place; None where that is not looked at."""
    if type(value) is list:
        return list(value)
    if isinstance(value, dict):
        return [item for pair in value.items() for item in pair]
    return list(value) if type(value) is set else None


def _same(before: list[Any] | None, now: list[Any] | None) -> bool:
    if before is None or now is None:
        return before is now
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))
