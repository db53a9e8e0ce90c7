"""Deposits as one stretch of bytes: contiguous tensors as they lie in memory, anything else pickled.

Layout: the length of the pickle in 8 bytes, the pickle, then the tensors, each where any type may begin.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 16
_LENGTH = 8


def pack(obj: Any) -> Tensor:
    """`obj` as a flat uint8 tensor."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(obj)
    said = file.getbuffer()
    parts = [as_bytes(tensor) for tensor in pickler.tensors]
    starts = _starts(len(said), [part.numel() for part in parts])
    raw = torch.empty(starts[-1], dtype=torch.uint8, device="cpu")
    raw[:_LENGTH] = torch.frombuffer(bytearray(len(said).to_bytes(_LENGTH, "little")), dtype=torch.uint8)
    raw[_LENGTH : _LENGTH + len(said)] = torch.frombuffer(said, dtype=torch.uint8)
    for part, start in zip(parts, starts, strict=False):
        raw[start : start + part.numel()] = part
    return raw


def unpack(raw: Tensor) -> Any:
    """Inverse of `pack`; `raw` begins at a multiple of 16 bytes of its storage."""
    length = int.from_bytes(raw[:_LENGTH].numpy().tobytes(), "little")
    return _Unpickler(raw, length).load()


def as_bytes(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor as flat uint8, in its own memory if that is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._indices: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> Any:
        if type(obj) is not Tensor or obj.requires_grad or obj.device.type != "cpu" or not _is_plain(obj):
            return None
        index = self._indices.setdefault(id(obj), len(self.tensors))
        if index == len(self.tensors):
            self.tensors.append(obj)
        return index, obj.dtype, tuple(obj.shape)


class _Unpickler(pickle.Unpickler):
    def __init__(self, raw: Tensor, length: int) -> None:
        super().__init__(io.BytesIO(raw[_LENGTH : _LENGTH + length].numpy().tobytes()))
        self._raw = raw
        self._next = _aligned(_LENGTH + length)
        self._tensors: list[Tensor] = []

    def persistent_load(self, pid: Any) -> Tensor:
        # A tensor is first met in the order in which it was packed.
        index, dtype, shape = pid
        if index == len(self._tensors):
            size = torch.Size(shape).numel() * dtype.itemsize
            # Memory of its own: views of one storage as several types cannot be saved.
            self._tensors.append(self._raw[self._next : self._next + size].view(dtype).view(shape).clone())
            self._next = _aligned(self._next + size)
        return self._tensors[index]


def _is_plain(tensor: Tensor) -> bool:
    odd = tensor.is_quantized or tensor.is_conj() or tensor.is_neg()
    return tensor.layout is torch.strided and tensor.is_contiguous() and not odd


def _starts(length: int, sizes: Sequence[int]) -> list[int]:
    """Where each part begins, and where the last one ends."""
    starts = [_aligned(_LENGTH + length)]
    for size in sizes:
        starts.append(_aligned(starts[-1] + size))
    return starts


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
