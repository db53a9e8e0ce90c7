"""Which types a structural clone keeps by reference, and where the big read-only data of a job lives.

Three questions about a *class*, each answered once per class by `clone.py`: is an instance immutable or a process-wide
resource (`is_shared`); does it open or close the scope in which large data may be shared (`data_scope`); and about a
*container*: is it bulk data (`is_bulk`)?
"""

from __future__ import annotations

import concurrent.futures
import contextvars
import decimal
import enum
import io
import logging
import mmap
import operator
import pathlib
import re
import socket
import sys
import tempfile
import threading
import types
import weakref
from collections.abc import Iterable
from itertools import chain

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

BULK_BYTES = 1 << 20
"""Data larger than this (bytes) inside datasets is shared between the clones."""

PLAIN_VALUES = frozenset({type(None), bool, int, float, complex, str, bytes})
"""Immutable values without any reference to other objects."""

GENERATOR_TYPES = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)
_SMALL_VALUES = frozenset({type(None), bool, int, float, complex})
_BULK_VALUES = PLAIN_VALUES | {torch.Tensor, np.ndarray}
WEAK_TYPES = (weakref.ref, weakref.ProxyType, weakref.CallableProxyType)

# fmt: off
_IMMUTABLE: tuple[type, ...] = (
    type, types.ModuleType, types.CodeType, types.FrameType, types.TracebackType, types.MappingProxyType,
    types.GetSetDescriptorType, types.MemberDescriptorType, types.MethodDescriptorType, types.WrapperDescriptorType,
    types.ClassMethodDescriptorType, types.GenericAlias, types.UnionType, type(...), type(NotImplemented),
    property, staticmethod, classmethod, range, slice, re.Pattern, enum.Enum, pathlib.PurePath, decimal.Decimal,
    operator.attrgetter, operator.itemgetter, operator.methodcaller,
    np.generic, np.dtype, np.ufunc, torch.dtype, torch.layout, torch.device, torch.memory_format, torch.Size,
)
_RESOURCES: tuple[type, ...] = (
    io.IOBase, mmap.mmap, np.memmap, socket.socket, threading.Thread, threading.local,
    concurrent.futures.Executor, concurrent.futures.Future,
    contextvars.ContextVar, contextvars.Context, contextvars.Token,
    logging.Logger, logging.Handler, tempfile.TemporaryDirectory, weakref.finalize,
    torch.Stream, torch.cuda.Stream, torch.Event, torch.cuda.Event,
)
# fmt: on

# Packages whose objects stand for something outside of the object graph: compiler state, process groups, other
# processes, open databases, immutable tables. Looked up by name so that none of them has to be imported.
# fmt: off
_RESOURCE_MODULES = (
    "torch._dynamo", "torch._inductor", "torch._functorch", "torch._C._distributed_c10d", "torch.distributed",
    "multiprocessing", "asyncio", "subprocess", "selectors", "ssl", "sqlite3", "_sqlite3",
    "h5py", "lmdb", "pyarrow",
)
# fmt: on
_RESOURCE_CLASSES = ("contextlib._GeneratorContextManager", "tempfile._TemporaryFileWrapper")
_TABLE_MODULES = ("pandas", "polars", "PIL", "scipy.sparse")


def is_shared(cls: type) -> bool:
    """Whether instances of `cls` stay by reference: immutable values, and resources of the process."""
    if cls in PLAIN_VALUES or issubclass(cls, _IMMUTABLE):
        return True
    if issubclass(cls, (torch.nn.Module, torch.optim.Optimizer)):
        return False
    if issubclass(cls, _RESOURCES):
        return True
    return any(in_modules(base, _RESOURCE_MODULES) or _full_name(base) in _RESOURCE_CLASSES for base in cls.__mro__)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def in_modules(cls: type, modules: Iterable[str]) -> bool:
    """Whether `cls` was defined in one of `modules` or below."""
    name = cls.__module__ if isinstance(cls.__module__, str) else ""
    return any(name == module or name.startswith(module + ".") for module in modules)


def is_table(cls: type) -> bool:
    """Whether `cls` is a table, image or sparse matrix that datasets hold and treat as read-only."""
    return in_modules(cls, _TABLE_MODULES)


def data_scope(cls: type) -> bool | None:
    """Whether an instance of `cls` opens (True), closes (False) or keeps (None) the scope of read-only data."""
    if issubclass(cls, (Dataset, DataLoader)) or _is_lightning(cls, "LightningDataModule"):
        return True
    if issubclass(cls, (torch.nn.Module, torch.optim.Optimizer)) or in_modules(cls, ("lightning", "pytorch_lightning")):
        return False
    return None


def _is_lightning(cls: type, name: str) -> bool:
    return any(base.__name__ == name and in_modules(base, ("lightning", "pytorch_lightning")) for base in cls.__mro__)


def is_bulk(container: list | tuple | dict | set | frozenset) -> bool:
    """Whether a container holds more than `BULK_BYTES` of numbers, strings, bytes, tensors and arrays and nothing else.

    Elements may be one level of lists or tuples of such values (tokenised texts, `(path, label)` pairs).
    """
    size = sys.getsizeof(container)
    values = list(chain(container.keys(), container.values()) if isinstance(container, dict) else container)
    kinds = set(map(type, values))
    if kinds & {list, tuple}:
        rows = [row for row in values if type(row) in (list, tuple)]
        size += sum(map(sys.getsizeof, rows))
        values = [value for value in values if type(value) not in (list, tuple)] + list(chain.from_iterable(rows))
        kinds = set(map(type, values))
    if not kinds <= _BULK_VALUES:
        return False
    if not kinds <= _SMALL_VALUES:
        size += sum(map(_nbytes, values))
    return size > BULK_BYTES


def _nbytes(value: object) -> int:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.nbytes
    return len(value) if isinstance(value, (str, bytes)) else 0


def is_finished(generator: object) -> bool:
    """Whether a generator or coroutine object has run to its end and so holds no state any more."""
    return all(getattr(generator, name, None) is None for name in ("gi_frame", "cr_frame", "ag_frame"))
