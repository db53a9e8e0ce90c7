"""Run record: the exact bits of a training run, step by step and EST by EST.

A record is a directory with one append-only file of JSON lines per EST, ``est-00000.jsonl``. Each line is one object
with a ``kind``:

- ``header``: first line; ``schema``, ``rank``, ``num_ests`` and what the run wants to tell about itself;
- ``step``: the tensors that `training_step` returned for one micro-batch, as exact bits. ``batch`` counts micro-batches
  from 0 over the whole job, ``step`` is the number of optimizer steps done before it: both go on over a resume;
- ``metrics``: logged metrics of an epoch or a validation, with ``batch`` and ``step`` = those already done;
- ``digest``: digests of parameters, buffers, optimizer state after ``step`` optimizer steps;
- ``event``: anything worth remembering (placement, fingerprint, resume, exception). Events are never compared.

Invariants: a line is complete or it is the last one and ignored, so a killed run leaves a readable record; the bits are
those of the device, never rounded through a decimal number; a file depends on its EST alone, not on the process or the
placement that ran it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .digest import StateDigest, digest_module, digest_optimizers, digest_state, dtype_name, tensor_bytes

__all__ = [
    "SCHEMA_VERSION",
    "EstRecord",
    "Record",
    "RecordError",
    "StateDigest",
    "Step",
    "TensorBits",
    "digest_module",
    "digest_optimizers",
    "digest_state",
    "est_file",
    "flatten_tensors",
    "read_lines",
]

SCHEMA_VERSION = 1


class RecordError(ValueError):
    """A record that cannot be read; the message names the file and the cure."""


class TensorBits(NamedTuple):
    """Dtype, shape and bits of one tensor.

    ``bits`` is the tensor's little-endian bytes in hexadecimal, or ``sha256:<hex>`` of them for a large tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    bits: str

    @classmethod
    def of(cls, tensor: Tensor) -> TensorBits:
        """The exact bits of ``tensor`` (waits for its device)."""
        return cls(dtype_name(tensor.dtype), tuple(tensor.shape), tensor_bytes(tensor).hex())

    @property
    def exact(self) -> bool:
        """Whether the value itself is kept, not its digest alone."""
        return not self.bits.startswith("sha256:")

    def tensor(self) -> Tensor:
        """The tensor, bit for bit, on the CPU.

        Raises:
            RecordError: if only a digest was kept.
        """
        if not self.exact:
            raise RecordError("this tensor was too large to be kept: the record holds its sha256 alone.")
        dtype = getattr(torch, self.dtype)
        raw = bytearray.fromhex(self.bits)
        if not raw:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).reshape(self.shape)

    def __str__(self) -> str:
        """A short readable form: the value for few elements, else the digest or the first bits."""
        if not self.exact:
            return self.bits
        value = self.tensor()
        return str(value.item()) if value.numel() == 1 else f"{self.dtype}{list(self.shape)} {value.flatten()[:4]}"


@dataclass(frozen=True)
class Step:
    """What one EST recorded at one point: a micro-batch, or the metrics of an epoch or a validation."""

    step: int
    batch: int
    tensors: Mapping[str, TensorBits]


@dataclass
class EstRecord:
    """Everything one EST recorded.

    Args:
        rank: the EST's rank in the virtual world.
        header: the first line of its file.
        steps: micro-batch -> entry, ascending.
        metrics: (batch, stage) -> entry, ascending.
        digests: optimizer steps done -> {"parameters" | "buffers" | "optimizer" -> digest}.
        events: the ``event`` lines as they stand.
    """

    rank: int
    header: Mapping[str, Any] = field(default_factory=dict)
    steps: dict[int, Step] = field(default_factory=dict)
    metrics: dict[tuple[int, str], Step] = field(default_factory=dict)
    digests: dict[int, dict[str, StateDigest]] = field(default_factory=dict)
    events: list[Mapping[str, Any]] = field(default_factory=list)

    def series(self, name: str = "loss") -> tuple[list[int], list[float]]:
        """Micro-batch numbers and float64 values of a scalar that was recorded under ``name``."""
        picked = [(b, s.tensors[name]) for b, s in self.steps.items() if name in s.tensors]
        return [b for b, _ in picked], [float(bits.tensor().double()) for _, bits in picked]


@dataclass
class Record:
    """A run record, merged from the files of all its ESTs.

    Args:
        path: the directory.
        num_ests: N of the job.
        ests: rank -> what that EST recorded; ranks whose file is missing are absent.
    """

    path: Path
    num_ests: int
    ests: dict[int, EstRecord]

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Read a record directory.

        Raises:
            RecordError: if there is no record, a line in the middle of a file is damaged, or the schema is a newer one.
        """
        path = Path(path)
        files = sorted(path.glob("est-*.jsonl"))
        if not files:
            raise RecordError(f"`{path}` holds no run record: no est-*.jsonl. HINT: give the `dirpath` of a RunRecord.")
        ests = {est.rank: est for est in map(_load_est, files)}
        sizes = {int(est.header["num_ests"]) for est in ests.values()}
        if len(sizes) > 1:
            raise RecordError(f"`{path}` mixes runs of {sorted(sizes)} ESTs. HINT: keep one directory per run.")
        return cls(path, sizes.pop(), ests)

    def is_complete(self, *, batches: int) -> bool:
        """Whether every EST recorded the micro-batches 0..batches-1."""
        return len(self.ests) == self.num_ests and all(
            all(b in est.steps for b in range(batches)) for est in self.ests.values()
        )


def est_file(directory: str | Path, rank: int) -> Path:
    """The file of one EST inside a record directory."""
    return Path(directory) / f"est-{rank:05d}.jsonl"


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a record file; a torn last line, as a killed run may leave it, is dropped.

    Raises:
        RecordError: if a line before the last is damaged.
    """
    lines = file.read_bytes().split(b"\n")
    out: list[dict[str, Any]] = []
    for i, line in enumerate(lines[:-1]):  # what follows the last newline was never finished
        try:
            out.append(json.loads(line))
        except ValueError as error:
            raise RecordError(f"`{file}` is damaged at line {i + 1}: {error}.") from error
    return out


def flatten_tensors(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """All tensors inside what `training_step` returned, named by their path.

    A bare tensor is called ``loss``; ``{"loss": a, "parts": [b, c]}`` gives ``loss``, ``parts.0``, ``parts.1``.
    """
    if isinstance(value, Tensor):
        return {prefix or "loss": value}
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {}
    out: dict[str, Tensor] = {}
    for key, item in items:
        out.update(flatten_tensors(item, f"{prefix}.{key}" if prefix else str(key)))
    return out


def _load_est(file: Path) -> EstRecord:
    lines = read_lines(file)
    if not lines or lines[0].get("kind") != "header":
        raise RecordError(f"`{file}` does not start with a header. HINT: it is no file of a run record, or was cut.")
    header = lines[0]
    if header["schema"] != SCHEMA_VERSION:
        raise RecordError(
            f"`{file}` has schema {header['schema']}, this version reads {SCHEMA_VERSION}."
            " HINT: read it with the version of lightning_easyscale that wrote it."
        )
    est = EstRecord(rank=int(header["rank"]), header=header)
    for line in lines[1:]:
        kind = line["kind"]
        if kind in ("step", "metrics"):
            tensors = {k: TensorBits(dtype, tuple(shape), bits) for k, (dtype, shape, bits) in line["tensors"].items()}
            entry = Step(line["step"], line["batch"], tensors)
            if kind == "step":
                est.steps[entry.batch] = entry
            else:
                est.metrics[entry.batch, line["stage"]] = entry
        elif kind == "digest":
            est.digests[line["step"]] = {k: StateDigest(v["total"], v["tensors"]) for k, v in line["states"].items()}
        elif kind == "event":
            est.events.append(line)
    return est
