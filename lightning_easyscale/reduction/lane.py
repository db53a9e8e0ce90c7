"""The lane: where an executor's gradient communication runs, beside the backward pass.

A reduction is a chain of collectives with additions between them, so something must drive it while backward goes on:

* a group that works on streams (NCCL): every step is enqueued at once on a stream of the lane's own; the host never
  waits;
* a group that works on the host (gloo, also for CUDA tensors): one thread runs the jobs first in, first out.

Invariants: the jobs of one lane run in the order of `submit`, one at a time, on every executor; a lane only calls
methods of the group object it was given, so it does not matter which world `torch.distributed` shows to the caller.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from .wire import backend_name

Job = Callable[[], Tensor]


class Pending(Protocol):
    """A reduction under way."""

    def wait(self) -> Tensor:
        """The reduced flat tensor; on CUDA the current stream is made to wait for it. Raises what the reduction did."""

    def future(self) -> Future[Tensor]:
        """The same as a future, for DDP communication hooks."""


class Submitted:
    """A job handed to a lane."""

    def __init__(self, device: torch.device) -> None:
        self._future: Future[Tensor] = Future(devices=[device] if device.type == "cuda" else None)

    def wait(self) -> Tensor:
        """See `Pending.wait`."""
        return self._future.wait()

    def future(self) -> Future[Tensor]:
        """See `Pending.future`."""
        return self._future

    def run(self, job: Job) -> None:
        """Run `job` on the current stream and settle the future with what it returns or raises."""
        try:
            result = job()
        except Exception as error:
            self._future.set_exception(error)  # type: ignore[arg-type]
        else:
            self._future.set_result(result)


class Settled:
    """A result that is there already, ordered on the current stream."""

    def __init__(self, flat: Tensor) -> None:
        self._flat = flat

    def wait(self) -> Tensor:
        """See `Pending.wait`."""
        return self._flat

    def future(self) -> Future[Tensor]:
        """See `Pending.future`."""
        future: Future[Tensor] = Future(devices=[self._flat.device] if self._flat.is_cuda else None)
        future.set_result(self._flat)
        return future


class Running:
    """A collective that the backend itself already runs, in place on `flat`."""

    def __init__(self, work: dist.Work, flat: Tensor) -> None:
        self._work = work
        self._flat = flat

    def wait(self) -> Tensor:
        """See `Pending.wait`."""
        self._work.wait()
        return self._flat

    def future(self) -> Future[Tensor]:
        """See `Pending.future`."""
        return self._work.get_future().then(lambda done: done.value()[0])


class Lane:
    """Runs communication jobs in order, off the caller's stream or thread.

    Args:
        group: the physical process group, or None when there is only one executor: jobs then run at once, in place.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def submit(self, job: Job, inputs: Sequence[Tensor]) -> Pending:
        """Start `job`, whose inputs are ready on the current stream of their device.

        Args:
            job: communicates and returns the flat result.
            inputs: what it reads, the last one on the device of the result; untouched by the caller until `wait`, but
                nobody needs to hold them.
        """
        device = inputs[-1].device
        if self._group is None:
            return Settled(job())
        pending = Submitted(device)
        if device.type != "cuda":
            self._enqueue(lambda: pending.run(job))
        else:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(device))
            if backend_name(self._group, device) == "gloo":
                self._enqueue(lambda: self._on_stream(pending, job, inputs, ready))
            else:
                self._on_stream(pending, job, inputs, ready)
        return pending

    def close(self) -> None:
        """End the thread after the jobs already submitted; the lane can be used again afterwards."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            thread.join()

    def _on_stream(self, pending: Submitted, job: Job, inputs: Sequence[Tensor], ready: torch.cuda.Event) -> None:
        device = inputs[-1].device
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            ready.wait(stream)
            # Else the allocator gives the memory of an input that nobody holds any more to the stream it came from.
            for tensor in inputs:
                if tensor.is_cuda:
                    tensor.record_stream(stream)
            pending.run(job)

    def _enqueue(self, run: Callable[[], None]) -> None:
        if self._thread is None:
            # The thread holds the queue, not the lane: a lane that is dropped without `close` does not stay alive.
            self._thread = threading.Thread(target=_work, args=(self._jobs,), name="easyscale-reduction", daemon=True)
            self._thread.start()
        self._jobs.put(run)

    def __del__(self) -> None:
        self._jobs.put(None)


def _work(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    # The additions run beside the backward pass: one core for them, the others are busy.
    torch.set_num_threads(1)
    while (run := jobs.get()) is not None:
        run()
        del run
