"""Digests: one short string that is equal exactly when training state is equal, bit for bit.

A tensor's identity here is (name, dtype, shape, bytes); a state's digest is the sha256 over its tensors in ascending
order of name. Nothing that differs between processes enters: no addresses, no device, no insertion order, no ``-0.0 ==
0.0``. Each state also keeps a digest per tensor, so that a difference can be named after the run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_SHORT = 16  # hex digits kept per tensor: enough to name a difference; the total decides equality


@dataclass(frozen=True)
class StateDigest:
    """Digest of a set of named tensors.

    Args:
        total: sha256 (64 hex digits) over all tensors.
        tensors: name -> first 16 hex digits of that tensor's own sha256, ascending by name.
    """

    total: str
    tensors: Mapping[str, str]

    def first_difference(self, other: StateDigest) -> str | None:
        """Name of the first tensor that differs or is missing on one side; None if both are equal."""
        if self.total == other.total:
            return None
        for name in sorted({*self.tensors, *other.tensors}):
            if self.tensors.get(name) != other.tensors.get(name):
                return name
        return "<total>"


def tensor_bytes(tensor: Tensor) -> bytes:
    """The little-endian bytes of a tensor in row-major order, whatever its strides, layout or device.

    Waits for the device; sparse tensors are made dense, conjugate and negative views resolved first.
    """
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.resolve_conj().resolve_neg().cpu().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def _hash_tensor(tensor: Tensor) -> bytes:
    head = f"{dtype_name(tensor.dtype)}{list(tensor.shape)}".encode()
    return hashlib.sha256(head + b"\0" + tensor_bytes(tensor)).digest()


def digest_state(named_tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> StateDigest:
    """Digest named tensors, independent of the order in which they are given.

    Args:
        named_tensors: a mapping or (name, tensor) pairs; on any device, any dtype.

    Raises:
        ValueError: if a name occurs twice.
    """
    pairs = list(named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors)
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise ValueError(f"`named_tensors` holds {twice[0]!r} twice. HINT: give every tensor a name of its own.")
    total = hashlib.sha256()
    tensors: dict[str, str] = {}
    for name, tensor in sorted(pairs, key=lambda pair: pair[0]):
        own = _hash_tensor(tensor)
        total.update(name.encode() + b"\0" + own)
        tensors[name] = own.hex()[:_SHORT]
    return StateDigest(total.hexdigest(), tensors)


def digest_module(module: torch.nn.Module) -> dict[str, StateDigest]:
    """Digest a module: ``{"parameters": ..., "buffers": ...}``.

    Buffers that are kept out of ``state_dict`` are part of it: they decide the bits of the next step just the same.
    """
    return {
        "parameters": digest_state(module.named_parameters()),
        "buffers": digest_state(module.named_buffers()),
    }


def digest_optimizers(optimizers: Sequence[torch.optim.Optimizer], model: torch.nn.Module) -> StateDigest:
    """Digest the state and the hyperparameters of all optimizers, keyed by parameter name.

    Entries are named ``<optimizer index>.<parameter name>.<state key>``, and hyperparameters (learning rate, betas,
    ...) ``<optimizer index>.group<g>.<key>``. The order in which a process created its state does not matter; a
    parameter that ``model`` does not name is keyed by its place in the groups.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for index, optimizer in enumerate(optimizers):
        for g, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                if key != "params":
                    _flatten_into(tensors, f"{index}.group{g}.{key}", value)
            for p, parameter in enumerate(group["params"]):
                name = names.get(id(parameter), f"group{g}.param{p}")
                for key, value in optimizer.state.get(parameter, {}).items():
                    _flatten_into(tensors, f"{index}.{name}.{key}", value)
    return digest_state(tensors)


def _flatten_into(out: dict[str, Tensor], name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        out[name] = value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _flatten_into(out, f"{name}.{key}", item)
    elif isinstance(value, list | tuple) and any(isinstance(item, Tensor | Mapping) for item in value):
        for i, item in enumerate(value):
            _flatten_into(out, f"{name}.{i}", item)
    else:
        # numbers keep every bit in their repr; other objects count by type alone, their repr may hold an address
        plain = isinstance(value, bool | int | float | str | list | tuple | type(None))
        text = repr(value) if plain else type(value).__qualname__
        out[name] = torch.frombuffer(bytearray(json.dumps(text).encode()), dtype=torch.uint8)
