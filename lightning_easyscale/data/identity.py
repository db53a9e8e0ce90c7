"""What must be equal for a loader to deliver the same batches, and what cannot be continued exactly."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..digest import tensor_bytes


class DataStateError(RuntimeError):
    """The data cannot be continued exactly from a checkpoint."""


def check(loader: Any, saved: dict[str, Any]) -> None:
    """Refuse a loader that cannot go on where the saved one stood.

    Raises:
        DataStateError: if its data differs, or cannot be continued exactly.
    """
    now = identity_of(loader)
    changed = {k: (v, now.get(k)) for k, v in saved["identity"].items() if now.get(k) != v}
    if changed:
        what = "; ".join(f"{k} was {old!r} and is {new!r}" for k, (old, new) in changed.items())
        raise DataStateError(
            f"the training data differs from the checkpoint's: {what}."
            " HINT: resume with the same data, or start with the weights only."
        )
    reason = why_not_exact(loader) if saved["epoch_start"] is not None else ""
    if reason:
        raise DataStateError(
            f"the training loader cannot be continued exactly inside an epoch: {reason}. HINT: resume from a"
            " checkpoint taken at the end of an epoch, or start with the weights only."
        )


def identity_of(loader: Any) -> dict[str, Any]:
    """What must be equal for a loader to deliver the same batches; plain values."""
    dataset = getattr(loader, "dataset", None)
    sampler = getattr(loader, "sampler", None)
    return {
        "dataset": type(dataset).__qualname__,
        "samples": len(dataset) if isinstance(dataset, Sized) else None,
        "batch_size": getattr(loader, "batch_size", None),
        "sampler": type(sampler).__qualname__,
        "num_workers": getattr(loader, "num_workers", None),
        "drop_last": getattr(loader, "drop_last", None),
    }


def why_not_exact(loader: Any) -> str:
    """Why a loader cannot be continued exactly inside an epoch; empty if it can."""
    if not isinstance(loader, DataLoader):
        return f"it is a `{type(loader).__qualname__}`, not a `torch.utils.data.DataLoader`"
    if loader.num_workers > 1 and not loader.in_order:
        return "with `in_order=False` the order of its batches is not determined"
    return ""


def digest_of(batch: Any) -> str:
    """Equal exactly when two batches are equal, bit for bit; objects of unknown kind count by their type."""
    total = hashlib.blake2b(digest_size=16)
    for part in _parts(batch):
        total.update(part + b"\0")
    return total.hexdigest()


def index_bytes(indices: Any) -> bytes:
    """What a sampler gave for one batch, as bytes that tell it from another: of a list of integers themselves."""
    if type(indices) is list:
        try:
            return array("q", (len(indices), *indices)).tobytes()
        except (TypeError, OverflowError):
            pass
    return repr(indices).encode()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype}{list(value.shape)}".encode() + tensor_bytes(value)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield f"{value.dtype}{value.shape}".encode() + value.tobytes()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _parts(item)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        yield str(len(value)).encode()
        for item in value:
            yield from _parts(item)
    else:
        plain = value is None or isinstance(value, (bool, int, float, str, bytes, np.generic))
        yield (repr(value) if plain else type(value).__qualname__).encode()
