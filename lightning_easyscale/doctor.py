"""``python -m lightning_easyscale.doctor``: what on this machine would break a determinism level, and how to set a job.

It looks at versions, environment variables, threads, driver and device types, and changes nothing. With the size of a
model it estimates how many ESTs fit on a device: they share parameters and optimizer state, and only one of them holds
activations at a time, so what grows with their number are the gradients that wait for the others.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from . import determinism
from .devices import DeviceType, detect
from .emulation import host_cpu

SUPPORTED = {"torch": ((2, 11), (2, 15)), "lightning": ((2, 5), (2, 7))}
"""Package -> the first version that works and the first that is not known to."""

STATES = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2, "rmsprop": 1, "adagrad": 1}
"""Optimizer -> numbers it keeps for every parameter."""

# Variables that change bits wherever they are set, so that they must be the same on every host of a job.
_SAME_EVERYWHERE = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS")
_TF32_VARIABLES = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
_CUBLAS_ALLOWED = (":4096:8", ":16:8")
EST_BYTES = 40 * 2**20
"""What an EST's thread takes of a GPU for handles of cuBLAS and cuDNN; measured on an H200
(``recipes/results/gpu_sharing.md``)."""

_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Finding:
    """Something that breaks a level, or that one should know.

    Args:
        levels: the levels it breaks; empty for advice.
        what: what was found.
        cure: what to do about it.
    """

    levels: tuple[str, ...]
    what: str
    cure: str

    def __str__(self) -> str:
        head = f"breaks {', '.join(self.levels)}" if self.levels else "note"
        return f"{head}: {self.what}\n    HINT: {self.cure}"


def check_versions(versions: Mapping[str, str]) -> list[Finding]:
    """Packages that are missing or outside of what is supported.

    Args:
        versions: package -> installed version, "" where it is missing.
    """
    found = []
    for package, (first, end) in SUPPORTED.items():
        wanted = f"{package}>={_text(first)},<{_text(end)}"
        numbers = versions.get(package, "").split(".")[:2]
        if not all(part.isdecimal() for part in numbers) or not first <= tuple(map(int, numbers)) < end:
            what = f"{package} {versions.get(package) or 'is missing'}; supported is {wanted}"
            found.append(Finding(("D0", "D1", "D2"), what, f"pip install '{wanted}'."))
    return found


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def check_environment(environment: Mapping[str, str], *, cuda: bool) -> list[Finding]:
    """Variables that make results differ from run to run, from host to host, or from the reference."""
    found = []
    workspace = environment.get(determinism.CUBLAS_VARIABLE)
    if cuda and workspace is not None and workspace not in _CUBLAS_ALLOWED:
        what = f"{determinism.CUBLAS_VARIABLE}={workspace} lets cuBLAS add in a varying order"
        found.append(Finding(("D0", "D1", "D2"), what, f"unset it, or use {' or '.join(_CUBLAS_ALLOWED)}."))
    for name in _SAME_EVERYWHERE:
        if name in environment:
            what = f"{name}={environment[name]} changes CPU results"
            found.append(Finding((), what, "set it to the same on every host and for the reference, or unset it."))
    for name in _TF32_VARIABLES:
        if cuda and name in environment:
            what = f"{name}={environment[name]} changes how matrices are multiplied"
            found.append(Finding((), what, "set it to the same on every host and for the reference, or unset it."))
    return found


def check_threads(num_ests: int, *, cpus: int, quota: float | None) -> list[Finding]:
    """What the number of CPUs means for threads, which are a property of the job.

    Args:
        num_ests: N.
        cpus: CPUs that this process may run on.
        quota: CPUs worth of time that the container may use; None: no limit.
    """
    threads = determinism.default_threads(num_ests, cpus)
    cure = f"say `threads_per_est={threads}`, so that a host with other CPUs keeps the bits."
    found = [Finding((), f"{cpus} CPUs give {num_ests} ESTs {threads} thread(s) each by default", cure)]
    if quota is not None and quota < cpus:
        fitting = max(1, int(quota // num_ests))
        what = f"the container may use {quota:g} CPUs, but {cpus} are visible"
        found.append(Finding((), what, f"`threads_per_est={fitting}` avoids that threads wait for each other."))
    return found


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPUs worth of time that this control group (v2) may use; None without a limit."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) / int(period)


def check_devices(types: Sequence[DeviceType], *, num_ests: int, built_for_cuda: bool) -> list[Finding]:
    """What the devices allow.

    Args:
        types: of all devices, as `devices.detect` gives them.
        num_ests: N.
        built_for_cuda: whether this torch could use GPUs.
    """
    found = []
    cuda = [one for one in types if one.kind == "cuda"]
    if built_for_cuda and not cuda:
        what = "torch is built for CUDA, but sees no GPU"
        found.append(Finding((), what, "check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES; jobs run on the CPU."))
    kinds = sorted({str(one) for one in cuda})
    if len(kinds) > 1:
        what = f"the GPUs are of {len(kinds)} types: {'; '.join(kinds)}"
        found.append(Finding(("D1",), what, "keep a D1 job on one type, or declare a `pool` and use D2."))
    if cuda and num_ests > 2:
        what = (
            f"NCCL's order of addition for {num_ests} ranks depends on the topology; no stock NCCL run can be repeated"
        )
        cure = 'compare with stock DDP over gloo (`process_group_backend="gloo"`), or with `ordered_allreduce_hook`.'
        found.append(Finding((), what, cure))
    if cuda and num_ests > len(cuda):
        what = f"{num_ests} ESTs share {len(cuda)} GPU(s), which may wait for Python during a part of every backward"
        cure = "`overlap_backward=True` hides all of it, if the activations of two mini-batches fit (--overlap)."
        found.append(Finding((), what, cure))
    if not cuda and host_cpu().why_not:
        what = f"device types cannot be emulated: {host_cpu().why_not}"
        found.append(Finding((), what, "D2 can be tried on x86-64 Linux only."))
    return found


def bytes_needed(
    ests: int,
    *,
    parameters: float,
    activations: float,
    optimizer: str = "adamw",
    reduction: str = "ddp",
    overlap: bool = False,
    offload: bool = False,
    each: float = 0.0,
) -> float:
    """Bytes of a device with that many ESTs in fp32: a lower bound, without fragmentation.

    Args:
        ests: on the device.
        parameters: of the model.
        activations: bytes that one mini-batch takes beyond parameters and gradients.
        optimizer: one of `STATES`.
        reduction: ``ddp`` keeps the gradients of all ESTs until the last has arrived; ``tree`` at most
            ``2 * floor(log2 ests) + 1`` partial sums.
        overlap: with `overlap_backward=True`, the activations of two ESTs.
        offload: with ``gradient_offload="host"``, the gradients of one EST alone.
        each: bytes that every EST holds beyond all that (`EST_BYTES`, its mini-batch).
    """
    copies = ests if reduction == "ddp" else min(ests, 2 * (ests.bit_length() - 1) + 1)
    gradients = 4 * parameters * (1 + STATES[optimizer] + (1 if offload else copies))
    return gradients + activations * (2 if overlap and ests > 1 else 1) + ests * each


def most_ests(memory: float, num_ests: int, **model: float | str) -> int:
    """The largest number of ESTs, up to N, that fit into ``memory`` bytes; 0 if not even one does."""
    fitting = [k for k in range(1, num_ests + 1) if bytes_needed(k, **model) <= memory]  # type: ignore[arg-type]
    return max(fitting, default=0)


def examine(num_ests: int) -> list[Finding]:
    """All findings on this machine."""
    import torch

    types = detect()
    cuda = any(one.kind == "cuda" for one in types)
    versions = {}
    for package in SUPPORTED:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = ""
    cpus = determinism.default_threads(1)
    return [
        *check_versions(versions),
        *check_environment(os.environ, cuda=cuda),
        *check_threads(num_ests, cpus=cpus, quota=cpu_quota()),
        *check_devices(types, num_ests=num_ests, built_for_cuda=torch.version.cuda is not None),
    ]


def _amount(text: str) -> float:
    """A number with a unit: ``25.6M``, ``3GiB``, ``1e9``."""
    lowered = text.strip().lower()
    for unit in sorted(_UNITS, key=len, reverse=True):
        if lowered.endswith(unit):
            return float(lowered[: -len(unit)]) * _UNITS[unit]
    return float(lowered)


def _memory() -> tuple[str, float, float]:
    """The smallest device, its bytes and what each EST takes of it by itself; the CPU's if there is no GPU."""
    import torch

    if torch.cuda.is_available():
        sizes = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        least = min(sizes, key=lambda one: one.total_memory)
        return least.name, float(least.total_memory), float(EST_BYTES)
    return "this machine's CPU", float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the status is 1 if a level is broken."""
    parser = argparse.ArgumentParser(prog="python -m lightning_easyscale.doctor", description=__doc__.split("\n")[0])
    parser.add_argument("--num-ests", type=int, default=4, help="N (default 4)")
    parser.add_argument("--parameters", type=_amount, help="of the model, for example 25.6M")
    parser.add_argument("--activations", type=_amount, default=0.0, help="bytes of a mini-batch, for example 3GiB")
    parser.add_argument("--input", type=_amount, default=0.0, help="bytes of its input, held by each EST")
    parser.add_argument("--overlap", action="store_true", help="with overlap_backward=True")
    parser.add_argument("--optimizer", choices=sorted(STATES), default="adamw")
    arguments = parser.parse_args(argv)
    if arguments.num_ests < 1:
        parser.error(f"`--num-ests {arguments.num_ests}` is no number of workers. HINT: use at least 1.")
    fingerprint = determinism.fingerprint([one.name for one in detect()])
    print(", ".join(f"{name} {value}" for name, value in fingerprint.items() if value))
    findings = examine(arguments.num_ests)
    for finding in sorted(findings, key=lambda one: not one.levels):
        print(finding)
    broken = {level for finding in findings for level in finding.levels}
    for level in ("D0", "D1", "D2"):
        print(f"{level}: {'broken by the above' if level in broken else 'nothing found that would break it'}")
    if arguments.parameters:
        device, memory, own = _memory()
        model = {"parameters": arguments.parameters, "activations": arguments.activations}
        model |= {"overlap": arguments.overlap, "optimizer": arguments.optimizer, "each": own + arguments.input}
        kinds: dict[str, dict[str, Any]] = {f'reduction="{order}"': {"reduction": order} for order in ("ddp", "tree")}
        if own:  # a GPU's
            one_input = {"activations": arguments.activations + arguments.input, "each": own}
            kinds['reduction="tree", input_offload="host"'] = {"reduction": "tree", **one_input}
            # Inputs wait on the host too.
            kinds['gradient_offload="host"'] = {"offload": True, **one_input}
        for name, ways in kinds.items():
            fit = most_ests(memory, arguments.num_ests, **{**model, **ways})
            at_least = f"at least {-(-arguments.num_ests // fit)} device(s)" if fit else "a larger device"
            print(
                f"{name}: {fit} of {arguments.num_ests} ESTs fit on {device} ({memory / 2**30:.0f} GiB);"
                f" the job needs {at_least}"
            )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
