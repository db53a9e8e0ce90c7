"""The memo of one structural clone, and the rule for each class of object.

`Cloner` follows `copy.deepcopy`, whose protocol (`__deepcopy__`, `__reduce_ex__`, `copyreg`) it honours. It is itself
the memo: a `copy.deepcopy(child, memo)` made by a user's `__deepcopy__` comes back here through `memo.get`. So nothing
is patched, and several threads may clone at a time.

Invariants: an object has at most one copy; an object without state of a rank is its own copy; every original lives as
long as the memo, so no id stands for two objects.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import hashlib
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from . import _clone_callables as callables
from . import _clone_tensors as tensors
from . import _clone_types as kinds

_MISSING = object()


class Refusal(Exception):  # noqa: N818 - becomes a `CloneError` where the roots are known
    """Cloning reached `value`, which cannot be copied, because of `reason`."""

    def __init__(self, value: object, reason: str) -> None:
        super().__init__(reason)
        self.value, self.reason = value, reason


class Cloner(dict):
    """The memo `id(original) -> copy` of one clone.

    Args:
        share: says of an object that it is to stay by reference.

    Attributes:
        in_data: whether the object at hand is part of a dataset, where large data is shared.
        storages: (device, address) of each original storage -> the storage of the clone.
        originals: every object that was cloned, kept alive so that no id is used twice.
        scanned: ids of modules whose parameters are in `storages`, and of closure cells that were filled.
    """

    def __init__(self, share: Callable[[object], bool]) -> None:
        super().__init__((id(generator), generator) for generator in tensors.process_generators())
        self.share = share
        self.in_data = False
        self.storages: dict[tuple[torch.device, int], torch.UntypedStorage] = {}
        self.scanned: set[int] = set()
        self.originals: list[object] = []
        self._late: list[tuple[Callable[[Any], object], Any]] = []

    def run(self, roots: Sequence[object]) -> list[object]:
        """Clone all roots, then settle the weak references, whose targets are known only now."""
        for module in filter(lambda root: isinstance(root, torch.nn.Module), _flatten(roots)):
            tensors.alias_storages(self, module)
        with torch.no_grad():
            copies = [self.clone(root) for root in roots]
            while self._late:
                assign, reference = self._late.pop(0)
                assign(callables.retarget(self, reference, reach=False))
        return copies

    def clone(self, value: Any) -> Any:
        """The copy of `value`, made on first sight."""
        done = dict.get(self, id(value), _MISSING)
        if done is not _MISSING:
            return done
        rule, scope = _rule(type(value))
        if rule is None:
            return value
        self.keep(value)
        if self.share(value):
            self[id(value)] = value
            return value
        outer, self.in_data = self.in_data, self.in_data if scope is None else scope
        try:
            made = rule(self, value)
        finally:
            self.in_data = outer
        return self.setdefault(id(value), made)

    def get(self, key: object, default: object = None) -> object:
        """Serve the memo, and take over the copy when the caller is `copy.deepcopy` itself."""
        frame = sys._getframe(1)
        if frame.f_code is copy.deepcopy.__code__:
            return self.clone(frame.f_locals["x"])
        return dict.get(self, key, default)

    def keep(self, original: object) -> None:
        """Keep a temporary object alive, whose id is in the memo."""
        self.originals.append(original)

    def later(self, assign: Callable[[Any], object], reference: Any) -> None:
        """Call `assign` with the weak reference to the copy of `reference`'s target once all copies are known."""
        self._late.append((assign, reference))

    def fill(self, made: dict, value: dict, drop: tuple[str, ...] = ()) -> None:
        """Clone the items of `value` into `made`; those named in `drop` become None."""
        for key, item in value.items():
            key = self.clone(key)
            if type(item) in kinds.WEAK_TYPES:
                made[key] = item
                self.later(functools.partial(made.__setitem__, key), item)
            else:
                made[key] = None if key in drop else self.clone(item)

    def copy_object(self, value: Any) -> Any:
        """Any object, by the protocol of `copy.deepcopy`.

        Raises:
            Refusal: if the protocol fails on it.
        """
        if self.in_data and kinds.is_table(type(value)):
            return value
        try:
            hook = getattr(value, "__deepcopy__", None)
            if hook is not None:
                return hook(self)
            reduce = copyreg.dispatch_table.get(type(value))
            recipe = reduce(value) if reduce else value.__reduce_ex__(4)
            # Not as a method: to spread arguments over one takes C stack, of which Python 3.12 has little.
            return value if isinstance(recipe, str) else Cloner._rebuild(self, value, *recipe)
        except (Refusal, RecursionError):
            raise
        except Exception as error:
            raise Refusal(value, f"{type(error).__name__}: {error}") from error

    def _rebuild(
        self,
        value: Any,
        make: Callable[..., Any],
        args: tuple,
        state: Any = None,
        items: Iterable[Any] | None = None,
        pairs: Iterable[tuple[Any, Any]] | None = None,
        set_state: Callable[[Any, Any], object] | None = None,
    ) -> Any:
        made = self.setdefault(id(value), make(*_tuple(self, args)))
        if state is not None:
            self.keep(state)
            if set_state is not None:
                set_state(made, self.clone(state))
            elif hasattr(made, "__setstate__"):
                made.__setstate__(self.clone(state))
            else:
                self._set_attributes(made, state)
        for item in items or ():
            made.append(self.clone(item))
        for key, item in pairs or ():
            made[self.clone(key)] = self.clone(item)
        return made

    def _set_attributes(self, made: Any, state: Any) -> None:
        attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
        if attributes:
            self.setdefault(id(attributes), made.__dict__)
            self.fill(made.__dict__, attributes)
        for name, item in (slots or {}).items():
            setattr(made, name, self.clone(item))


def _flatten(roots: Iterable[Any]) -> Iterable[Any]:
    """The roots, with tuples, lists and dicts of arguments opened."""
    for root in roots:
        if type(root) in (tuple, list, dict):
            yield from _flatten(root.values() if isinstance(root, dict) else root)
        else:
            yield root


def _list(cloner: Cloner, value: list) -> list:
    if cloner.in_data and kinds.is_bulk(value):
        return value
    made: list = []
    cloner[id(value)] = made
    for index, item in enumerate(value):
        if type(item) in kinds.WEAK_TYPES:
            made.append(item)
            cloner.later(functools.partial(made.__setitem__, index), item)
        else:
            made.append(cloner.clone(item))
    return made


def _hash(cloner: Cloner, value: Any) -> Any:
    return value.copy()


def _tuple(cloner: Cloner, value: tuple) -> tuple:
    if cloner.in_data and kinds.is_bulk(value):
        return value
    made = tuple([cloner.clone(item) for item in value])
    return value if all(new is old for new, old in zip(made, value, strict=True)) else made


def _set(cloner: Cloner, value: set | frozenset) -> set | frozenset:
    if cloner.in_data and kinds.is_bulk(value):
        return value
    return type(value)([cloner.clone(item) for item in value])


def _dict(cloner: Cloner, value: dict) -> dict:
    if cloner.in_data and kinds.is_bulk(value):
        return value
    made: dict = {}
    cloner[id(value)] = made
    cloner.fill(made, value)
    return made


def _lock(cloner: Cloner, value: Any) -> Any:
    return threading.Lock() if type(value) is _LOCK else threading.RLock()


def _running(cloner: Cloner, value: object) -> object:
    if kinds.is_finished(value):
        return value
    raise Refusal(value, "a generator that has not ended is state of one rank, and Python cannot copy it")


def _framework_object(cloner: Cloner, value: Any) -> Any:
    """A module, optimizer or loader: all of its `__dict__`, also what its `__getstate__` leaves out for pickle."""
    made = object.__new__(type(value))
    cloner[id(value)] = made
    if isinstance(value, torch.nn.Module):
        tensors.alias_storages(cloner, value)
    # a loader with persistent workers starts its own on first use
    cloner.fill(made.__dict__, value.__dict__, drop=("_iterator",) if isinstance(value, DataLoader) else ())
    for name in copyreg._slotnames(type(value)):  # type: ignore[attr-defined]
        if hasattr(value, name):
            object.__setattr__(made, name, cloner.clone(getattr(value, name)))
    callables.fix_wrapper_id(made)
    return made


_LOCK = type(threading.Lock())
_Rule = Callable[[Cloner, Any], Any]
_EXACT: dict[type, _Rule] = {
    list: _list,
    tuple: _tuple,
    dict: _dict,
    set: _set,
    frozenset: _set,
    types.FunctionType: callables.copy_function,
    types.MethodType: callables.copy_method,
    types.BuiltinFunctionType: callables.copy_builtin_method,
    types.MethodWrapperType: callables.copy_builtin_method,
    functools.partial: callables.copy_partial,
    type(functools.lru_cache(len)): callables.copy_cached_function,
    weakref.WeakSet: callables.copy_weak_collection,
    weakref.WeakKeyDictionary: callables.copy_weak_collection,
    weakref.WeakValueDictionary: callables.copy_weak_collection,
    torch.Generator: tensors.copy_generator,
    **dict.fromkeys({type(hashlib.new(name)) for name in ("sha256", "blake2b", "blake2s")}, _hash),
    _LOCK: _lock,
    type(threading.RLock()): _lock,
    **dict.fromkeys(kinds.GENERATOR_TYPES, _running),
}
_SUBCLASSES: tuple[tuple[type | tuple[type, ...], _Rule], ...] = (
    (torch.Tensor, tensors.copy_tensor),
    (np.ndarray, tensors.copy_array),
    (torch.jit.ScriptModule, tensors.copy_script_module),
    (kinds.WEAK_TYPES, callables.copy_weak),
)
_COPY_PROTOCOL = ("__deepcopy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__")
_rules: weakref.WeakKeyDictionary[type, tuple[_Rule | None, bool | None]] = weakref.WeakKeyDictionary()


def _rule(cls: type) -> tuple[_Rule | None, bool | None]:
    """How to copy instances of `cls` (None: not at all), and what they do to the scope of shared data."""
    found = _rules.get(cls)
    if found is None:
        found = _rules[cls] = (_choose_rule(cls), kinds.data_scope(cls))
    return found


def _choose_rule(cls: type) -> _Rule | None:
    if kinds.is_shared(cls):
        return None
    if cls in _EXACT:
        return _EXACT[cls]
    for base, rule in _SUBCLASSES:
        if issubclass(cls, base):
            return rule
    framework = (torch.nn.Module, torch.optim.Optimizer, DataLoader)
    if issubclass(cls, framework) and all(_is_inherited(cls, name) for name in _COPY_PROTOCOL):
        return _framework_object
    return Cloner.copy_object


def _is_inherited(cls: type, name: str) -> bool:
    """Whether a method of the copy protocol is not the user's: `__deepcopy__` absent, the others the framework's."""
    method = getattr(cls, name, None)
    if method is None or method is getattr(object, name, None):
        return True
    return name != "__deepcopy__" and method.__module__.split(".")[0] in ("torch", "lightning", "pytorch_lightning")
