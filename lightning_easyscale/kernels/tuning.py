"""Tile sizes by measuring, where ``EASYSCALE_TUNE=1`` asks for it: whenever products of a new class of shapes come.

Each class costs seconds to a minute once, because every candidate is compiled. The results lie on disk
(`tile_cache.py`), and later runs take them without the variable. Bits are the same with any.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .plans import forget_plans
from .tiles import CANDIDATES, Tiles, forced, pick, power_of_two, shape_class, tile_cache, tiles

VARIABLE = "EASYSCALE_TUNE"
_ROUNDS = 3
_SECONDS = 0.01  # of a round, about
_GAIN = 0.97  # of the built-in choice's time: less than that is noise
_CYCLES = 100_000  # that a device waits for each call to be launched

wanted = os.environ.get(VARIABLE, "0") not in ("", "0")
"""Whether to measure; read where every product is launched."""


@contextmanager
def measuring() -> Iterator[None]:
    """Measure for the time of a ``with`` block."""
    global wanted
    before, wanted = wanted, True
    try:
        yield
    finally:
        wanted = before


def tune(launch: tuple[str, int, int, int], run: Callable[[], object], *, batch: int = 1, taps: int = 1) -> None:
    """Find the fastest tiles for a class of launches unless they are known, by `run`, which launches one.

    Args:
        launch: kind, rows, columns and length of its sums, as for `tiles.pick`.
        run: launches it with the tiles that are in force; may write only what is made anew afterwards.
        batch: as for `tiles.pick`.
        taps: likewise.
    """
    if forced() or torch.cuda.is_current_stream_capturing():
        return
    shapes, cache = shape_class(*launch, batch=batch, taps=taps), tile_cache()
    if cache.get(shapes) is not None:
        return
    first = pick(*launch, batch=batch, taps=taps)
    found = fastest(candidates(first, launch[1], launch[2]), lambda choice: _seconds(choice, run))
    cache.put(shapes, tuple(found))
    forget_plans()


def candidates(first: Tiles, m: int, n: int) -> list[Tiles]:
    """The tiles to try for a result of m rows and n columns: the built-in choice, and those that are not too large."""
    rows, columns = (max(32, power_of_two(size)) for size in (m, n))
    return [first, *(t for t in CANDIDATES if t != first and t.m <= rows and t.n <= columns)]


def fastest(choices: list[Tiles], seconds: Callable[[Tiles], float]) -> Tiles:
    """The one that takes the least time, or the first where that gains little; those that do not fit are left out."""
    times = {}
    for choice in choices:
        try:
            times[choice] = seconds(choice)
        except Exception as error:
            if not _too_large(error):
                raise
    best = min(times, key=lambda choice: times[choice], default=choices[0])
    return best if choices[0] not in times or times[best] < _GAIN * times[choices[0]] else choices[0]


def _too_large(error: Exception) -> bool:
    """Whether tiles need more registers or shared memory than the device has."""
    return type(error).__name__ == "OutOfResources"


def _seconds(choice: Tiles, run: Callable[[], object]) -> float:
    """The shortest time of `run` on the device."""
    with tiles(choice):
        run()
        once = _elapsed(run, 2)
        calls = max(1, min(200, int(_SECONDS / once)))
        return min(_elapsed(run, calls) for _ in range(_ROUNDS))


def _elapsed(run: Callable[[], object], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(calls * _CYCLES)  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return max(1e-7, start.elapsed_time(end) / 1e3 / calls)
