"""A worker process that stands for one loader worker of every EST of its executor.

Each of them, a *virtual worker*, runs PyTorch's own worker loop, unmodified, in a thread of its own, with its own
dataset copy and generators; one runs at a time. It gives up the process only where that loop waits for its next index
batch. Invariant: between two such waits the process's generators, `get_worker_info`, rank variables and virtual world
are those that the worker process of a stock DDP rank would have.

With every batch goes the state of the virtual worker's generators after the batch was made (what has changed of it), so
that the main process knows the state that belongs to any batch, however many were prefetched.
"""

from __future__ import annotations

import collections
import queue
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Any

import torch
from torch.utils.data import IterableDataset
from torch.utils.data._utils import MP_STATUS_CHECK_INTERVAL
from torch.utils.data._utils import worker as torch_worker

from ..elastic.workers import shield
from ..rng import Generators, Parts
from ..runtime.context import ESTContext
from .owned import load_states, owned_generators, states_of


@dataclass
class Sent:
    """What a virtual worker sends beside a batch.

    Args:
        worker: its worker id.
        parts: its generators' states; None in place of one that has not changed since it was sent last.
        owned: states of the generators that its dataset and its `collate_fn` hold; None if they have not changed.
        dataset: the state of an iterable dataset that has `state_dict`.
    """

    worker: int
    parts: Parts
    owned: list[Any] | None = None
    dataset: Any = None


@dataclass(frozen=True)
class Skipped:
    """In place of an index batch whose data was trained on before: its worker answers with nothing.

    The worker itself answers, so that answers to earlier index batches come before what it says of later ones:
    PyTorch's iterator gives up what a worker owes once the worker says that an iterable dataset has come to its end.

    Args:
        batch: its number.
    """

    batch: int


@dataclass
class Task:
    """One virtual worker, as the main process describes it.

    Args:
        rank: its EST.
        target: the loader's worker loop.
        arguments: of the loop, by name and in order; queues are those of `multiprocessing`.
        environment: variables that name the rank.
        context: the EST's settings where the process is forked; None: those of a new process.
        generators: states to continue from, once the loop has seeded and initialised the worker: of the process's
            generators and, as ``"owned"``, of those that the dataset holds.
        dataset: state of an iterable dataset to continue from.
    """

    rank: int
    target: Callable[..., None]
    arguments: dict[str, Any]
    environment: Mapping[str, str]
    context: ESTContext | None
    generators: dict[str, Any] | None = None
    dataset: Any = None
    inference: bool = field(default_factory=torch.is_inference_mode_enabled)


def serve(tasks: Sequence[Task]) -> None:
    """Body of a worker process: run virtual workers until all have ended.

    A stop signal to the whole job does not end it: the last batches are still to be drawn.
    """
    # Before any thread starts, so that it holds for all of them.
    shield()
    Host(tasks).run()


class Host:
    """The main thread of a worker process: reads index batches and decides which virtual worker runs next."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.back = threading.Semaphore(0)
        self.errand: Callable[[], Any] | None = None
        self._workers = [VirtualWorker(self, task) for task in tasks]
        self._running: VirtualWorker | None = None

    def run(self) -> None:
        """Serve until every virtual worker has been told to end; what ends one by an error ends the process."""
        _let_threads_set_signal_handlers(self)
        try:
            while live := [worker for worker in self._workers if not worker.ended]:
                self._receive(live)
                ready = [worker for worker in live if not worker.started or worker.messages]
                if ready:
                    # The batch that an EST will ask for first comes first.
                    self._let_run(min(ready, key=lambda worker: (worker.served, worker.rank)))
        except KeyboardInterrupt:
            # The main process gets one too and ends the workers.
            return

    def _receive(self, live: list[VirtualWorker]) -> None:
        idle = all(worker.started and not worker.messages for worker in live)
        by_reader = {worker.inbox._reader: worker for worker in live}
        readable = connection.wait(list(by_reader), MP_STATUS_CHECK_INTERVAL if idle else 0)
        for reader in readable:
            worker = by_reader[reader]
            worker.messages.append(worker.inbox.get())
        if idle and not readable:
            for worker in live:
                # As if its own wait had timed out: the loop looks whether the main process lives.
                worker.messages.append(queue.Empty())

    def _let_run(self, worker: VirtualWorker) -> None:
        if self._running is not worker:
            if self._running is not None and not self._running.ended:
                self._running.leave()
            worker.enter()
            self._running = worker
        worker.proceed()
        self.back.acquire()
        while self.errand is not None:
            self.errand()
            self.errand = None
            worker.proceed()
            self.back.acquire()
        if worker.error is not None:
            raise worker.error


class VirtualWorker:
    """A loader worker of one EST, in a thread.

    Args:
        host: runs it.
        task: what it is.
    """

    def __init__(self, host: Host, task: Task) -> None:
        self.rank = task.rank
        self.inbox, self.outbox = task.arguments["index_queue"], task.arguments["data_queue"]
        self.messages: collections.deque[Any] = collections.deque()
        self.served = 0
        self.started = self.ended = False
        self.error: BaseException | None = None
        self._host = host
        self._task = task
        self._gate = threading.Semaphore(0)
        self._info: Any = None
        self._sent: Parts = (None, None, None)
        self._sent_owned = ""
        self.context = task.context or ESTContext(task.rank, Generators([]), task.environment, on_enter=_nothing)

    def enter(self) -> None:
        """Put its state in force."""
        self.context.enter()
        torch_worker._worker_info = self._info

    def leave(self) -> None:
        """Remember its state."""
        self.context.leave()
        self._info = torch_worker._worker_info

    def proceed(self) -> None:
        """Let its thread run until it waits for an index batch or ends."""
        if self.started:
            self._gate.release()
        else:
            self.started = True
            threading.Thread(target=self._run, name=f"EST {self.rank}", daemon=True).start()

    def wait(self) -> None:
        """Called in its thread: let the host go on, until it says to proceed."""
        self._host.back.release()
        self._gate.acquire()

    def _run(self) -> None:
        arguments = dict(self._task.arguments)
        outbox = Outbox(self, arguments["data_queue"], arguments["worker_id"])
        arguments.update(index_queue=Inbox(self), data_queue=outbox, init_fn=self._initialise)
        try:
            with self.context.thread(), torch.inference_mode(self._task.inference):
                self._task.target(*arguments.values())
        except BaseException as error:  # noqa: BLE001 - ends the process, as it would end a worker of its own
            self.error = error
        self.ended = True
        self._host.back.release()

    def _initialise(self, worker_id: int) -> None:
        init_fn = self._task.arguments["init_fn"]
        if init_fn is not None:
            init_fn(worker_id)
        if self._task.dataset is not None:
            torch_worker._worker_info.dataset.load_state_dict(self._task.dataset)  # type: ignore[union-attr]

    def begin(self) -> None:
        """The loop is about to wait for the first time: the worker is initialised."""
        if self._task.generators is not None:
            self.context.generators.load_state_dict(self._task.generators)
            self.context.generators.install()
            load_states(self._owned(), self._task.generators["owned"])
            self._task.generators = None

    def sent(self, worker_id: int) -> Sent:
        """The state that goes with what was made just now."""
        generators = self.context.generators
        generators.capture()
        parts = generators.parts()
        changed = tuple(None if _equal(new, old) else new for new, old in zip(parts, self._sent, strict=True))
        self._sent = parts
        owned = states_of(self._owned())
        new = None if repr(owned) == self._sent_owned else owned
        self._sent_owned = repr(owned)
        dataset: Any = self._dataset()
        stateful = self._task.target is torch_worker._worker_loop and is_stateful(dataset)
        return Sent(worker_id, changed, new, dataset.state_dict() if stateful else None)  # type: ignore[arg-type]

    def _dataset(self) -> Any:
        info = torch_worker._worker_info
        return None if info is None else info.dataset

    def _owned(self) -> list[Any]:
        return owned_generators([self._dataset(), self._task.arguments["collate_fn"]])


class Inbox:
    """What a virtual worker's loop takes for its index queue."""

    def __init__(self, worker: VirtualWorker) -> None:
        self._worker = worker
        self._begun = False

    def get(self, timeout: float | None = None) -> Any:
        """The next message that the loop is to see; other virtual workers run until there is one."""
        if not self._begun:
            self._begun = True
            self._worker.begin()
        self._worker.wait()
        while isinstance(message := self._worker.messages.popleft(), Skipped):
            self._worker.outbox.put((message.batch, None))
            self._worker.wait()
        if isinstance(message, queue.Empty):
            raise message
        return message


class Outbox:
    """What a virtual worker's loop takes for its data queue."""

    def __init__(self, worker: VirtualWorker, real: Any, worker_id: int) -> None:
        self._worker = worker
        self._real = real
        self._worker_id = worker_id

    def put(self, item: tuple[Any, Any]) -> None:
        """Send a batch or an answer, with the state of the generators."""
        self._real.put((*item, self._worker.sent(self._worker_id)))
        self._worker.served += 1

    def cancel_join_thread(self) -> None:
        """Nobody will read what is still on its way."""
        self._real.cancel_join_thread()

    def close(self) -> None:
        """No more from this process."""
        self._real.close()


def is_stateful(dataset: object) -> bool:
    """Whether an iterable dataset can be continued from a state of its own."""
    own = (callable(getattr(dataset, name, None)) for name in ("state_dict", "load_state_dict"))
    return isinstance(dataset, IterableDataset) and all(own)


def _let_threads_set_signal_handlers(host: Host) -> None:
    """A `worker_init_fn` may call `signal.signal`, which Python allows on the main thread only."""
    original, main = signal.signal, threading.main_thread()

    def set_handler(number: Any, handler: Any) -> Any:
        worker = host._running
        if threading.current_thread() is main or worker is None:
            return original(number, handler)
        answers: list[Any] = []

        def errand() -> None:
            try:
                answers.append((original(number, handler), None))
            except Exception as error:
                answers.append((None, error))

        host.errand = errand
        worker.wait()
        ((previous, error),) = answers
        if error is not None:
            raise error
        return previous

    signal.signal = set_handler  # type: ignore[assignment]


def _equal(new: Any, old: Any) -> bool:
    return old is not None and new == old


def _nothing(rank: int) -> None:
    """A new process knows nothing of the virtual world, as a stock DDP rank's would not of the real one."""
