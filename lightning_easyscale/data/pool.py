"""One pool of `num_workers` processes for the loaders of all ESTs of an executor.

The seam is a loader's public `multiprocessing_context`. PyTorch's own loader iterator, unmodified, runs in each EST;
the context that it is given hands it queues and processes that look like its own, while worker ``w`` of every EST lives
in the same process (`worker.py`). So seeds, prefetching, order, time-outs, errors and shutdown are PyTorch's.

A pool starts when every EST that can come has asked for its iterator: an EST that asks first lets the others run up to
the same point. Thus each dataset is forked or sent as it was when its own EST asked, as under stock DDP.
"""

from __future__ import annotations

import inspect
import multiprocessing.context
import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.multiprocessing
from torch.utils.data import DataLoader

from ..rng import Generators, Parts, state_of_parts
from ..runtime.context import ESTContext
from .worker import Sent, Skipped, Task, serve


@dataclass
class Member:
    """An EST as its loader workers have to know it.

    Args:
        rank: its rank.
        environment: variables that name the rank.
        on_enter: puts the EST's virtual world in force in a forked process.
        let_others_run: gives the other ESTs of the executor the chance to come to the same point.
    """

    rank: int
    environment: Mapping[str, str]
    on_enter: Callable[[int], None]
    let_others_run: Callable[[str], None]


@dataclass
class Resume:
    """Where virtual workers go on.

    Args:
        base_seed: what the loader drew as seed of its workers.
        generators: worker id -> state to continue from.
        datasets: worker id -> state of an iterable dataset.
        skip: worker id -> batches that are not to be made again.
    """

    base_seed: int
    generators: dict[int, dict[str, Any]] = field(default_factory=dict)
    datasets: dict[int, Any] = field(default_factory=dict)
    skip: dict[int, int] = field(default_factory=dict)


class Stream:
    """What is known of the batches of one EST's loader iterator.

    Args:
        resume: where its workers go on; None: from the start.
        silent: index batches are dropped until the next epoch begins.

    Attributes:
        base_seed: the seed of its workers, once drawn.
        counts: worker id -> batches consumed in this epoch.
    """

    def __init__(self, resume: Resume | None = None, *, silent: bool = False) -> None:
        self.resume = resume
        self.base_seed: int | None = resume.base_seed if resume else None
        self._consumed: dict[int, _Known] = {}
        self._received: dict[int, _Known] = {}
        self._datasets: dict[int, Any] = {}
        self._initial = dict(resume.generators) if resume else {}
        self.new_epoch(resume.skip if resume else {})
        self.silent = silent

    def new_epoch(self, skip: Mapping[int, int]) -> None:
        """Persistent workers begin another epoch, of which some batches are not to be made."""
        self.silent = False
        self.counts: dict[int, int] = {}
        self._skip = dict(skip)
        self._sent: dict[int, Sent] = {}
        self._drawn: dict[int, tuple[int, Any]] = {}

    def drawn(self, batch: int, worker: int, indices: Any) -> bool:
        """An index batch has been drawn; whether its worker has to make it."""
        self._drawn[batch] = (worker, indices)
        if self._skip.get(worker, 0) == 0:
            return True
        self._skip[worker] -= 1
        return False

    def received(self, batch: Any, sent: Sent) -> None:
        """A batch has come, or the answer of a persistent worker that is ready for the next epoch."""
        self._received[sent.worker] = self._received.get(sent.worker, _Known()).after(sent)
        if isinstance(batch, int):
            self._sent[batch] = sent
        else:
            self._consumed[sent.worker] = self._received[sent.worker]

    def consumed(self, batch: int) -> Any:
        """A batch has been handed to the EST; returns its indices."""
        worker, indices = self._drawn.pop(batch)
        self.counts[worker] = self.counts.get(worker, 0) + 1
        sent = self._sent.pop(batch, None)
        if sent is not None:
            self._consumed[worker] = self._consumed.get(worker, _Known()).after(sent)
            if sent.dataset is not None:
                self._datasets[worker] = sent.dataset
        return indices

    def generators(self, *, received: bool = False) -> dict[int, dict[str, Any]]:
        """Worker id -> state after its last consumed (or received) batch; plain values and tensors."""
        states = self._received if received else self._consumed
        return {**self._initial, **{worker: known.state() for worker, known in states.items()}}

    def datasets(self) -> dict[int, Any]:
        """Worker id -> state of its iterable dataset after its last consumed batch."""
        return {**(self.resume.datasets if self.resume else {}), **self._datasets}


@dataclass(frozen=True)
class _Known:
    """The states of one worker's generators, put together from what was sent of them."""

    parts: Parts = (None, None, None)
    owned: list[Any] = field(default_factory=list)

    def after(self, sent: Sent) -> _Known:
        parts = tuple(old if new is None else new for new, old in zip(sent.parts, self.parts, strict=True))
        return _Known(parts, self.owned if sent.owned is None else sent.owned)  # type: ignore[arg-type]

    def state(self) -> dict[str, Any]:
        return {**state_of_parts(self.parts), "owned": self.owned}


class WorkerPools:
    """The pools of one executor."""

    def __init__(self) -> None:
        self._gathering: dict[Hashable, list[Context]] = {}

    def context(self, loader: DataLoader[Any], member: Member, key: Hashable, stream: Stream) -> Context:
        """The `multiprocessing_context` for an iterator of `loader`.

        Args:
            loader: a loader with workers.
            member: the EST that it belongs to.
            key: the same for the loaders of all ESTs that share a pool.
            stream: is told of every batch.
        """
        base: Any = loader.multiprocessing_context or torch.multiprocessing
        return Context(
            base, loader.num_workers, member, (key, loader.num_workers, base.get_start_method()), self, stream
        )

    def gather(self, context: Context) -> None:
        """Start `context`'s workers, with those of every other EST that comes."""
        waiting = self._gathering.setdefault(context.key, [])
        waiting.append(context)
        try:
            context.member.let_others_run("DataLoader workers")
        except BaseException:
            # The run has failed; no iterator comes to be that would end these workers.
            for process in context.processes:
                process.terminate()
            raise
        if context in self._gathering.get(context.key, ()):
            self._start(sorted(self._gathering.pop(context.key), key=lambda c: c.member.rank))

    @staticmethod
    def _start(contexts: list[Context]) -> None:
        base, workers = contexts[0].base, contexts[0].workers
        for worker in range(workers):
            members = [context.processes[worker] for context in contexts]
            shared = _SharedProcess(base, [member.task for member in members])
            for member in members:
                member.attach(shared)


class _SharedProcess:
    """A worker process and how many ESTs still use it.

    Args:
        base: its `multiprocessing` context.
        tasks: its virtual workers.
    """

    def __init__(self, base: Any, tasks: list[Task]) -> None:
        self.users = len(tasks)
        self.process = base.Process(target=serve, args=(tasks,), daemon=True)
        self.process.start()
        self._parent = os.getpid()

    @property
    def is_child(self) -> bool:
        """Whether this process started it; a copy of an iterator in another worker process must leave it alone."""
        return self._parent == os.getpid()


class VirtualProcess:
    """What a loader iterator takes for one of its worker processes."""

    daemon = True

    def __init__(self, context: Context, target: Callable[..., None], args: tuple[Any, ...]) -> None:
        self._context = context
        arguments = dict(inspect.signature(target).bind(*args).arguments)
        worker = arguments["worker_id"]
        context.link(arguments, worker)
        stream, fork = context.stream, context.base.get_start_method() == "fork"
        resume = stream.resume
        if resume is not None:
            arguments["base_seed"] = resume.base_seed
        stream.base_seed = arguments["base_seed"]
        member = context.member
        self.task = Task(
            rank=member.rank,
            target=target,
            arguments=arguments,
            environment=member.environment,
            context=ESTContext(member.rank, Generators([]), member.environment, on_enter=member.on_enter)
            if fork
            else None,
            generators=resume.generators.get(worker) if resume else None,
            dataset=resume.datasets.get(worker) if resume else None,
        )
        self._shared: _SharedProcess | None = None
        self._left = False

    def attach(self, shared: _SharedProcess) -> None:
        """It lives in this process from now on."""
        self._shared = shared
        del self.task

    def start(self) -> None:
        """Start the EST's workers when this is the last of them."""
        self._context.processes.append(self)
        if len(self._context.processes) == self._context.workers:
            self._context.pools.gather(self._context)

    @property
    def pid(self) -> int | None:
        """Of the process that it shares."""
        return None if self._shared is None else self._shared.process.pid

    def is_alive(self) -> bool:
        """Whether it still runs; the process may live on for other ESTs."""
        if self._shared is None or not self._shared.is_child or (self._left and self._shared.users > 0):
            return False
        alive: bool = self._shared.process.is_alive()
        return alive

    def join(self, timeout: float | None = None) -> None:
        """Leave the process; the last to leave waits for its end."""
        if self._leave():
            assert self._shared is not None
            self._shared.process.join(timeout)

    def terminate(self) -> None:
        """Leave the process; the last to leave ends it."""
        if self._leave():
            assert self._shared is not None
            self._shared.process.terminate()

    def _leave(self) -> bool:
        if self._shared is None or not self._shared.is_child:
            return False
        if not self._left:
            self._left = True
            self._shared.users -= 1
        return self._shared.users == 0


class Context(multiprocessing.context.BaseContext):
    """The `multiprocessing_context` of one loader iterator.

    Args:
        base: the context that the loader would have used.
        workers: how many.
        member: the EST.
        key: the same for all that share a pool.
        pools: starts it.
        stream: is told of every batch.
    """

    def __init__(
        self, base: Any, workers: int, member: Member, key: Hashable, pools: WorkerPools, stream: Stream
    ) -> None:
        self.base = base
        self.workers = workers
        self.member = member
        self.key = key
        self.pools = pools
        self.stream = stream
        self.processes: list[VirtualProcess] = []

    def Queue(self, maxsize: int = 0) -> LinkedQueue:  # type: ignore[override]  # noqa: N802
        """A queue of the base context, watched."""
        return LinkedQueue(self.base.Queue(maxsize), self.stream)

    def Event(self) -> Any:  # noqa: N802
        """An event of the base context."""
        return self.base.Event()

    def Process(self, target: Callable[..., None], args: tuple[Any, ...]) -> VirtualProcess:  # type: ignore[override]  # noqa: N802
        """A virtual worker."""
        return VirtualProcess(self, target, args)

    @staticmethod
    def link(arguments: dict[str, Any], worker: int) -> None:
        """Tell the queues what they are for, and give the worker the real ones."""
        index_queue, data_queue = arguments["index_queue"], arguments["data_queue"]
        index_queue.worker = worker
        arguments.update(index_queue=index_queue.real, data_queue=data_queue.real)


class LinkedQueue:
    """A queue between a loader iterator and its workers that tells the stream what passes.

    Args:
        real: the queue.
        stream: of the iterator.
    """

    def __init__(self, real: Any, stream: Stream) -> None:
        self.real = real
        self.worker: int | None = None
        self._stream = stream

    def put(self, item: Any) -> None:
        """Send an index batch to the worker, or only its number if it is to be skipped."""
        if self.worker is not None and isinstance(item, tuple):
            batch, indices = item
            if self._stream.silent:
                return
            if not self._stream.drawn(batch, self.worker, indices):
                item = Skipped(batch)
        self.real.put(item)

    def get(self, timeout: float | None = None) -> tuple[Any, Any]:
        """The next batch from any worker."""
        batch, data, *sent = self.real.get(timeout=timeout)
        if sent:
            self._stream.received(batch, sent[0])
        return batch, data

    def cancel_join_thread(self) -> None:
        """As the queue's own."""
        self.real.cancel_join_thread()

    def close(self) -> None:
        """As the queue's own."""
        self.real.close()
