"""How long an operation takes: on the device alone, and with what Python spends to launch it.

``wall`` is the time of many calls until the device has finished, per call. ``device`` is the same without launching:
the calls are queued behind a kernel that waits, so that they run back to back once it ends, and events take the time.
Where the host cannot queue even one call before the wait is over (an operation that synchronizes does not let it), that
is said: then ``device`` has waiting in it. On a CPU both are one.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

_MOST = 64  # calls of a sample; the queue of a device takes about a thousand launches
_CYCLES = 2.0e9  # per second, at least as many as a GPU has
_LONGEST_WAIT = 0.5

# fp32 multiply-adds that a multiprocessor does in a cycle, by compute capability, where it is not 128.
_LANES = {(6, 0): 64, (7, 0): 64, (7, 2): 64, (7, 5): 64, (8, 0): 64}


class Stopwatch:
    """Times one operation.

    Args:
        call: the operation.
        gpu: whether it runs on a CUDA device.

    Attributes:
        queued: whether `device` had no launching in it so far.
    """

    def __init__(self, call: Callable[[], Any], gpu: bool) -> None:
        self.call, self.gpu, self.calls = call, gpu, 1
        self.queued = True
        self._host = self._wall = 0.0

    def settle(self, seconds: float) -> None:
        """Warm up, and find how many calls take so long."""
        self.wall()
        once = min(self.wall(), self.wall())
        self.calls = max(1, min(_MOST, int(seconds / max(once, 1e-7))))
        self.wall()

    def wall(self) -> float:
        """Seconds of a call, launching included."""
        self._synchronize()
        start = time.perf_counter()
        for _ in range(self.calls):
            self.call()
        self._host = time.perf_counter() - start
        self._synchronize()
        self._wall = (time.perf_counter() - start) / self.calls
        return self._wall

    def device(self) -> float:
        """Seconds of a call on the device; needs a `wall` before."""
        if not self.gpu:
            return self._wall
        calls, wait = self.calls, min(1.5 * self._host + 1e-3, _LONGEST_WAIT)
        while True:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(int(_CYCLES * wait))
            begin.record()
            for _ in range(calls):
                self.call()
            end.record()
            late = begin.query()
            end.synchronize()
            if late and calls > 1:
                calls //= 2
                continue
            self.queued = self.queued and not late
            return begin.elapsed_time(end) / 1e3 / calls

    def _synchronize(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()


def peak(gpu: bool) -> tuple[float | None, str]:
    """The device's fp32 TFLOP/s without tensor cores, and how that was found; None for CPUs."""
    if not gpu:
        return None, "not known for CPUs"
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    lanes = _LANES.get((properties.major, properties.minor), 128)
    mhz, source = _clock()
    tflops = properties.multi_processor_count * lanes * 2 * mhz * 1e6 / 1e12
    return tflops, f"{properties.multi_processor_count} multiprocessors x {lanes} lanes x 2 x {mhz:.0f} MHz ({source})"


def _clock() -> tuple[float, str]:
    """The highest clock in MHz by ``nvidia-smi``, else the one at which a kernel counts cycles."""
    command = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return float(done.stdout.split()[0]), "highest by nvidia-smi"
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        pass
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = 100_000_000
    torch.cuda._sleep(cycles)  # until the clock has risen
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return cycles / begin.elapsed_time(end) / 1e3, "measured over a kernel that waits"
