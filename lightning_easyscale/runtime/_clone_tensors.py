"""How a structural clone copies tensors, parameters, arrays and generators.

Invariants: a parameter of the clone is its own object over the original's storage; every other tensor is copied once
per storage, so that views stay views; nothing here keeps or copies an autograd graph.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from ._clone_types import BULK_BYTES

if TYPE_CHECKING:
    from ._cloner import Cloner


def copy_tensor(cloner: Cloner, value: torch.Tensor) -> torch.Tensor:
    """A parameter over the same storage, or any other tensor over a copy of its storage."""
    return _parameter(cloner, value) if isinstance(value, torch.nn.Parameter) else _tensor(cloner, value)


def _parameter(cloner: Cloner, value: torch.nn.Parameter) -> torch.Tensor:
    if is_lazy(value):
        return cloner.copy_object(value)
    made: torch.Tensor
    if type(value) is not torch.nn.Parameter and issubclass(type(value), torch.nn.Parameter):
        made = torch.Tensor._make_subclass(type(value), value.data, value.requires_grad)
    else:
        made = torch.nn.Parameter(value.data, requires_grad=value.requires_grad)
    cloner[id(value)] = made
    _attributes(cloner, made, value)
    return made


def _tensor(cloner: Cloner, value: torch.Tensor) -> torch.Tensor:
    source = value if value.is_leaf else value.detach()
    if not _is_plain(source):
        cloner.keep(source)
        return source.__deepcopy__(cloner)
    storage = source.untyped_storage()
    if (storage.device.type == "cpu" and storage.is_shared()) or (cloner.in_data and storage.nbytes() > BULK_BYTES):
        return source
    with torch.inference_mode(source.is_inference()):
        made = torch.empty(0, dtype=source.dtype, device=source.device)
        made.set_(_storage(cloner, storage), source.storage_offset(), source.shape, source.stride())
    if source.requires_grad:
        made.requires_grad_()
    cloner[id(value)] = made
    _attributes(cloner, made, value)
    return made


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and tensor.device.type != "meta"
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _storage(cloner: Cloner, storage: torch.UntypedStorage) -> torch.UntypedStorage:
    key = storage.device, storage.data_ptr()
    if key not in cloner.storages or not key[1]:
        cloner.storages[key] = storage.clone()
    return cloner.storages[key]


def _attributes(cloner: Cloner, made: torch.Tensor, value: torch.Tensor) -> None:
    """Gradient, hooks and Python attributes. A stored non-leaf lost its graph, and with it gradient and hooks."""
    if value.is_leaf:
        if value.grad is not None:
            made.grad = cloner.clone(value.grad)
        if value._backward_hooks:
            made._backward_hooks = cloner.clone(value._backward_hooks)
        if value._post_accumulate_grad_hooks:
            made._post_accumulate_grad_hooks = cloner.clone(value._post_accumulate_grad_hooks)
    cloner.fill(made.__dict__, value.__dict__)


def alias_storages(cloner: Cloner, module: torch.nn.Module) -> None:
    """Let tensors over the storage of a parameter of `module`, wherever they are found, keep that storage."""
    if id(module) in cloner.scanned:
        return
    cloner.scanned.update(map(id, module.modules()))
    for parameter in module.parameters():
        if issubclass(type(parameter), torch.nn.Parameter) and not is_lazy(parameter):
            storage = parameter.untyped_storage()
            cloner.storages[storage.device, storage.data_ptr()] = storage


def copy_script_module(cloner: Cloner, value: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """A TorchScript module, which lives in C++ and can only be copied as a whole, with its parameters aliased after."""
    made = cloner.copy_object(value)
    for new, old in zip(made.parameters(), value.parameters(), strict=True):
        new.data = old.data
    return made


def copy_array(cloner: Cloner, value: np.ndarray) -> np.ndarray:
    """A copy of an array, unless it is large and part of a dataset."""
    if cloner.in_data and value.nbytes > BULK_BYTES:
        return value
    made = value.__deepcopy__(cloner)
    made.flags.writeable = value.flags.writeable
    return made


def copy_generator(cloner: Cloner, value: torch.Generator) -> torch.Generator:
    """A generator in the same state."""
    made = torch.Generator(value.device)
    made.set_state(value.get_state())
    return made


def process_generators() -> tuple[object, ...]:
    """The global generators: they belong to the process, and `rng.py` swaps their states between the ESTs."""
    return (
        torch.default_generator,
        *torch.cuda.default_generators,
        random._inst,  # type: ignore[attr-defined]
        np.random.mtrand._rand,  # type: ignore[attr-defined]
    )
