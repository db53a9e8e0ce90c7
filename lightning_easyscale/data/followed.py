"""One loader of one EST: its epoch's iterator, its position, and the way back to it.

A loader is followed from the moment its epoch begins: the generator states at that moment, the index batches consumed
since, and, with workers, the state of each worker's generators after the last batch consumed of it. To resume, the
epoch is begun again under the same generator states, what was consumed is passed over without loading it, and the EST's
and the workers' generators return to where they stood. What was prefetched when a checkpoint was saved is made again.

Iterable datasets go on from their `state_dict` where they have one; else what was consumed is drawn again, and dropped.

Digests guard against what cannot be seen from outside: of the indices consumed, and of the batches that come next where
they are at hand (with workers: one of each). Data that comes out differently is refused, not trained on.
"""

from __future__ import annotations

import collections
import hashlib
import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data._utils.worker import _IterableDatasetStopIteration

from ..rng import Generators
from .identity import DataStateError, digest_of, identity_of, index_bytes
from .owned import load_states, owned_generators, states_of
from .pool import Member, Resume, Stream, WorkerPools
from .worker import is_stateful

log = logging.getLogger(__name__)


@dataclass
class Position:
    """Where one loader stands in its epoch.

    Attributes:
        epoch_start: generator states when the epoch began.
        first_batch: and when its first batch was asked for.
        asked: and when the newest batch was asked for, where batches are asked for ahead of the training.
        batches: batches handed out in this epoch.
        indices: digest of their indices.
        later_epoch: the epoch was begun by the persistent workers of an earlier one.
        workers_at_start: states of those when it began.
        dataset: state of an iterable dataset in the main process.
        newest: the batch that was handed out last, where batches are asked for ahead.
    """

    epoch_start: dict[str, Any] | None = None
    first_batch: dict[str, Any] | None = None
    asked: dict[str, Any] | None = None
    batches: int = 0
    indices: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    later_epoch: bool = False
    workers_at_start: dict[int, Any] = field(default_factory=dict)
    dataset: Any = None
    newest: Any = None


class FollowedLoader:
    """A loader of one EST: its position and its workers.

    Args:
        loader: the loader.
        cls: its class, as it was before it was followed.
        key: its number among the EST's loaders.
        generators: the EST's generators.
        member: the EST.
        pools: the executor's worker pools.

    Attributes:
        expected: the saved position at which its next epoch is to go on.
        reads_ahead: whether a batch is asked for before the one before it is trained on.
    """

    def __init__(
        self, loader: Any, cls: type[Any], key: int, generators: Generators, member: Member, pools: WorkerPools
    ) -> None:
        # Not kept alive from here, so that its workers end as soon as it is dropped.
        self._loader = weakref.ref(loader) if isinstance(loader, DataLoader) else lambda: loader
        self.position = Position()
        self.expected: dict[str, Any] | None = None
        self.reads_ahead = False
        self._cls = cls
        self._key = key
        self._generators = generators
        self._member = member
        self._pools = pools
        self._stream: Stream | None = None
        self._iterator: Any = None
        self._marks: collections.deque[dict[str, Any]] = collections.deque(maxlen=3)
        self._has_workers = isinstance(loader, DataLoader) and loader.num_workers > 0
        self._is_iterable = isinstance(getattr(loader, "dataset", None), IterableDataset)

    @property
    def loader(self) -> Any:
        """The loader; None if it is gone."""
        return self._loader()

    def release(self) -> None:
        """Give the loader back as it was; the workers of its iterator end."""
        self._iterator = self._stream = None
        loader = self.loader
        if isinstance(loader, DataLoader) and "_easyscale_iterate" in vars(loader):
            loader.__class__ = self._cls
            vars(loader).pop("_easyscale_iterate")

    # -- generators ------------------------------------------------------------------------------------------------
    def take(self) -> dict[str, Any]:
        """The EST's generators and the loader's own, as they are."""
        self._generators.capture()
        return {"global": self._generators.state_dict(), "owned": states_of(self._owned())}

    def put(self, state: dict[str, Any]) -> None:
        """Put `take`'s states in force."""
        self._generators.load_state_dict(state["global"])
        self._generators.install()
        self.put_owned(state["owned"])

    def put_owned(self, states: list[Any]) -> None:
        """Put the states of the loader's own generators in force.

        Raises:
            DataStateError: if it has not as many generators as it had.
        """
        try:
            load_states(self._owned(), states)
        except ValueError as error:
            raise DataStateError(str(error)) from None

    def _owned(self) -> list[Any]:
        names = ("sampler", "batch_sampler", "generator") + (() if self._has_workers else ("dataset", "collate_fn"))
        return owned_generators([getattr(self.loader, name, None) for name in names])

    # -- the way forward -------------------------------------------------------------------------------------------
    def open(self, resume: Resume | None = None, *, silent: bool = False) -> Any:
        """The loader's own iterator for one epoch, its workers shared with those of other ESTs."""
        loader, stream = self.loader, self._stream
        if not self._has_workers:
            return self._cls.__iter__(loader)
        if stream is not None and self._workers_live():
            stream.new_epoch({})
            return self._cls.__iter__(loader)
        self._stream = Stream(resume, silent=silent)
        own = loader.multiprocessing_context
        loader.multiprocessing_context = self._pools.context(loader, self._member, self._key, self._stream)
        try:
            return self._cls.__iter__(loader)
        finally:
            loader.multiprocessing_context = own

    def _workers_live(self) -> bool:
        """Whether workers of an earlier epoch wait for this one."""
        return bool(self.loader.persistent_workers) and getattr(self.loader, "_iterator", None) is not None

    def iterator(self) -> Iterator[Any]:
        """The iterator of a loader that is not followed inside its epochs."""
        saved, self.expected = self.expected, None
        if saved is None or saved["workers"] is None:
            return self.open()  # type: ignore[no-any-return]
        self.begin(saved)
        iterator, self._iterator = self._iterator, None
        return iterator  # type: ignore[no-any-return]

    def begin(self, saved: dict[str, Any] | None = None) -> None:
        """Begin an epoch: the loader draws its base seed, and, with workers, its first index batches."""
        position = self.position = Position(epoch_start=self.take())
        workers = saved["workers"] if saved is not None else None
        if workers is not None:
            self._reopen(workers, workers["generators"], {})
            return
        position.later_epoch = self._has_workers and self._stream is not None and self._workers_live()
        self._iterator = self.open()
        if position.later_epoch and self._stream is not None:
            position.workers_at_start = self._stream.generators()

    def batches(self, *, begun: bool) -> Iterator[Any]:
        """The batches of an epoch, or what is left of the one that `expected` was saved in."""
        loader = self.loader
        to_come = self._start(begun)
        position = self.position
        self._marks.clear()
        self._mark()
        try:
            while True:
                if self.reads_ahead:
                    position.asked = self.take()
                try:
                    batch = next(self._iterator)
                except StopIteration:
                    return
                self._count()
                if to_come:
                    self._verify(batch, to_come.pop(0))
                self._mark(batch)
                yield batch
        finally:
            if self.position is position:
                # Nothing else may keep workers alive; unless the next epoch has begun already.
                self._iterator = None
            del loader

    def _start(self, begun: bool) -> list[str]:
        """Begin the epoch, if that was put off, or go on inside a saved one; returns digests of its next batches."""
        saved, self.expected = self.expected, None
        if saved is not None and saved["epoch_start"] is not None:
            now = self.take()
            self._resume(saved)
            self.put(saved["asked"] or now)
            return list(saved["to_come"])
        if not begun:
            self.begin(saved)
        # Samplers draw when the first batch is asked for, which user hooks may precede.
        self.position.first_batch = self.take()
        self._observe()
        return []

    def _verify(self, batch: Any, expected: str) -> None:
        if digest_of(batch) != expected:
            raise DataStateError(
                f"the batch after the {self.position.batches - 1} that were trained on is not the one that the"
                " checkpoint was to go on with: the data depends on something that is not saved, such as a counter, a"
                " cache or a generator that the dataset keeps out of reach. HINT: draw from `torch`, `random`,"
                " `numpy.random` or a generator that is an attribute of the dataset, resume from a checkpoint taken"
                " at the end of an epoch, or start with the weights only."
            )

    def _observe(self) -> None:
        """Digest the index batches that an iterator without workers draws from its sampler."""
        iterator, position = self._iterator, self.position
        sampler = getattr(iterator, "_sampler_iter", None)
        if sampler is None or self._has_workers or self._is_iterable:
            return

        def observed() -> Iterator[Any]:
            for batch in sampler:
                position.indices.update(index_bytes(batch))
                yield batch

        iterator._sampler_iter = observed()

    def _count(self) -> None:
        self.position.batches += 1
        if self._stream is not None and self.loader.in_order and hasattr(self._iterator, "_rcvd_idx"):
            indices = self._stream.consumed(self._iterator._rcvd_idx - 1)
            self.position.indices.update(index_bytes(indices))

    def _mark(self, newest: Any = None) -> None:
        if not self._has_workers and is_stateful(self.loader.dataset):
            self.position.dataset = self.loader.dataset.state_dict()
        if self.reads_ahead:
            self.position.newest = newest
            self._marks.append(self._state())

    # -- the way back ----------------------------------------------------------------------------------------------
    def _resume(self, saved: dict[str, Any]) -> None:
        """Begin a saved epoch again and pass over what was consumed of it."""
        workers, count = saved["workers"], saved["batches"]
        replay = self._has_to_replay(saved)
        self.position = Position(epoch_start=saved["epoch_start"], first_batch=saved["first_batch"])
        self.put(saved["epoch_start"])
        if workers is None:
            if self._is_iterable and not replay:
                self.loader.dataset.load_state_dict(saved["dataset"])
            self._iterator = self.open()
            self.put(saved["first_batch"])
            self._observe()
        elif workers["later_epoch"]:
            states = workers["at_start"] if replay else workers["generators"]
            self._reopen(workers, states, {} if replay else workers["counts"])
        elif replay:
            self._iterator = self.open()
        else:
            resume = Resume(workers["base_seed"], workers["generators"], workers["datasets"], workers["counts"])
            self._iterator = self.open(resume)
        if replay and self._member.rank == 0:
            log.warning("EasyScale: resuming inside an epoch by drawing %d batches again and dropping them", count)
        self._pass_over(count, replay)
        indices = self.position.indices.hexdigest()
        if self.position.batches != count or indices != saved["indices"]:
            raise DataStateError(
                f"the training data does not come in the order of the checkpoint: after {self.position.batches} of"
                f" {count} batches the samples drawn differ. HINT: resume with the same data, sampler and seed,"
                " or start with the weights only."
            )

    def _has_to_replay(self, saved: dict[str, Any]) -> bool:
        workers = saved["workers"]
        if workers is not None and self._cls._get_iterator is not DataLoader._get_iterator:
            return True  # a worker loop that we do not know
        if not self._is_iterable:
            return False
        if workers is None:
            return saved["dataset"] is None
        return bool(workers["later_epoch"]) or not workers["counts"].keys() <= workers["datasets"].keys()

    def _reopen(self, workers: dict[str, Any], states: dict[int, Any], skip: dict[int, int]) -> None:
        """Begin a later epoch of persistent workers that have ended with their process."""
        now = self.take()
        self.open(Resume(workers["base_seed"], states), silent=True)
        assert self._stream is not None
        # Such an epoch draws no base seed: its workers had one already.
        self.put(now)
        self._stream.new_epoch(skip)
        self._iterator = self._cls.__iter__(self.loader)
        self.position.later_epoch = True
        self.position.workers_at_start = workers["at_start"] if skip else states

    def _pass_over(self, count: int, replay: bool) -> None:
        if self._has_workers or replay or not hasattr(self._iterator, "_sampler_iter"):
            for _ in range(count):
                if next(self._iterator, self) is self:
                    break
                self._count()
        elif self._is_iterable:
            self.position.batches = count
        else:
            for _ in range(count):
                if next(self._iterator._sampler_iter, None) is None:
                    break
                self.position.batches += 1

    # -- what is saved ---------------------------------------------------------------------------------------------
    def state_dict(self, *, inside_epoch: bool, ahead: int) -> dict[str, Any]:
        """Tensors, numbers, strings and plain containers.

        Args:
            inside_epoch: whether its epoch has begun and has batches left.
            ahead: batches that were handed out and not trained on.
        """
        if self.expected is not None:
            return dict(self.expected)  # it has not gone on yet
        state: dict[str, Any] = {
            "owned": states_of(self._owned()),
            "identity": identity_of(self.loader),
            "epoch_start": None,
            "workers": None,
        }
        position, iterator = self.position, self._iterator
        if inside_epoch:
            state.update(self._marks[-1 - ahead] if ahead else self._state())
            state["asked"] = position.asked if ahead else None
            state["to_come"] = [digest_of(position.newest)] if ahead else self._to_come()
        elif self._stream is not None and self._workers_live():
            iterator = self.loader._iterator
            while any(len(info) == 1 and iterator._workers_status[info[0]] for info in iterator._task_info.values()):
                # What persistent workers are still making is part of their state when the next epoch begins.
                _receive(iterator)
            state["workers"] = self._workers(received=True)
        return state

    def _state(self) -> dict[str, Any]:
        position = self.position
        return {
            "epoch_start": position.epoch_start,
            "first_batch": position.first_batch,
            "batches": position.batches,
            "indices": position.indices.hexdigest(),
            "dataset": position.dataset,
            "workers": self._workers(received=False) if self._stream is not None else None,
        }

    def _workers(self, *, received: bool) -> dict[str, Any]:
        assert self._stream is not None
        return {
            "base_seed": self._stream.base_seed,
            "counts": dict(self._stream.counts),
            "generators": self._stream.generators(received=received),
            "datasets": self._stream.datasets(),
            "later_epoch": self.position.later_epoch,
            "at_start": self.position.workers_at_start,
        }

    def _to_come(self) -> list[str]:
        """Digests of the next batch of each worker, which they are making anyway; empty if they are not at hand."""
        iterator = self._iterator
        stock = self._has_workers and self._cls._get_iterator is DataLoader._get_iterator
        if iterator is None or not stock or self._is_iterable or not self.loader.in_order:
            return []
        tasks, digests = iterator._task_info, []
        for index in range(iterator._rcvd_idx, min(iterator._rcvd_idx + self.loader.num_workers, iterator._send_idx)):
            while len(tasks[index]) == 1:
                _receive(iterator)
            digests.append(digest_of(tasks[index][1]))
        return digests


def _receive(iterator: Any) -> None:
    """Take a batch off the queue, as the iterator does with one that comes out of order."""
    index, data = iterator._get_data()
    iterator._tasks_outstanding -= 1
    if isinstance(data, _IterableDatasetStopIteration):
        iterator._workers_status[data.worker_id] = False
    else:
        iterator._task_info[index] += (data,)
