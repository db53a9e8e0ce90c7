"""What a hand-over of the baton costs by itself: ESTs that do nothing but meet, and bare threads in comparison."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

import torch

from lightning_easyscale.rng import Generators
from lightning_easyscale.runtime.context import ESTContext
from lightning_easyscale.runtime.executor import Executor
from lightning_easyscale.runtime.peers import Peers


def time_switches(*, ests: int, device: torch.device, blocks: int, rounds: int) -> list[float]:
    """Seconds per switch, generator states and all, of each block of `rounds` meetings of `ests` ESTs."""
    devices = [device] if device.type == "cuda" else []
    contexts = {
        rank: ESTContext(rank, Generators(devices), {"RANK": str(rank)}, on_enter=lambda rank: None)
        for rank in range(ests)
    }
    executor = Executor(contexts, Peers(0, 1), timeout=600.0)
    seconds: list[float] = []

    def body(rank: int) -> None:
        for block in range(-1, blocks):
            began, switches = time.perf_counter(), executor.switches
            for meeting in range(rounds):
                executor.meet(rank, (block, meeting), "nothing", None, dict.fromkeys)
            if rank == 0 and block >= 0:
                seconds.append((time.perf_counter() - began) / (executor.switches - switches))

    functions: dict[int, Callable[[], None]] = {rank: partial(body, rank) for rank in range(ests)}
    executor.run(functions)
    return seconds


def time_threads(*, threads: int, blocks: int, rounds: int) -> list[float]:
    """Seconds per hand-over among bare threads that wake each other in turn, of each block of `rounds` turns of all."""
    gates = [threading.Lock() for _ in range(threads)]
    for gate in gates:
        gate.acquire()
    seconds: list[float] = []

    def body(number: int) -> None:
        for block in range(-1, blocks):
            began = time.perf_counter()
            for _ in range(rounds):
                gates[number].acquire()
                gates[(number + 1) % threads].release()
            if number == 0 and block >= 0:
                seconds.append((time.perf_counter() - began) / (rounds * threads))

    others = [threading.Thread(target=body, args=(number,)) for number in range(threads)]
    for thread in others:
        thread.start()
    gates[0].release()
    for thread in others:
        thread.join()
    return seconds
