"""What an executor says at the start of a rendezvous, in a fixed number of bytes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import torch

HEADER_BYTES = 1024
_LEAD = 48
ROOM = HEADER_BYTES - _LEAD
FAILED, STOP, SNAPSHOT = 1, 2, 4


@lru_cache(maxsize=256)
def digest(text: str) -> bytes:
    """16 bytes that stand for `text` in a header."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


@dataclass
class Header:
    """What one executor says at the start of a rendezvous."""

    tag: bytes
    flags: int
    length: int = 0
    payload: torch.Tensor | None = None  # the first of `length` bytes
    ahead: bytes = bytes(16)  # the transfer that is proposed to follow

    def encode(self) -> torch.Tensor:
        """The header as a fixed-size uint8 tensor."""
        raw = self.tag + self.flags.to_bytes(8, "little") + self.length.to_bytes(8, "little") + self.ahead
        encoded = torch.frombuffer(bytearray(raw.ljust(HEADER_BYTES, b"\0")), dtype=torch.uint8)
        if self.payload is not None:
            said = self.payload[:ROOM]
            encoded[len(raw) : len(raw) + said.numel()] = said
        return encoded

    @classmethod
    def decode(cls, tensor: torch.Tensor) -> Header:
        """Inverse of `encode`."""
        raw = tensor[:_LEAD].numpy().tobytes()
        length = int.from_bytes(raw[24:32], "little")
        payload = tensor[_LEAD : _LEAD + min(length, ROOM)]
        return cls(raw[:16], int.from_bytes(raw[16:24], "little"), length, payload, raw[32:48])
