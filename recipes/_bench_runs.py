"""Run the sides of a comparison in turns, A B A B, each in processes that stay between its blocks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_easyscale.determinism import CUBLAS_VARIABLE

from ._bench_worker import Side
from ._runs import RunFailedError, _tail
from ._warm import WarmProcesses, WarmRun

_POLL_S = 0.002
_LOOK_S = 0.2
_MODULES = (
    f"{__package__}._bench_worker",
    f"{__package__}._bench_models",
    *(f"{__package__}.workloads.{task}" for task in ("classification", "detection", "recommendation")),
    f"{__package__}.workloads.question_answering",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("bert", "electra", "swin")),
)


class SideFailedError(RunFailedError):
    """A side that ended badly.

    Args:
        side: its name.
        message: the end of its log.
        out_of_memory: whether a process of it had no device memory left.
        warmed_up: whether all sides had been ready before.
    """

    def __init__(self, side: str, message: str, *, out_of_memory: bool, warmed_up: bool) -> None:
        super().__init__(message)
        self.side, self.out_of_memory, self.warmed_up = side, out_of_memory, warmed_up


def bench_processes() -> WarmProcesses:
    """What the processes of sides are forked from; every side sets its own number of threads."""
    return WarmProcesses({**os.environ, CUBLAS_VARIABLE: ":4096:8"}, modules=_MODULES)


def interleave(
    sides: Mapping[str, Side], warm: WarmProcesses, *, timeout_s: float, device_memory: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """What every side reported: first of its memory after the warm-up, then of its blocks, in order.

    All sides warm up at the same time; then only one computes at a time, while the others wait without using a core.

    Args:
        sides: by name, in the order of their turns.
        warm: starts their processes.
        timeout_s: seconds after which all is given up.
        device_memory: the sides warm up one after the other, and the first entry has what each holds of the current
            CUDA device, as the device says; on a CPU, what its processes hold. They are told by `Side.releases`.

    Raises:
        SideFailedError: if a side fails or takes too long.
    """
    turns = _Turns(sides, time.monotonic() + timeout_s)
    try:
        if device_memory:
            ready = {name: turns.warm_up_alone(name, warm) for name in sides}
        else:
            for name in sides:
                turns.start(name, warm)
            ready = {name: turns.ready(name) for name in sides}
        turns.warmed_up = True
        for block in range(next(iter(sides.values())).blocks):
            for name in sides:
                turns.run(name, block)
        for name, side in sides.items():
            # What follows the last block is not measured, so all may end at once.
            turns.allow(name, side.blocks)
        for name in sides:
            turns.wait_for_end(name)
    finally:
        turns.end()
    return {name: [ready[name], *turns.reports(name)] for name in sides}


class _Turns:
    """The sides that are under way.

    Args:
        sides: by name.
        deadline: on the monotonic clock.
    """

    def __init__(self, sides: Mapping[str, Side], deadline: float) -> None:
        self.sides, self.deadline, self.warmed_up = sides, deadline, False
        self._folders = {name: Path(side.directory) for name, side in sides.items()}
        self._runs: dict[str, WarmRun] = {}

    def start(self, name: str, warm: WarmProcesses) -> None:
        """Start a side's processes."""
        side = self.sides[name]
        file = side.write()
        for left in ("go", "done", "ready.*", "idle.*"):
            for old in file.parent.glob(left):
                old.unlink()
        self._runs[name] = warm.launch(
            name, f"{__package__}._bench_worker:run_file", file, file.with_name("log"), side.ranks()
        )

    def ready(self, name: str) -> dict[str, Any]:
        """Wait for a side's warm-up; what its processes have used by then, added up."""
        self._wait(name, lambda: self._said(name, "ready"))
        facts = [json.loads(file.read_text()) for file in self._folders[name].glob("ready.*")]
        return {key: sum(fact[key] for fact in facts) for key in facts[0]}

    def warm_up_alone(self, name: str, warm: WarmProcesses) -> dict[str, Any]:
        """Start a side, wait for its warm-up and let it free what it has cached; what it had used before."""
        on_gpu = self.sides[name].accelerator == "gpu"
        before = _device_memory() if on_gpu else 0
        self.start(name, warm)
        facts = self.ready(name)
        facts["device"] = _device_memory() - before if on_gpu else facts["peak_rss"]
        self.allow(name, -1)
        self._wait(name, lambda: self._said(name, "idle"))
        return facts

    def allow(self, name: str, block: int) -> None:
        """Let a side go on up to the end of `block`."""
        temporary = self._folders[name] / "go.tmp"
        temporary.write_text(str(block))
        temporary.replace(self._folders[name] / "go")

    def run(self, name: str, block: int) -> None:
        """Let a side run a block."""
        self.allow(name, block)
        done = self._folders[name] / "done"
        self._wait(name, lambda: done.exists() and done.read_text().count("\n") > block)

    def wait_for_end(self, name: str) -> None:
        """Wait until a side has ended well."""
        self._wait(name, lambda: self._ended(name))

    def reports(self, name: str) -> list[dict[str, Any]]:
        """What it said of its blocks."""
        return [json.loads(line) for line in (self._folders[name] / "done").read_text().splitlines()]

    def end(self) -> None:
        """End what is left; the device's memory is free only when the processes are gone."""
        for run in self._runs.values():
            run.kill()
        for run in self._runs.values():
            run.wait_until_gone()

    def _said(self, name: str, what: str) -> bool:
        return len(list(self._folders[name].glob(f"{what}.*"))) == len(self._runs[name].pids)

    def _ended(self, name: str) -> bool:
        """Whether a side has ended well."""
        run = self._runs[name]
        try:
            return run.poll()
        except RunFailedError as error:
            logs = [Path(f"{run.log}.{i}").read_text(errors="replace") for i in range(len(run.pids))]
            out = any(words in log for log in logs for words in ("OutOfMemoryError", "out of memory", "ALLOC_FAILED"))
            raise SideFailedError(name, str(error), out_of_memory=out, warmed_up=self.warmed_up) from error

    def _wait(self, name: str, done: Callable[[], bool]) -> None:
        looked = time.monotonic()
        while not done():
            now = time.monotonic()
            if now - looked > _LOOK_S:
                looked = now
                if self._ended(name) and not done():
                    self._fail(name, "ended too early")
            if now > self.deadline:
                self._fail(name, "took too long")
            time.sleep(_POLL_S)

    def _fail(self, name: str, what: str) -> None:
        log = _tail(Path(f"{self._runs[name].log}.0"))
        raise SideFailedError(name, f"{name} {what}:\n{log}", out_of_memory=False, warmed_up=self.warmed_up)


def _device_memory() -> int:
    """Bytes of the current CUDA device that are in use, whoever uses them."""
    free, total = torch.cuda.mem_get_info()
    return int(total - free)
