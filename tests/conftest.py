"""Hygiene: whatever a test changes in its process is put back after it, and what it leaves running is an error."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from _pytest.junitxml import xml_key

from lightning_easyscale.emulation import host_cpu

from .report import described

# Daemons that libraries start once per process and keep.
_KEPT_THREADS = ("tqdm", "TMonitor", "asyncio_", "pytest_timeout")
# Processes that a session keeps for many tests.
_KEPT_PROCESSES = ("warm-pool",)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """A JUnit file says when, where and with what it was made."""
    if (xml := config.stash.get(xml_key, None)) is not None:
        xml.add_global_property("run", described())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        marker = item.get_closest_marker("gpu")
        wanted = (marker.args[0] if marker.args else 1) if marker else 0
        if wanted > gpus:
            item.add_marker(pytest.mark.skip(reason=f"needs {wanted} CUDA device(s), this machine has {gpus}"))
        if item.get_closest_marker("emulation") and host_cpu().why_not:
            item.add_marker(pytest.mark.skip(reason=f"device types cannot be emulated: {host_cpu().why_not}"))


@pytest.fixture(scope="module", autouse=True)
def restore_after_module() -> Iterator[None]:
    """What fixtures of a module change is put back after it: variables, directory and settings of torch."""
    with _kept_environment(), _kept_settings():
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The published figures' numbers and traces; absent outside the project's own machines."""
    root = Path(os.environ.get("EASYSCALE_SHARED") or Path(__file__).parents[2] / "shared")
    if not (root / "data").is_dir():
        pytest.skip(f"published data not found under {root} (set EASYSCALE_SHARED)")
    return root / "data"


@pytest.fixture(autouse=True)
def restore_environment() -> Iterator[None]:
    """Variables and the working directory."""
    with _kept_environment():
        yield


@pytest.fixture(autouse=True)
def restore_generators() -> Iterator[None]:
    """The states of the generators of torch, NumPy and Python; the NumPy bit generator itself too."""
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    bit_generator, numpy_state = np.random.get_bit_generator(), np.random.get_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    yield
    random.setstate(python_state)
    torch.set_rng_state(torch_state)
    np.random.set_bit_generator(bit_generator)
    np.random.set_state(numpy_state)
    if cuda_states is not None:
        torch.cuda.set_rng_state_all(cuda_states)


@pytest.fixture(autouse=True)
def restore_torch_settings() -> Iterator[None]:
    """Determinism flags and every other process-wide torch setting that the package or Lightning changes."""
    with _kept_settings():
        yield


@pytest.fixture(autouse=True)
def restore_signal_handlers() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def restore_rank() -> Iterator[None]:
    """Lightning keeps the rank of a process on a function; a launcher or an EST changes it."""
    yield
    lightning = sys.modules.get("lightning.fabric.utilities.rank_zero")
    if lightning is not None:
        lightning.rank_zero_only.rank = 0


@pytest.fixture(autouse=True)
def no_process_group_left() -> Iterator[None]:
    """A process group of a wider fixture stays."""
    there = torch.distributed.is_initialized()
    yield
    if torch.distributed.is_initialized() and not there:
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Fails a test that leaves a thread or a child process behind."""
    threads, children = set(threading.enumerate()), set(multiprocessing.active_children())
    yield

    def orphans() -> list[BaseProcess]:
        alive = [child for child in multiprocessing.active_children() if child not in children]
        return [child for child in alive if not child.name.startswith(_KEPT_PROCESSES)]

    def left() -> list[threading.Thread]:
        alive = [thread for thread in threading.enumerate() if thread not in threads]
        return [thread for thread in alive if not thread.name.startswith(_KEPT_THREADS)]

    _wait_until(lambda: not left() and not orphans(), seconds=5)
    found = orphans()
    for child in found:
        child.terminate()
        child.join()
    assert not found, f"the test left child processes behind: {found}"
    assert not left(), f"the test left threads behind: {left()}"


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


@contextmanager
def _kept_environment() -> Iterator[None]:
    variables, directory = dict(os.environ), os.getcwd()
    yield
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(variables)


@contextmanager
def _kept_settings() -> Iterator[None]:
    cudnn, matmul, memory = torch.backends.cudnn, torch.backends.cuda.matmul, torch.utils.deterministic
    kept: list[tuple[Callable[..., object], tuple[object, ...]]] = [
        (torch.set_default_dtype, (torch.get_default_dtype(),)),
        (torch.set_num_threads, (torch.get_num_threads(),)),
        (torch.set_grad_enabled, (torch.is_grad_enabled(),)),
        (torch.set_float32_matmul_precision, (torch.get_float32_matmul_precision(),)),
        (torch.autograd.set_multithreading_enabled, (torch.autograd.is_multithreading_enabled(),)),
        (setattr, (cudnn, "benchmark", cudnn.benchmark)),
        (setattr, (cudnn, "deterministic", cudnn.deterministic)),
        (setattr, (cudnn, "enabled", cudnn.enabled)),
        (setattr, (memory, "fill_uninitialized_memory", memory.fill_uninitialized_memory)),
    ]
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    tf32 = matmul.allow_tf32, cudnn.allow_tf32
    yield
    for setter, arguments in kept:
        setter(*arguments)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    matmul.allow_tf32, cudnn.allow_tf32 = tf32
