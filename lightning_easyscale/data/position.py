"""All loaders of one EST: whose position is followed, and who shares workers with the loaders of other ESTs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from ..rng import Generators
from .followed import FollowedLoader
from .identity import DataStateError, check
from .pool import Member, WorkerPools


class LoaderFollower:
    """Follows the training loaders of one EST, and lets all its loaders share workers with those of other ESTs.

    Args:
        generators: the EST's generators.
        member: the EST; None: the only one.
        pools: the executor's worker pools.
        reading: entered while a batch is read.
    """

    def __init__(
        self,
        generators: Generators,
        member: Member | None = None,
        pools: WorkerPools | None = None,
        reading: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._generators = generators
        self._reading = reading
        self._member = member or Member(0, {}, on_enter=lambda rank: None, let_others_run=lambda tag: None)
        self._pools = pools or WorkerPools()
        self._loaders: list[FollowedLoader] = []
        self._held: list[Any] = []
        self._shared: weakref.WeakKeyDictionary[Any, FollowedLoader] = weakref.WeakKeyDictionary()
        self._expected_shared: list[dict[str, Any]] = []
        self._epoch_over = False
        self._attached = 0
        self._expected: Sequence[dict[str, Any]] = ()
        self._expected_generators: dict[str, Any] | None = None
        self._generators_after: dict[str, Any] | None = None
        self._deferred = False

    def keep(self, loaders: Sequence[Any]) -> None:
        """Forget all loaders but these, which are in use; in their order."""
        by_id = {id(known.loader): known for known in self._loaders}
        self._loaders = [by_id.get(id(loader)) or self._new(loader) for loader in loaders]
        self._held = list(loaders)

    def attach(self, loader: Any) -> None:
        """Follow a training loader from its next epoch on; anything but a `DataLoader` is left as it is."""
        if any(loader is known.loader for known in self._loaders):
            return
        followed = self._new(loader)
        self._loaders.append(followed)
        self._held.append(loader)
        if len(self._loaders) <= len(self._expected):
            self._expect(followed, self._expected[len(self._loaders) - 1])
        if isinstance(loader, DataLoader):
            # In no reference cycle: `multiprocessing` would close the queues before the workers are told to end.
            _replace_iter(loader, partial(_follow, weakref.ref(self), followed))
        for known in self._loaders:
            # Lightning finds out by reading ahead whether a batch is the last one.
            known.reads_ahead = not all(_has_length(other.loader) for other in self._loaders)

    def share(self, loader: Any) -> None:
        """Let another loader (validation, test, predict) share its workers."""
        if isinstance(loader, DataLoader) and loader.num_workers > 0 and loader not in self._shared:
            followed = self._shared[loader] = self._new(loader)
            if loader.persistent_workers and self._expected_shared:
                self._expect(followed, self._expected_shared.pop(0))
            _replace_iter(loader, followed.iterator)

    def release(self) -> None:
        """Give all loaders back as they were."""
        for known in (*self._loaders, *self._shared.values()):
            known.release()

    def _new(self, loader: Any) -> FollowedLoader:
        self._attached += 1
        return FollowedLoader(
            loader, _original_class(loader), self._attached, self._generators, self._member, self._pools
        )

    def state_dict(self, *, inside_epoch: bool, ahead: int = 0) -> list[dict[str, Any]]:
        """The position of each loader and what identifies its data.

        Args:
            inside_epoch: whether the training epoch has begun and has batches left.
            ahead: batches that were handed out and not trained on.
        """
        return [followed.state_dict(inside_epoch=inside_epoch, ahead=ahead) for followed in self._loaders]

    def shared_state_dict(self, loaders: Sequence[Any]) -> list[dict[str, Any]]:
        """The states of persistent workers of loaders that are not followed; in the order of `loaders`."""
        known = [self._shared[loader] for loader in loaders if loader in self._shared and loader.persistent_workers]
        states = [followed.state_dict(inside_epoch=False, ahead=0) for followed in known]
        return [*states, *self._expected_shared]  # the latter: of loaders that this run has not come to yet

    def expect_resume(
        self,
        state: Sequence[dict[str, Any]],
        shared: Sequence[dict[str, Any]],
        generators: Mapping[str, Any],
        *,
        epoch_over: bool,
    ) -> None:
        """Let the loaders that are attached next go on at saved positions; they begin with their first batch.

        Args:
            state: from `state_dict`.
            shared: from `shared_state_dict`.
            generators: states of the EST's generators when it was saved.
            epoch_over: the epoch it was saved in had no batches left, but is still to be ended.
        """
        self._expected_shared, self._epoch_over = list(shared), epoch_over
        self._loaders, self._held = [], []
        self._expected, self._expected_generators = state, dict(generators)
        self._generators_after = None
        self._deferred = True

    def resume_from(self, state: Sequence[dict[str, Any]]) -> None:
        """Go on at saved positions, unless the loaders have been told before.

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
        if not self._expected:
            for followed, saved in zip(self._loaders, state, strict=True):
                self._expect(followed, saved)
        self._expected, self._expected_generators = (), None

    def generators_after_resume(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The generator states to go on with: those saved, or as a batch read ahead has left them."""
        return self._generators_after or saved

    @staticmethod
    def _expect(followed: FollowedLoader, saved: dict[str, Any]) -> None:
        check(followed.loader, saved)
        followed.expected = saved
        followed.put_owned(saved["owned"])

    def _follow(self, followed: FollowedLoader) -> Iterator[Any]:
        """The epoch's iterator. It begins at once, as stock loaders do, or with its first batch after a resume."""
        deferred = self._deferred or followed.expected is not None
        if self._epoch_over and followed.reads_ahead and self._is_between_epochs(followed):
            # Reading ahead must not begin the next epoch.
            self._epoch_over = False
            return iter(())
        self._epoch_over = False
        if not deferred:
            followed.begin()
        return self._batches(followed, begun=not deferred)

    @staticmethod
    def _is_between_epochs(followed: FollowedLoader) -> bool:
        return followed.expected is not None and followed.expected["epoch_start"] is None

    def _batches(self, followed: FollowedLoader, *, begun: bool) -> Iterator[Any]:
        batches, ended = self._all_batches(followed, begun=begun), object()
        while True:
            with self._reading():
                batch = next(batches, ended)
            if batch is ended:
                return
            yield batch

    def _all_batches(self, followed: FollowedLoader, *, begun: bool) -> Iterator[Any]:
        self._deferred = False
        if self._expected_generators is not None and self._is_between_epochs(followed):
            # Read ahead, before the EST's generators are restored: the batch is drawn from those that will be.
            now = followed.take()
            followed.put({**now, "global": self._generators_after or self._expected_generators})
            batches = followed.batches(begun=begun)
            first = next(batches, None)
            self._generators_after = followed.take()["global"]
            followed.put({**followed.take(), "global": now["global"]})
            if first is not None:
                yield first
            yield from batches
        else:
            yield from followed.batches(begun=begun)


def _follow(follower: weakref.ref[LoaderFollower], followed: FollowedLoader) -> Iterator[Any]:
    alive = follower()
    return followed.iterator() if alive is None else alive._follow(followed)


def _original_class(loader: Any) -> type[Any]:
    return getattr(type(loader), "_easyscale_original", type(loader))


def _replace_iter(loader: Any, iterate: Callable[[], Iterator[Any]]) -> None:
    """Let ``iter(loader)`` call `iterate`; `loader` stays an instance of its class."""
    cls = _original_class(loader)
    body = {"__module__": cls.__module__, "__iter__": _iterate, "_easyscale_original": cls}
    loader.__class__ = type(cls.__name__, (cls,), body)
    loader._easyscale_iterate = iterate


def _iterate(loader: Any) -> Iterator[Any]:
    """The ``__iter__`` of such a loader."""
    iterate: Callable[[], Iterator[Any]] = loader._easyscale_iterate
    return iterate()


def _has_length(loader: Any) -> bool:
    try:
        len(loader)
    except (TypeError, NotImplementedError):
        return False
    return True
