"""Structural clone: one joint copy of a trainer, its module, callbacks and loaders for one more EST of this process.

An EST stands for a DDP rank, and a rank has a process of its own. So a clone copies everything that is state of a rank
and reachable from the call (attributes, buffers, metrics, closures, hooks, bound methods, weak references, generators),
keeps by reference what belongs to the process or never changes, and aliases what DDP keeps equal on all ranks:

- a `torch.nn.Parameter` becomes a new `Parameter` over the *same storage*; gradients are the clone's own;
- tensors copy once per storage, so that views keep their sharing; a view of a parameter stays a view of it;
- inside datasets, data loaders and data modules, data larger than `BULK_BYTES` is taken as read-only and shared;
- functions are rebuilt only if a closure cell, default or attribute of theirs may hold state of the rank;
- locks are made anew: ESTs run one at a time, and one that waits inside `with lock:` must not block the others;
- files, sockets, threads, executors, process groups, loggers and whatever `share` names stay by reference;
- what is state of a rank and cannot be copied (a running generator, a live loader iterator) is refused with its path.

Module globals, class attributes and singletons belong to the process and are therefore shared by all its ESTs.

An object that gives itself a `__deepcopy__`, `__reduce__` or `__getstate__` is copied by it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ._clone_path import attribute_path
from ._cloner import Cloner, Refusal

_Result = TypeVar("_Result")
_DEEP_STACK_BYTES = 512 << 20
_DEEP_RECURSION = 1_000_000


class CloneError(RuntimeError):
    """An object that is state of a rank cannot be copied for another EST."""


def structural_clone(roots: Sequence[object], *, share: Callable[[object], bool]) -> list[object]:
    """One joint copy of several roots for one more EST; references between roots are references between copies.

    Args:
        roots: what the EST will use, e.g. a bound trainer function, the tuple of its arguments and the dict of its
            keyword arguments.
        share: says of an object that every EST of the process uses the same one (loggers, the launcher, the runtime).

    Returns:
        The copies, in the order of `roots`.

    Raises:
        CloneError: if an object can neither be copied nor shared; the message has its attribute path.
    """
    return clone_with(lambda: Cloner(share), roots)[1]


def clone_with(make: Callable[[], Cloner], roots: Sequence[object]) -> tuple[Cloner, list[object]]:
    """As `structural_clone`, with a cloner that may know some copies already; returns the cloner too.

    Args:
        make: creates the cloner; called again where the graph is too deep for the ordinary stack.
        roots: what to clone.
    """

    def clone() -> tuple[Cloner, list[object]]:
        cloner = make()
        return cloner, cloner.run(roots)

    try:
        try:
            return clone()
        except RecursionError:
            return _with_deep_stack(clone)
    except Refusal as refusal:
        path = attribute_path(roots, refusal.value)
        kind = f"{type(refusal.value).__module__}.{type(refusal.value).__qualname__}"
        raise CloneError(
            f"`{path}` (a `{kind}`) cannot be copied for every EST: {refusal.reason}."
            " HINT: create it in `setup()` or when it is first used, so that every EST makes its own, or give its class"
            " a `__deepcopy__`."
        ) from refusal.__cause__


def alias_parameters(source: torch.nn.Module, clone: torch.nn.Module) -> None:
    """Let every parameter of `clone` use the storage of the one of the same name in `source`, as after a clone.

    For parameters that came to be, or moved to another device, after the clone was made.

    Raises:
        ValueError: if the two modules do not have the same parameter names and shapes.
    """
    theirs, ours = dict(source.named_parameters()), dict(clone.named_parameters())
    differing = {name for name in theirs.keys() | ours.keys() if _shape(theirs.get(name)) != _shape(ours.get(name))}
    if differing:
        raise ValueError(
            f"`clone` has other parameters than `source`: {sorted(differing)}."
            " HINT: create the same parameters on every EST, in the same hook."
        )
    for name, parameter in ours.items():
        parameter.data = theirs[name].data


def _shape(parameter: torch.nn.Parameter | None) -> tuple[torch.Size, torch.dtype] | None:
    return None if parameter is None else (parameter.shape, parameter.dtype)


def _with_deep_stack(job: Callable[[], _Result]) -> _Result:
    """Run `job` where it may recurse over a million calls deep (long linked lists, deep trees)."""
    result: list[_Result] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            result.append(job())
        except BaseException as error:  # noqa: BLE001 - handed to the caller below
            errors.append(error)

    limit, stack = sys.getrecursionlimit(), threading.stack_size(_DEEP_STACK_BYTES)
    sys.setrecursionlimit(_DEEP_RECURSION)
    try:
        thread = threading.Thread(target=target, name="easyscale-clone")
        thread.start()
    finally:
        threading.stack_size(stack)
    thread.join()
    sys.setrecursionlimit(limit)
    if errors:
        raise errors[0]
    return result[0]
