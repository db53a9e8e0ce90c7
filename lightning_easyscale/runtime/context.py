"""What an EST takes with it when the baton passes.

Process-wide state that belongs to a rank: generator states, the rank's environment variables, the default dtype and the
attention switches, and whatever the host framework registers (Lightning's ``rank_zero_only.rank``). Thread-local state
is set once per EST thread to what the launching thread had.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from ..rng import Generators

Swap = Callable[[int], None]


class ESTContext:
    """Process-wide state of one EST.

    Args:
        rank: the EST's rank in the virtual world.
        generators: this EST's random number generators.
        environment: environment variables that name the rank (``RANK``, ``WORLD_SIZE``, ...).
        on_enter: called with the rank whenever the EST takes the baton.
        alone: the executor hosts this EST only, so that nothing has to be swapped.
    """

    def __init__(
        self,
        rank: int,
        generators: Generators,
        environment: Mapping[str, str],
        *,
        on_enter: Swap,
        alone: bool = False,
    ) -> None:
        self.rank = rank
        self.generators = generators
        self.environment = dict(environment)
        self.on_enter = on_enter
        self._alone = alone
        self._entered = False
        self._dtype = torch.get_default_dtype()
        self._attention = _attention_switches()
        self.prepare()

    def prepare(self) -> None:
        """Remember the launching thread's thread-local settings."""
        self._thread_settings = _ThreadSettings()

    def enter(self) -> None:
        """Put this EST's state in force."""
        if self._alone and self._entered:
            return
        self._entered = True
        for name, value in self.environment.items():
            os.environ[name] = value
        self.generators.install()
        if torch.get_default_dtype() is not self._dtype:
            torch.set_default_dtype(self._dtype)
        if _attention_switches() != self._attention:
            _set_attention_switches(self._attention)
        self.on_enter(self.rank)

    def leave(self) -> None:
        """Remember this EST's state."""
        self.generators.capture()
        self._dtype = torch.get_default_dtype()
        self._attention = _attention_switches()
        self._entered = False

    @contextmanager
    def thread(self) -> Iterator[None]:
        """Settings of the EST's thread: as on the launching thread, backward in the calling thread."""
        with self._thread_settings.apply(), torch.autograd.set_multithreading_enabled(False):
            yield


class _ThreadSettings:
    """Thread-local torch settings of the thread that creates the object."""

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self.grad = torch.is_grad_enabled()
        self.autocast = {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")}
        self.autocast_cache = torch.is_autocast_cache_enabled()
        self.device = torch.get_default_device()

    @contextmanager
    def apply(self) -> Iterator[None]:
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        if torch.get_default_device() != self.device:
            torch.set_default_device(self.device)
        for device, (enabled, dtype) in self.autocast.items():
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        with torch.set_grad_enabled(self.grad):
            yield


def _attention_switches() -> tuple[bool, bool, bool]:
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()


def _set_attention_switches(switches: tuple[bool, bool, bool]) -> None:
    flash, efficient, math = switches
    torch.backends.cuda.enable_flash_sdp(flash)
    torch.backends.cuda.enable_mem_efficient_sdp(efficient)
    torch.backends.cuda.enable_math_sdp(math)
