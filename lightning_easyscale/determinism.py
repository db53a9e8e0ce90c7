"""Determinism levels, and the one place where they set flags.

A level says which changes of hardware leave the bits alone (Section 1 of the design): D0 none, D1 the placement on one
type of device, D2 also the type of device, within the job's declared pool. All levels need the same flags, because run
after run must already agree under D0; what sets the levels apart is the order of reduction and, for D2, the kernels.

Every flag set here is in the record that `apply` returns, and `restore` takes it back. Threads count as a flag: the
number of threads per EST changes CPU bits, so it is a property of the job, never of the placement.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

FORMAT_VERSION = 1
"""Version of the arithmetic this package fixes: a change that alters bits raises it."""

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_DETERMINISTIC = (":4096:8", ":16:8")


@dataclass(frozen=True)
class Level:
    """A determinism level.

    Args:
        placement_independent: the same bits for every placement on one device type (D1).
        heterogeneous: the same bits on every device type of the pool (D2).
    """

    placement_independent: bool
    heterogeneous: bool

    @classmethod
    def parse(cls, value: str | Level) -> Level:
        """The level of a name: "D0", "D1", "D0+D2" or "D1+D2" in any case; "D2" means "D1+D2".

        Raises:
            ValueError: for any other name.
        """
        if isinstance(value, Level):
            return value
        parts = [part.strip().upper() for part in value.split("+")] if isinstance(value, str) else []
        if parts not in (["D0"], ["D1"], ["D2"], ["D0", "D2"], ["D1", "D2"]):
            raise ValueError(
                f"`determinism={value!r}` is no determinism level. HINT: use one of 'D0', 'D1', 'D0+D2', 'D1+D2'."
            )
        return cls(placement_independent="D0" not in parts, heterogeneous="D2" in parts)

    def __str__(self) -> str:
        """The canonical name."""
        return ("D1" if self.placement_independent else "D0") + ("+D2" if self.heterogeneous else "")


def check_conflicts(*, benchmark: bool | None, deterministic: bool | str | None) -> None:
    """Refuse the Trainer flags that contradict every determinism level.

    Args:
        benchmark: the Trainer's `benchmark`.
        deterministic: the Trainer's `deterministic`.

    Raises:
        ValueError: for `benchmark=True`, `deterministic=False` and `deterministic="warn"`.
    """
    if benchmark:
        raise ValueError(
            "`benchmark=True` lets cuDNN choose kernels by their speed, which changes bits from run to run."
            " HINT: leave `benchmark` unset."
        )
    if deterministic == "warn":
        raise ValueError(
            '`deterministic="warn"` lets non-deterministic operations run with a warning, so no level could be kept.'
            " HINT: leave `deterministic` unset or set `deterministic=True`."
        )
    if deterministic is False:
        raise ValueError(
            "`deterministic=False` contradicts every determinism level."
            " HINT: leave `deterministic` unset or set `deterministic=True`."
        )


def default_threads(num_ests: int, cpu_count: int | None = None) -> int:
    """Threads per EST: `max(1, cpu_count // num_ests)`.

    The CPUs are counted as stock Lightning's launcher does (those the process may run on), and with as many devices as
    ESTs the result is the one that launcher picks. Two things differ on purpose: N is the number of ESTs, not of
    processes on this host, so that the result does not change with the placement; and `OMP_NUM_THREADS`, which keeps
    the stock launcher from setting anything, has no say here, because `apply` sets the recorded number explicitly.

    Raises:
        ValueError: if `num_ests` is not positive.
    """
    if num_ests < 1:
        raise ValueError(f"`num_ests={num_ests}` is no number of workers. HINT: use at least 1.")
    if cpu_count is None:
        cpu_count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpu_count // num_ests)


def apply(level: Level, *, threads: int, device_type: str, policy: str = "pinned") -> dict[str, Any]:
    """Set the flags of a level in this process.

    Args:
        level: the level of the job.
        threads: threads per EST.
        device_type: "cpu" or "cuda".
        policy: how D2 is kept (`devices.d2_policy`); its kernels are put in force by `kernels.portable`.

    Returns:
        The level and all flags as they are now, and under "previous" as they were; plain values.

    Raises:
        ValueError: if `threads` is not positive, or the environment has a cuBLAS workspace that is not deterministic.
        ValueError: for D2 with pinned instruction sets on CUDA.
    """
    if threads < 1:
        raise ValueError(f"`threads_per_est={threads}` is no number of threads. HINT: use at least 1.")
    if level.heterogeneous and device_type == "cuda" and policy != "portable":
        raise ValueError(
            f"`determinism={str(level)!r}` with the policy {policy!r} cannot run on CUDA devices, whose stock kernels"
            " give other bits on other types. HINT: name the CUDA device's type in `pool`, which selects 'portable'."
        )
    previous = _flags()
    wanted: dict[str, Any] = {
        **previous,
        "deterministic_algorithms": True,
        "deterministic_warn_only": False,
        # It would fill every new tensor before a kernel fills it again: a third of all launches on a GPU.
        "fill_uninitialized_memory": False,
        "cudnn_deterministic": True,
        "cudnn_benchmark": False,
        "threads": threads,
    }
    if device_type == "cuda":
        wanted[CUBLAS_VARIABLE] = previous[CUBLAS_VARIABLE] or _CUBLAS_DETERMINISTIC[0]
        if wanted[CUBLAS_VARIABLE] not in _CUBLAS_DETERMINISTIC:
            raise ValueError(
                f"`{CUBLAS_VARIABLE}={wanted[CUBLAS_VARIABLE]}` in the environment makes cuBLAS non-deterministic."
                f" HINT: unset it, or set it to one of {', '.join(_CUBLAS_DETERMINISTIC)}."
            )
    _set_flags(wanted)
    return {"level": str(level), **_flags(), "previous": previous}


def restore(record: Mapping[str, Any]) -> None:
    """Put the flags back to what they were before the `apply` that returned `record`."""
    _set_flags(record["previous"])


def audit(model: Any, batch: Any) -> dict[str, tuple[int, str]]:
    """Which operations a model calls in one forward and backward pass, and how D2's `portable` policy computes each.

    The pass is made twice: before a dispatch mode, which sees every operation, and as in a run (`kernels.audit`).

    Args:
        model: called with the batch: with its items if it is a tuple or list. The gradient of the sum of all
            floating-point results is taken; gradients of parameters are put back. Buffers change as in training.
        batch: input of the model.

    Returns:
        For each operation (``aten::mm``) the number of calls and ``"exact"`` (torch's kernel, at most one rounding per
        element), ``"format"`` (a kernel of the format) or ``""`` (refused, unless it is allowed by name).
    """
    from . import kernels

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        results = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
        floating = [r for r in tree_leaves(results) if isinstance(r, torch.Tensor) and r.requires_grad]
        if floating:
            torch.stack([r.sum() for r in floating]).sum().backward()

    parameters = list(model.parameters()) if isinstance(model, torch.nn.Module) else []
    gradients = [p.grad for p in parameters]
    try:
        return kernels.audit(step)
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


@contextmanager
def applied(level: Level, *, threads: int, device_type: str) -> Iterator[dict[str, Any]]:
    """`apply` for the time of a `with` block."""
    record = apply(level, threads=threads, device_type=device_type)
    try:
        yield record
    finally:
        restore(record)


def _flags() -> dict[str, Any]:
    return {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "deterministic_warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill_uninitialized_memory": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        CUBLAS_VARIABLE: os.environ.get(CUBLAS_VARIABLE),
        "threads": torch.get_num_threads(),
    }


def _set_flags(flags: Mapping[str, Any]) -> None:
    torch.use_deterministic_algorithms(flags["deterministic_algorithms"], warn_only=flags["deterministic_warn_only"])
    memory: Any = torch.utils.deterministic  # type: ignore[attr-defined]
    memory.fill_uninitialized_memory = flags["fill_uninitialized_memory"]
    torch.backends.cudnn.deterministic = flags["cudnn_deterministic"]
    torch.backends.cudnn.benchmark = flags["cudnn_benchmark"]
    if flags[CUBLAS_VARIABLE] is None:
        os.environ.pop(CUBLAS_VARIABLE, None)
    else:
        os.environ[CUBLAS_VARIABLE] = flags[CUBLAS_VARIABLE]
    torch.set_num_threads(flags["threads"])


def fingerprint(device_types: Sequence[str]) -> dict[str, str | int]:
    """What bits depend on besides program and data: versions and hardware, as plain values ("" where absent).

    Args:
        device_types: names of the device types in use, in executor order.
    """
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "format": FORMAT_VERSION,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": _version("lightning"),
        "triton": _version("triton") or _version("pytorch-triton"),
        "cuda": torch.version.cuda or "",
        "cudnn": cudnn or 0,
        "driver": _first_match(Path("/proc/driver/nvidia/version"), r"Kernel Module\D*([\d.]+)"),
        "cpu": _first_match(Path("/proc/cpuinfo"), r"model name\s*:\s*(.+)") or platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device_types": ",".join(device_types),
    }


@functools.cache  # metadata are files to be parsed, and a checkpoint has them all
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@functools.cache  # of the machine
def _first_match(path: Path, pattern: str) -> str:
    try:
        found = re.search(pattern, path.read_text())
    except OSError:
        return ""
    return found.group(1).strip() if found else ""


@contextmanager
def deterministic_replacements(device_type: str = "cuda") -> Iterator[None]:
    """Give operations that raise under deterministic mode a deterministic kernel for the time of a `with` block.

    Replaced is the backward of adaptive average pooling in two dimensions, which VGG needs. Its sums are taken in the
    order of torch's CPU kernel, so the gradient has the bits that the CPU computes from the same input.

    Args:
        device_type: the devices whose kernel is replaced.
    """
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*Overriding a previously registered kernel")
        library.impl("_adaptive_avg_pool2d_backward", _adaptive_avg_pool2d_backward, device_type.upper())
    try:
        yield
    finally:
        library._destroy()


def _adaptive_avg_pool2d_backward(grad: torch.Tensor, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - aten's name
    """Spread each output's gradient evenly over its window, outputs in row-major order.

    Args:
        grad: gradient of the output, [..., H_out, W_out].
        input: the input, [..., H, W]; only its shape, type and layout are used.
    """
    made = torch.zeros_like(input)
    (rows, columns), (height, width) = grad.shape[-2:], input.shape[-2:]
    for row in range(rows):
        top, bottom = row * height // rows, -(-(row + 1) * height // rows)
        for column in range(columns):
            left, right = column * width // columns, -(-(column + 1) * width // columns)
            share = grad[..., row : row + 1, column : column + 1] / (bottom - top) / (right - left)
            made[..., top:bottom, left:right] += share
    return made
