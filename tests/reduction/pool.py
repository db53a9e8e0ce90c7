"""Warm pool of reference ranks: real processes, started once, with a real gloo group of each size 1..5.

`Pool.run(n, task, **arguments)` calls the module-level function ``task(group, rank, **arguments)`` in the first n
processes and returns their answers in rank order. Answers and arguments are plain values.
"""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

SIZE = 5
WARM_POOL = "warm-pool"
"""Names processes that outlive a test on purpose (tests/conftest.py)."""


def _rank(rank: int, store: str, pipe: Connection) -> None:
    import warnings

    import torch
    import torch.distributed as dist

    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE, timeout=datetime.timedelta(seconds=60)
    )
    groups = {n: dist.new_group(list(range(n))) for n in range(1, SIZE + 1)}
    pipe.send((True, "ready"))
    while (item := pipe.recv()) is not None:
        n, task, arguments = item
        try:
            answer = (True, task(groups[n], rank, **arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
    dist.destroy_process_group()


class Pool:
    def __init__(self) -> None:
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []

    def run(self, n: int, task: Callable[..., Any], **arguments: Any) -> list[Any]:
        if not self._processes:
            self._start()
        for pipe in self._pipes[:n]:
            pipe.send((n, task, arguments))
        return self._answers(self._pipes[:n])

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        self._stop(20)

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", "tests.reduction.tasks", "tests.reduction.training"])
        for rank in range(SIZE):
            ours, theirs = context.Pipe()
            store = str(Path(self._folder.name) / "store")
            process = context.Process(target=_rank, args=(rank, store, theirs), daemon=True, name=f"{WARM_POOL}-{rank}")
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers(self._pipes)

    def _answers(self, pipes: list[Connection]) -> list[Any]:
        answers, deadline = [], time.monotonic() + 120
        failed = []
        for rank, pipe in enumerate(pipes):
            # Once one rank has failed, the others wait for it in vain.
            if not pipe.poll(2 if failed else max(0.0, deadline - time.monotonic())):
                failed.append(f"rank {rank} does not answer")
                continue
            good, answer = pipe.recv()
            answers.append(answer)
            if not good:
                failed.append(f"rank {rank}: {answer}")
        if failed:
            self._stop(0)
            pytest.fail("\n".join(failed))
        return answers

    def _stop(self, patience: float) -> None:
        for process in self._processes:
            process.join(patience)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._processes:
            self._folder.cleanup()
        self._pipes, self._processes = [], []
