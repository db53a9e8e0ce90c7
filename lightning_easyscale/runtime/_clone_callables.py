"""How a structural clone copies what refers to other objects in less visible ways: callables and weak references.

A lambda, hook, bound method or compiled forward that refers to the original module would let one EST train another's
module, silently. So each is rebuilt over the copies, unless it surely refers to nothing that is state of a rank.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from typing import TYPE_CHECKING, Any

from ._clone_types import PLAIN_VALUES, WEAK_TYPES, is_shared

if TYPE_CHECKING:
    from ._cloner import Cloner


def copy_function(cloner: Cloner, value: types.FunctionType) -> types.FunctionType:
    """`value` itself if it is constant, else a function of the same code over copies of all it refers to."""
    if _is_constant(cloner, value, set()):
        return value
    closure = value.__closure__ or ()
    made = types.FunctionType(
        value.__code__, value.__globals__, value.__name__, None, tuple([_cell(cloner, cell) for cell in closure])
    )
    cloner[id(value)] = made
    for cell in closure:
        _fill_cell(cloner, cell)
    made.__defaults__ = cloner.clone(value.__defaults__)
    made.__kwdefaults__ = cloner.clone(value.__kwdefaults__)
    made.__qualname__, made.__module__, made.__doc__ = value.__qualname__, value.__module__, value.__doc__
    made.__annotations__ = value.__annotations__
    cloner.fill(made.__dict__, value.__dict__)
    fix_wrapper_id(made)
    return made


def _cell(cloner: Cloner, cell: types.CellType) -> types.CellType:
    """A new cell; functions that share a variable go on sharing it."""
    cloner.keep(cell)
    return cloner.setdefault(id(cell), types.CellType())


def _fill_cell(cloner: Cloner, cell: types.CellType) -> None:
    if id(cell) in cloner.scanned or _is_empty(cell):
        return
    cloner.scanned.add(id(cell))
    made, content = cloner[id(cell)], cell.cell_contents
    if type(content) in WEAK_TYPES:
        made.cell_contents = content
        cloner.later(functools.partial(setattr, made, "cell_contents"), content)
    else:
        made.cell_contents = cloner.clone(content)


def _is_empty(cell: types.CellType) -> bool:
    """Whether a closure's variable has no value yet."""
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False


def _is_constant(cloner: Cloner, value: Any, seen: set[int]) -> bool:
    """Whether a callable surely refers to nothing that is state of a rank."""
    cls = type(value)
    if id(value) in seen:
        return True
    seen.add(id(value))
    if cls is types.FunctionType:
        contents = [cell.cell_contents for cell in value.__closure__ or () if not _is_empty(cell)]
        parts = [*contents, *(value.__kwdefaults__ or {}).values(), *value.__dict__.values(), value.__defaults__]
        # a plain value in a cell may be rebound through `nonlocal`, so it counts as state
        rebindable = any(type(content) in PLAIN_VALUES for content in contents)
        return _is_importable(value) or (not rebindable and all(_is_constant(cloner, part, seen) for part in parts))
    if cls is functools.partial:
        parts = [value.func, value.args, *value.keywords.values(), *value.__dict__.values()]
        return all(_is_constant(cloner, part, seen) for part in parts)
    if cls is tuple:
        return all(_is_constant(cloner, item, seen) for item in value)
    if cls is types.BuiltinFunctionType:
        return _is_constant(cloner, value.__self__, seen)
    return is_shared(cls) or cloner.share(value)


def _is_importable(function: types.FunctionType) -> bool:
    """Whether `function` is what its module and qualified name stand for: a module global or a class attribute."""
    found: object = sys.modules.get(function.__module__ or "")
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is function


def fix_wrapper_id(made: Any) -> None:
    """`torch.compile` marks a compiled callable with its own id, and mistrusts a mark that is another's."""
    if "_torchdynamo_wrapper_id" in made.__dict__:
        made.__dict__["_torchdynamo_wrapper_id"] = id(made)


def copy_method(cloner: Cloner, value: types.MethodType) -> types.MethodType:
    """The method bound to the copy of its owner; a function that is not an attribute of the class is cloned too."""
    owner = cloner.clone(value.__self__)
    function: Any = value.__func__
    name = getattr(function, "__name__", "")
    if not any(cls.__dict__.get(name) is function for cls in type(value.__self__).__mro__):
        function = cloner.clone(function)
    unchanged = owner is value.__self__ and function is value.__func__
    return value if unchanged else types.MethodType(function, owner)


def copy_builtin_method(cloner: Cloner, value: Any) -> Any:
    """`seen.append` of the copy of `seen`; `math.sqrt` as it is."""
    owner = cloner.clone(value.__self__)
    return value if owner is value.__self__ else getattr(owner, value.__name__)


def copy_partial(cloner: Cloner, value: functools.partial) -> Any:
    """`value` itself if it is constant, else a partial over the copies."""
    return value if _is_constant(cloner, value, set()) else cloner.copy_object(value)


def copy_cached_function(cloner: Cloner, value: Any) -> Any:
    """A bound method or closure under `functools.lru_cache` with a cache of its own; module functions as they are."""
    made = cloner.clone(value.__wrapped__)
    return value if made is value.__wrapped__ else functools.lru_cache(**value.cache_parameters())(made)


def copy_weak(cloner: Cloner, value: Any) -> Any:
    """A weak reference where it cannot be corrected later (in a tuple, or as a constructor's argument)."""
    return retarget(cloner, value, reach=True)


def retarget(cloner: Cloner, value: Any, *, reach: bool) -> Any:
    """The weak reference to the target's copy, or `value` if the target is dead or not part of the clone.

    Args:
        cloner: the clone in the making.
        value: a weak reference or proxy.
        reach: clone the target if it is not part of the clone so far.
    """
    target, owner = _target(value)
    if target is None:
        return value
    made = cloner.clone(target) if reach or id(owner) in cloner else target
    if made is target:
        return value
    callback = cloner.clone(value.__callback__) if isinstance(value, weakref.ref) else None
    if type(value) in (weakref.ProxyType, weakref.CallableProxyType):
        return weakref.proxy(made)
    return type(value)(made, callback) if callback is not None else type(value)(made)


def _target(reference: Any) -> tuple[object, object]:
    """What a weak reference or proxy refers to, and the object that must be in the clone for it to be retargeted."""
    if type(reference) in (weakref.ProxyType, weakref.CallableProxyType):
        try:
            target = reference.__init__.__self__  # a proxy forwards the look-up, so the bound owner is the target
        except ReferenceError:
            return None, None
        return target, target
    target = reference()
    return target, target.__self__ if isinstance(reference, weakref.WeakMethod) and target else target


def copy_weak_collection(cloner: Cloner, value: Any) -> Any:
    """A `WeakSet` or weak dictionary whose weak sides follow their targets."""
    made = type(value)()
    cloner[id(value)] = made
    if isinstance(value, weakref.WeakSet):
        for item in value:
            cloner.later(lambda ref: made.add(ref()), weakref.ref(item))
    elif isinstance(value, weakref.WeakValueDictionary):
        for key, item in list(value.items()):
            cloner.later(functools.partial(_set_value, made, cloner.clone(key)), weakref.ref(item))
    else:
        for key, item in list(value.items()):
            cloner.later(functools.partial(_set_key, cloner, made, item), weakref.ref(key))
    return made


def _set_value(made: Any, key: object, item: weakref.ref) -> None:
    made[key] = item()


def _set_key(cloner: Cloner, made: Any, item: object, key: weakref.ref) -> None:
    made[key()] = cloner.clone(item)
