"""Emulated device types: one CPU, several instruction sets, several sets of bits.

Two GPU generations round differently because they run different kernels. So does one CPU when its libraries are held
to different instruction sets: ATen, oneDNN and MKL each choose kernels by the vector width they find, and each can be
told by an environment variable to use less. An emulated device type is such a setting. It is real in the one respect
that matters here, the bits, and it needs no GPU.

The types form a ladder, fastest first, that starts at what the CPU has. On a CPU without AVX-512 every rung below the
first moves down. All variables act when the libraries load, so they must be in the environment when a process starts;
`environment.py` sees to that.

Invariants: this file imports no torch; a type's environment is complete, which means that a variable of
`ISA_VARIABLES` that is not in it must be absent.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ISA_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
)
"""Every variable that chooses CPU kernels by instruction set, old spellings included."""

EMULATED_TYPES = ("v100", "p100", "t4")
"""Names of the emulated device types, fastest first."""

_NATIVE: dict[str, str] = {}
_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"}
_NARROW_ATEN = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"}
_BASELINE = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
_PINNED_AVX2 = {**_AVX2, "MKL_CBWR": "AVX2,STRICT"}

_LADDERS = {
    "avx512": (_NATIVE, _AVX2, _BASELINE),
    "avx2": (_NATIVE, _NARROW_ATEN, _BASELINE),
    "default": (_NATIVE, _BASELINE, _BASELINE),
}
# What ATen asks of a CPU before it uses its AVX-512 and AVX2 kernels.
_AVX512_FLAGS = {"avx512f", "avx512vl", "avx512bw", "avx512dq", "fma"}
_AVX2_FLAGS = {"avx2", "fma"}


@dataclass(frozen=True)
class HostCPU:
    """The CPU of this machine.

    Args:
        vendor: as the kernel reports it, for example ``GenuineIntel``; the architecture where it reports none.
        model: the model name, for humans and for caches.
        isa: ``avx512``, ``avx2`` or ``default``: the widest kernels ATen would use when nothing is set.
        why_not: why instruction sets cannot be emulated here; empty where they can.
    """

    vendor: str
    model: str
    isa: str
    why_not: str = ""


@lru_cache(maxsize=1)
def host_cpu() -> HostCPU:
    """This machine's CPU, from ``/proc/cpuinfo``."""
    arch = platform.machine() or "unknown"
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    vendor, model = fields.get("vendor_id", arch), fields.get("model name", arch)
    if arch.lower() not in ("x86_64", "amd64"):
        return HostCPU(vendor, model, "default", f"its CPU is {arch}, and only x86-64 libraries can be held back")
    if "flags" not in fields:
        return HostCPU(vendor, model, "default", "/proc/cpuinfo, which tells what its CPU can do, is not readable")
    flags = set(fields["flags"].split())
    isa = "avx512" if flags >= _AVX512_FLAGS else "avx2" if flags >= _AVX2_FLAGS else "default"
    return HostCPU(vendor, model, isa)


def emulated_environment(name: str) -> dict[str, str]:
    """The variables an executor of the emulated type `name` starts with; those of `ISA_VARIABLES` not in it are unset.

    Raises:
        KeyError: if `name` is not in `EMULATED_TYPES`.
        RuntimeError: if this machine cannot emulate, with the reason.
    """
    ladder = dict(zip(EMULATED_TYPES, _LADDERS[host_cpu().isa], strict=True))
    environment = dict(ladder[name])
    if host_cpu().why_not:
        raise RuntimeError(
            f"Device type `{name}` cannot be emulated on this machine: {host_cpu().why_not}."
            " HINT: use the machine's own devices, `devices=<count>`."
        )
    return environment


def pinned_cpu_environment(names: Sequence[str]) -> dict[str, str]:
    """The one environment under which all of the emulated types `names`, and the CPU itself, give the same bits.

    AVX2 when every type has it, else the baseline of x86-64. It depends on the names and on whether this CPU has
    AVX2, not on its rung of the ladder, so an AVX-512 host and an AVX2 host of one job arrive at the same answer.
    Empty where instruction sets cannot be chosen, which is correct only for a pool of one type.
    """
    if host_cpu().why_not:
        return {}
    every_type_has_avx2 = EMULATED_TYPES[-1] not in names and host_cpu().isa != "default"
    return dict(_PINNED_AVX2 if every_type_has_avx2 else _BASELINE)


def instruction_set(environment: Mapping[str, str]) -> str:
    """What `environment` lets the libraries use on this CPU, as one string that can be compared and read.

    The name of ATen's kernels, and in brackets whatever else holds oneDNN or MKL back: MKL's setting changes bits
    even when it names the instruction set that MKL would have chosen.
    """
    order = ("default", "avx2", "avx512")
    asked = environment.get("ATEN_CPU_CAPABILITY", host_cpu().isa).lower()
    isa = min(asked if asked in order else host_cpu().isa, host_cpu().isa, key=order.index)
    others = [f"{k}={environment[k]}" for k in ISA_VARIABLES[1:] if k in environment]
    return f"{isa} [{' '.join(others)}]" if others else isa
