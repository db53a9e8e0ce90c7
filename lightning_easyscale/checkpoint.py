"""The snapshot format: a normal Lightning checkpoint plus one ``easyscale`` entry.

The entry holds what plain Lightning does not know: the job's identity (N, level, reduction order, ...), a fingerprint
of the software and devices, and the state of every EST keyed by its rank, so that any placement can resume it. It is
made of tensors, numbers, strings and plain containers and loads with ``weights_only=True``.

A file is committed (`commit.py`): a path holds a whole checkpoint or what it held before. A digest of the content is
verified on load.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch

from .commit import commit

KEY = "easyscale"
FORMAT = 1
DIGEST_BYTES = 16

_ALWAYS = ("num_ests", "level", "pool", "kernels", "reduction", "threads_per_est")
_HINTS = {
    "num_ests": "`num_ests` is part of the job: resume with the same, or start a new job from the weights only",
    "level": "resume at the same level, or start a new job from the weights only",
    "pool": "the pool of device types is fixed when a job starts: pass `pool={saved}` and run on its types",
    "kernels": "the policy of D2 and the version of its format are fixed when a job starts: resume with the same `pool`"
    " and version of this package, or start a new job from the weights only",
    "reduction": "pass `reduction={saved!r}`, or start a new job from the weights only",
    "threads_per_est": "thread counts change bits: pass `threads_per_est={saved}`",
}
_DEVICE = ("device_types", "cpu", "cpu_capability")
_WARNED = ("driver", "python")


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or belongs to another job than the one that wants to resume it."""


@dataclass(frozen=True)
class JobIdentity:
    """What has to stay the same for the bits to stay the same.

    Args:
        num_ests: N.
        level: canonical determinism level.
        pool: device types of the job under D2, else empty.
        reduction: ``"ddp"``, ``"tree"`` or ``"native"``.
        threads_per_est: CPU threads per EST.
        kernels: how D2 is kept, ``"pinned"`` or ``"portable"`` with the version of its format; empty without D2.
    """

    num_ests: int
    level: str
    pool: tuple[str, ...]
    reduction: str
    threads_per_est: int
    kernels: str = ""

    def to_state(self) -> dict[str, Any]:
        """Plain containers."""
        return {**asdict(self), "pool": list(self.pool)}


def check_resumable(
    entry: Mapping[str, Any],
    identity: JobIdentity,
    fingerprint: Mapping[str, Any],
    *,
    allow: Iterable[str] = (),
) -> list[str]:
    """Compare a checkpoint's ``easyscale`` entry with the job that wants to resume it.

    Args:
        entry: the checkpoint's entry.
        identity: the resuming job.
        fingerprint: versions and devices of the resuming job (`determinism.fingerprint`).
        allow: fingerprint fields that may differ although the level promises bits.

    Returns:
        Warnings to show and to record.

    Raises:
        CheckpointError: if the job may not resume it; names the field, both values and the cure.
    """
    if entry.get("format") != FORMAT and "format" not in allow:
        raise CheckpointError(
            f"the checkpoint has format {entry.get('format')!r}, this version reads {FORMAT}."
            " HINT: resume with the version that wrote it, or pass `allow=['format']`."
        )
    saved, now = entry["job"], identity.to_state()
    for field in _ALWAYS:
        before = saved.get(field, "")  # a checkpoint from before a field was recorded
        if before != now[field]:
            raise CheckpointError(
                f"the checkpoint was trained with `{field}={before!r}`, this job has `{field}={now[field]!r}`."
                f" HINT: {_HINTS[field].format(saved=before)}."
            )
    warnings = []
    strict = identity.level != "D0"
    heterogeneous = "D2" in identity.level
    allowed = set(allow)
    for field in sorted(entry["fingerprint"].keys() | fingerprint.keys()):
        old, new = entry["fingerprint"].get(field), fingerprint.get(field)
        if old == new:
            continue
        difference = f"`{field}` was {old!r} and is {new!r}"
        if field in _DEVICE:
            if not heterogeneous:
                warnings.append(f"{difference}: from here on the bits are no longer promised to equal the reference's")
        elif field in _WARNED or not strict:
            warnings.append(difference)
        elif field in allowed:
            warnings.append(f"{difference}, which `allow` accepts")
        else:
            raise CheckpointError(
                f"the checkpoint was written elsewhere: {difference}, and level {identity.level} promises equal bits."
                f" HINT: resume in the same environment, or pass `allow=[{field!r}]` to accept the difference."
            )
    return warnings


def seal(checkpoint: dict[str, Any]) -> None:
    """Write the digest of the content into the ``easyscale`` entry."""
    checkpoint[KEY]["digest"] = content_digest(checkpoint)


def content_digest(checkpoint: Mapping[str, Any]) -> str:
    """Digest of all tensors and plain values of a checkpoint, the digest itself left out."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in content_parts(checkpoint):
        digest.update(row_major_bytes(part) if isinstance(part, torch.Tensor) else part)
    return digest.hexdigest()


def row_major_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in row-major order; waits for its device."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def content_parts(checkpoint: Mapping[str, Any]) -> Iterator[bytes | torch.Tensor]:
    """What the digest is made of, in order; a tensor stands for its bytes in row-major order."""
    yield from _parts({**checkpoint, KEY: {k: v for k, v in checkpoint[KEY].items() if k != "digest"}})


def save(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Commit a checkpoint to a local path.

    Raises:
        OSError: if it cannot be written; what the path held before is untouched then.
    """
    commit(path, lambda file: torch.save(dict(checkpoint), file))


def load(
    path: str | os.PathLike[str], *, weights_only: bool | None = None, map_location: Any = "cpu"
) -> dict[str, Any]:
    """Read a checkpoint and verify it.

    Args:
        path: a local path.
        weights_only: as for `torch.load`.
        map_location: as for `torch.load`.

    Raises:
        CheckpointError: if the file is damaged.
        FileNotFoundError: if there is none.
    """
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=weights_only)
    except Exception as error:
        # The reader fails in as many ways as there are wrong bytes, "invalid argument" among them; in an intact file
        # the reason is another.
        if (isinstance(error, OSError) and error.errno != errno.EINVAL) or _is_intact(path):
            raise
        raise CheckpointError(
            f"`{os.fspath(path)}` is damaged ({str(error).splitlines()[0] if str(error) else type(error).__name__})."
            " HINT: resume from an older checkpoint."
        ) from error
    verify(checkpoint, os.fspath(path))
    return checkpoint


def verify(checkpoint: Mapping[str, Any], path: str) -> None:
    """Check the digest of a checkpoint of ours; others pass.

    Raises:
        CheckpointError: if the content is not what was written.
    """
    entry = checkpoint.get(KEY) if isinstance(checkpoint, Mapping) else None
    if entry is not None and entry.get("digest") != content_digest(checkpoint):
        raise CheckpointError(
            f"`{path}` is not what was written: its digest differs. HINT: resume from an older checkpoint, or start"
            " from the weights only if you changed the file on purpose."
        )


def _is_intact(path: str | os.PathLike[str]) -> bool:
    """Whether every record of a torch file has the checksum that was written with it."""
    try:
        with ZipFile(path) as file:
            return file.testzip() is None
    except (BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError):
        return False


def _parts(value: Any) -> Iterator[bytes | torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield f"T{value.dtype}{tuple(value.shape)}".encode()
        yield value
    elif isinstance(value, Mapping):
        yield f"M{len(value)}".encode()
        for key in sorted(value, key=lambda k: (type(k).__name__, repr(k))):
            yield repr(key).encode()
            yield from _parts(value[key])
    elif isinstance(value, (list, tuple)):
        yield f"L{len(value)}".encode()
        if all(type(item) is int for item in value):  # a generator's state has hundreds
            yield "".join([f"int:{item}" for item in value]).encode()
            return
        for item in value:
            yield from _parts(item)
    elif isinstance(value, (int, float, str, bool, bytes, type(None))):
        yield f"{type(value).__name__}:{value!r}".encode()
    else:
        # A user's own object: its type only, because its representation may name addresses.
        yield type(value).__qualname__.encode()
