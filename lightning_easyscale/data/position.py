"""The exact position of an EST in its training data, and the way back to it.

A loader is followed from the moment its epoch begins: the generator states at that moment, and every index batch drawn
since. To resume, the epoch is begun again under the same generator states, its sampler is advanced by the same number
of index batches without loading any sample, and the generators return to where the EST stood. A digest of
the drawn indices is verified on the way: data that comes in another order is refused, not trained on.

Exact for map-style datasets that are loaded in the main process. Between epochs every loader without persistent
workers is exact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from ..rng import Generators


class DataStateError(RuntimeError):
    """The data cannot be continued exactly from a checkpoint."""


@dataclass
class Position:
    """Where one loader stands in its epoch."""

    epoch_start: dict[str, Any] | None = None  # generator states when the epoch began
    first_batch: dict[str, Any] | None = None  # and when its first batch was asked for
    batches: int = 0  # index batches consumed in this epoch
    indices: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))

    def state_dict(self, *, inside_epoch: bool) -> dict[str, Any]:
        """Plain containers and tensors."""
        if not inside_epoch:
            return {"epoch_start": None, "first_batch": None, "batches": 0, "indices": ""}
        return {
            "epoch_start": self.epoch_start,
            "first_batch": self.first_batch,
            "batches": self.batches,
            "indices": self.indices.hexdigest(),
        }


class LoaderFollower:
    """Follows the training loaders of one EST.

    Args:
        generators: the EST's generators.
    """

    def __init__(self, generators: Generators) -> None:
        self._generators = generators
        self._positions: list[Position] = []
        self._loaders: list[Any] = []
        self._resume: dict[int, dict[str, Any]] = {}
        self._deferred = False

    def keep(self, loaders: Sequence[Any]) -> None:
        """Forget all loaders but these, which are in use; in their order."""
        by_id = {id(loader): position for loader, position in zip(self._loaders, self._positions, strict=True)}
        self._loaders = list(loaders)
        self._positions = [by_id.get(id(loader)) or Position() for loader in loaders]

    def attach(self, loader: Any) -> None:
        """Follow `loader` from its next epoch on; anything but a `DataLoader` is left as it is and not followed."""
        if any(loader is known for known in self._loaders):
            return
        self._positions.append(Position())
        self._loaders.append(loader)
        if isinstance(loader, DataLoader):
            cls = getattr(type(loader), "_easyscale_original", type(loader))
            body = {"__module__": cls.__module__, "__iter__": _iterate, "_easyscale_original": cls}
            loader.__class__ = type(cls.__name__, (cls,), body)
            loader._easyscale_follow = lambda: self._follow(loader, cls)  # type: ignore[attr-defined]

    def state_dict(self, *, inside_epoch: bool) -> list[dict[str, Any]]:
        """The position of each loader and what identifies its data.

        Args:
            inside_epoch: whether the training epoch has begun and has batches left.
        """
        return [
            {**position.state_dict(inside_epoch=inside_epoch), "identity": identity_of(loader)}
            for position, loader in zip(self._positions, self._loaders, strict=True)
        ]

    def resume_from(self, state: Sequence[dict[str, Any]]) -> None:
        """Continue at a saved position when the attached loaders begin.

        Args:
            state: from `state_dict`.

        Raises:
            DataStateError: if the data is not what the checkpoint was trained on, or cannot be continued exactly.
        """
        if len(state) != len(self._loaders):
            raise DataStateError(
                f"the checkpoint was trained with {len(state)} training loaders, this run has {len(self._loaders)}."
                " HINT: resume with the loaders of the first run, or start with the weights only."
            )
        for loader, saved in zip(self._loaders, state, strict=True):
            _check(loader, saved)
            if saved["epoch_start"] is not None:
                self._resume[id(loader)] = saved

    def expect_resume(self) -> None:
        """Let the next epoch begin when its first batch is asked for: `resume_from` is yet to come."""
        self._deferred = True

    def _follow(self, loader: Any, cls: type[Any]) -> Iterator[Any]:
        """The epoch's iterator. It begins at once, as stock loaders do, or with its first batch after a resume."""
        deferred = self._deferred or id(loader) in self._resume
        return self._batches(loader, cls, None if deferred else self._begin(loader, cls))

    def _begin(self, loader: Any, cls: type[Any]) -> Any:
        """Begin an epoch: the loader draws its base seed."""
        position = self._position(loader)
        position.epoch_start = self._take()
        return cls.__iter__(loader)

    def _batches(self, loader: Any, cls: type[Any], iterator: Any) -> Iterator[Any]:
        position = self._position(loader)
        position.batches, position.indices = 0, hashlib.blake2b(digest_size=16)
        now = self._take()
        saved = self._resume.pop(id(loader), None)
        self._deferred = False
        if saved is None:
            iterator = self._begin(loader, cls) if iterator is None else iterator
            # Samplers draw when the first batch is asked for, which user hooks may precede.
            position.first_batch = self._take()
            _observe(iterator, position)
        else:
            position.epoch_start, position.first_batch = saved["epoch_start"], saved["first_batch"]
            self._put(saved["epoch_start"])
            iterator = cls.__iter__(loader)
            self._put(saved["first_batch"])
            _observe(iterator, position)
            _skip(iterator, position, saved)
            self._put(now)
        for batch in iterator:
            position.batches += 1
            yield batch

    def _position(self, loader: Any) -> Position:
        return next(p for p, known in zip(self._positions, self._loaders, strict=True) if known is loader)

    def _take(self) -> dict[str, Any]:
        self._generators.capture()
        return self._generators.state_dict()

    def _put(self, state: dict[str, Any]) -> None:
        self._generators.load_state_dict(state)
        self._generators.install()


def _iterate(loader: Any) -> Iterator[Any]:
    """The ``__iter__`` of a followed loader."""
    follow: Callable[[], Iterator[Any]] = loader._easyscale_follow
    return follow()


def _check(loader: Any, saved: dict[str, Any]) -> None:
    now = identity_of(loader)
    changed = {k: (v, now.get(k)) for k, v in saved["identity"].items() if now.get(k) != v}
    if changed:
        what = "; ".join(f"{k} was {old!r} and is {new!r}" for k, (old, new) in changed.items())
        raise DataStateError(
            f"the training data differs from the checkpoint's: {what}."
            " HINT: resume with the same data, or start with the weights only."
        )
    reason = why_not_exact(loader, mid_epoch=saved["epoch_start"] is not None)
    if reason:
        raise DataStateError(
            f"the training loader cannot be continued exactly: {reason}. HINT: set `num_workers=0`, resume from a"
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


def why_not_exact(loader: Any, *, mid_epoch: bool) -> str:
    """Why a loader cannot be continued exactly; empty if it can."""
    if not isinstance(loader, DataLoader):
        return f"it is a `{type(loader).__qualname__}`, not a `torch.utils.data.DataLoader`" if mid_epoch else ""
    if loader.num_workers > 0 and loader.persistent_workers:
        return "its `persistent_workers=True` keep generator states that are not saved"
    if not mid_epoch:
        return ""
    if isinstance(loader.dataset, IterableDataset):
        return f"its dataset `{type(loader.dataset).__qualname__}` is iterable and the checkpoint is inside an epoch"
    if loader.num_workers > 0:
        return f"it has `num_workers={loader.num_workers}` and the checkpoint is inside an epoch"
    return ""


def _observe(iterator: Any, position: Position) -> None:
    """Digest the index batches that the iterator draws from its sampler."""
    sampler = getattr(iterator, "_sampler_iter", None)
    if sampler is None:
        return

    def observed() -> Iterator[Any]:
        for batch in sampler:
            position.indices.update(repr(batch).encode())
            yield batch

    iterator._sampler_iter = observed()


def _skip(iterator: Any, position: Position, saved: dict[str, Any]) -> None:
    for _ in range(saved["batches"]):
        if next(iterator._sampler_iter, None) is None:
            break
        position.batches += 1
    if position.batches != saved["batches"] or position.indices.hexdigest() != saved["indices"]:
        raise DataStateError(
            f"the training data does not come in the order of the checkpoint: after {position.batches} of"
            f" {saved['batches']} batches the samples drawn differ. HINT: resume with the same data, sampler and seed,"
            " or start with the weights only."
        )
