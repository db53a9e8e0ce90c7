"""Plain values that are equal exactly when the originals are equal, bit for bit; and the differences between two."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_easyscale.digest import tensor_bytes


def exact(value: Any) -> Any:
    """`value` as plain data: floats and tensors by their bits, containers item by item, other objects by type."""
    if isinstance(value, Tensor):
        return _exact_tensor(value)
    if isinstance(value, np.ndarray):
        return exact(torch.from_numpy(np.ascontiguousarray(value)))
    if isinstance(value, float):
        return f"{value!r} {struct.pack('<d', value).hex()}"
    if value is None or isinstance(value, (bool, int, str, bytes)):
        return value
    if isinstance(value, Mapping):
        return {_key(k): exact(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [exact(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(v) for v in value)
    if isinstance(value, Path):
        return str(value)
    return f"<{type(value).__qualname__}>"


def _key(key: Any) -> Any:
    return key if isinstance(key, (str, int)) else repr(key)


def _exact_tensor(tensor: Tensor) -> str:
    tensor = tensor.detach()
    digest = hashlib.blake2b(tensor_bytes(tensor), digest_size=10).hexdigest()
    shown = [f"{v:.9g}" for v in tensor.reshape(-1)[:3].tolist()] if not tensor.is_complex() else []
    return f"{str(tensor.dtype)[6:]}{list(tensor.shape)} {' '.join(shown)} #{digest}"


def differences(expected: Any, got: Any, path: str = "") -> Iterator[str]:
    """Every place where two plain values differ."""
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in [*expected, *(k for k in got if k not in expected)]:
            if key not in got or key not in expected:
                yield f"{path}.{key}: only in {'the reference' if key in expected else 'the run'}"
            else:
                yield from differences(expected[key], got[key], f"{path}.{key}")
    elif isinstance(expected, (list, tuple)) and isinstance(got, (list, tuple)):
        for index, (one, other) in enumerate(zip(expected, got, strict=False)):
            yield from differences(one, other, f"{path}[{index}]")
        if len(expected) != len(got):
            yield f"{path}: {len(expected)} items in the reference, {len(got)} in the run"
    elif isinstance(expected, str) and isinstance(got, str) and "\n" in expected + got:
        if expected != got:
            yield from differences(expected.splitlines(), got.splitlines(), path)
    elif expected != got or type(expected) is not type(got):
        yield f"{path}: {expected!r} != {got!r}"
