"""Attribute paths for error messages: where in a graph of Python objects does one object sit?

Only used after a refusal, so it favours short, readable paths (breadth first, `model.encoder.cache[3]`) over speed.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterator, Sequence

import torch

_HIDDEN = ("_modules", "_parameters", "_buffers")


def attribute_path(roots: Sequence[object], wanted: object) -> str:
    """The shortest attribute path from one of `roots` to `wanted`, or its type if no path is visible from Python."""
    queue: deque[tuple[str, object]] = deque()
    for root in roots:
        queue.extend(_starts(root))
    seen: set[int] = set()
    keep: list[object] = []
    while queue:
        path, value = queue.popleft()
        if value is wanted:
            return path
        if id(value) in seen or isinstance(value, (type, types.ModuleType, str, bytes, int, float)):
            continue
        seen.add(id(value))
        keep.append(value)
        queue.extend((path + step, child) for step, child in _children(value))
    return f"<{type(wanted).__qualname__}>"


def _starts(root: object) -> list[tuple[str, object]]:
    """A call `trainer._fit_impl(model, ...)` reads best from the model, and the trainer's own attributes after it."""
    if isinstance(root, (list, tuple)):
        return [start for value in root for start in _starts(value)]
    if isinstance(root, dict):
        return [start for value in root.values() for start in _starts(value)]
    if isinstance(root, types.MethodType):
        return [(type(root.__self__).__name__.lower(), root.__self__)]
    return [("model" if isinstance(root, torch.nn.Module) else type(root).__name__.lower(), root)]


def _children(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", child) for key, child in list(value.items()))
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{index}]", child) for index, child in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        yield from (("{...}", child) for child in value)
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
        yield ".__func__", value.__func__
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield f".<closure>.{name}", cell.cell_contents
            except ValueError:
                continue
        yield ".__defaults__", value.__defaults__
    yield from _attributes(value)


def _attributes(value: object) -> Iterator[tuple[str, object]]:
    try:
        attributes = dict(object.__getattribute__(value, "__dict__"))
    except AttributeError:
        attributes = {}
    for name, child in attributes.items():
        if name in _HIDDEN and isinstance(child, dict):
            yield from ((f".{inner}", grandchild) for inner, grandchild in child.items())
        else:
            yield f".{name}", child
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            if name not in ("__dict__", "__weakref__") and isinstance(
                cls.__dict__.get(name), types.MemberDescriptorType
            ):
                try:
                    yield f".{name}", object.__getattribute__(value, name)
                except AttributeError:
                    continue
