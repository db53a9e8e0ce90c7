"""Device types: what decides a device's bits and its speed.

A device type is identified by what it is, not by its label: the device's name, compute capability and number of
multiprocessors on CUDA; vendor and instruction set in force on CPU. Its short name (``v100``, ``h100``, ``cpu``) is
what users type and what logs and records show.

Types are *detected* (the machine's GPUs, or ``cpu``) or *emulated* (`emulation.py`; asked for with
``emulate=True`` or ``EASYSCALE_EMULATE=1``, in which case the names of the table always mean emulated types).

Invariants: this file imports torch only to look at GPUs, so that a launcher can still choose the environment of a
process in which torch is not loaded; nothing is silently replaced by another type.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lightning_easyscale.emulation import (
    EMULATED_TYPES,
    emulated_environment,
    host_cpu,
    instruction_set,
    pinned_cpu_environment,
)
from lightning_easyscale.environment import (
    apply_environment,
    ensure_environment,
    environment_in_force,
    isa_environment,
)

__all__ = [
    "EMULATE_VARIABLE",
    "DeviceType",
    "apply_environment",
    "available_types",
    "d2_policy",
    "cpu_identity",
    "detect",
    "device_type",
    "has_cpu",
    "emulation_requested",
    "ensure_environment",
    "environment_in_force",
    "environment_of",
    "parse_devices",
    "pinned_environment",
]

EMULATE_VARIABLE = "EASYSCALE_EMULATE"
"""Set to 1 to allow emulated device types where `emulate` is not given."""

# Short names as `_short_name` makes them: h100, rtx3090, a100-114sm.
_GPU_NAME = re.compile(r"[a-z]{1,5}\d{1,4}[a-z]{0,3}(-\d+sm)?")
DevicesInput = int | str | Mapping[str, int] | Sequence[str]


@dataclass(frozen=True)
class DeviceType:
    """One type of device.

    Two devices are of one type when their `kind` and `identity` are equal; names are for people.

    Args:
        name: short name in lower case, for example ``v100``.
        kind: ``cpu`` or ``cuda``.
        identity: ``(device name, compute capability, multiprocessors)`` on CUDA, for example
            ``("NVIDIA H100 80GB HBM3", "9.0", "132")``; ``(vendor, instruction set in force)`` on CPU.
        environment: variables that an executor of this type must start with (see `apply_environment`).
        emulated: whether the type is one of the emulation table.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    identity: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)
    emulated: bool = False

    def same_as(self, other: DeviceType) -> bool:
        """Whether both stand for the same hardware and settings, whatever they are called."""
        return (self.kind, self.identity) == (other.kind, other.identity)

    def __str__(self) -> str:
        return f"{self.name} ({'emulated: ' if self.emulated else ''}{', '.join(self.identity)})"


def emulation_requested(emulate: bool | None = None) -> bool:
    """`emulate` if given, else what ``EASYSCALE_EMULATE`` says.

    Raises:
        ValueError: if the variable is neither a yes nor a no.
    """
    if emulate is not None:
        return emulate
    value = os.environ.get(EMULATE_VARIABLE, "").strip().lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("", "0", "false", "no", "off"):
        return False
    raise ValueError(f"`{EMULATE_VARIABLE}={value}` is neither yes nor no. HINT: set it to 1 or 0.")


def cpu_identity(environment: Mapping[str, str]) -> tuple[str, str]:
    """``(vendor, instruction set in force)`` of a process on this machine that was started with `environment`."""
    return host_cpu().vendor, instruction_set(environment)


def detect() -> tuple[DeviceType, ...]:
    """The devices this machine has: one entry per visible GPU, in CUDA's order, or a single ``cpu``.

    The ``cpu`` entry stands for any number of executors. GPUs that share a short name without being of one type (two
    variants of an H100, a MIG slice) get their number of multiprocessors as a suffix: ``h100-114sm``.
    """
    import torch

    if not torch.cuda.is_available():
        return (_cpu_type(),)
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    found = [_cuda_type(p.name, p.major, p.minor, p.multi_processor_count) for p in properties]
    ambiguous = {a.name for a in found for b in found if a.name == b.name and not a.same_as(b)}
    return tuple(replace(t, name=f"{t.name}-{t.identity[2]}sm") if t.name in ambiguous else t for t in found)


def available_types(emulate: bool | None = None) -> tuple[str, ...]:
    """Names that `parse_devices` accepts here, without repetition: emulated ones first, ``cpu`` last."""
    emulated = EMULATED_TYPES if emulation_requested(emulate) and not host_cpu().why_not else ()
    return tuple(dict.fromkeys([*emulated, *(t.name for t in detect()), "cpu"]))


def device_type(name: str, *, emulate: bool | None = None) -> DeviceType:
    """The type called `name` on this machine.

    Raises:
        ValueError: if this machine has no such type, listing what it has.
        RuntimeError: if the type would be emulated and this machine cannot, with the reason.
    """
    if name in EMULATED_TYPES and emulation_requested(emulate):
        environment = emulated_environment(name)
        return DeviceType(name, "cpu", cpu_identity(environment), environment, emulated=True)
    if name == "cpu":
        return _cpu_type()
    for found in detect():
        if found.name == name:
            return found
    raise ValueError(_unknown_type(name, emulate))


def refuse_shared_gpus(uuids: Sequence[str]) -> None:
    """Refuse executors that share a GPU, for NCCL, which gives each GPU to one process.

    Args:
        uuids: the GPU of each executor, as CUDA identifies it.

    Raises:
        ValueError: if two are the same, with the executors and the cure.
    """
    for executor, uuid in enumerate(uuids):
        first = uuids.index(uuid)
        if first != executor:
            raise ValueError(
                f"executors {first} and {executor} are both on the GPU {uuid}, which NCCL allows one process only."
                " HINT: agents of torchrun on one host need `CUDA_VISIBLE_DEVICES`, or one agent with a"
                " `--nproc-per-node` for all; to share a GPU on purpose, pass `process_group_backend='gloo'`."
            )


def environment_of(name: str, *, emulate: bool | None = None) -> dict[str, str]:
    """The variables an executor of type `name` starts with; errors as `device_type`."""
    return dict(device_type(name, emulate=emulate).environment)


def parse_devices(devices: DevicesInput, *, emulate: bool | None = None) -> tuple[str, ...]:
    """What a user wrote for `devices`, as one type name per device, in the order given.

    Args:
        devices: ``"v100:1,p100:2"``, ``{"v100": 1, "p100": 2}``, ``["v100", "p100", "p100"]``, or a count (``3``,
            ``"3"``) of the machine's own devices, which under emulation are the fastest emulated type. A name without
            a count means one. A count of zero leaves a type out.
        emulate: whether emulated types may be used; see `emulation_requested`.

    Raises:
        ValueError: for a malformed entry, a negative count, no device at all, a type that is not there (listing what
            is), or more devices than there are GPUs of that type.
        RuntimeError: if an emulated type is asked for where emulation is not possible.
    """
    counts = _read(devices)
    names: list[str] = []
    for name, count in counts:
        if count < 0:
            raise ValueError(f"`devices={devices!r}` asks for {count} devices. HINT: a count is never negative.")
        if name is None:
            names += _own_devices(count, devices, emulate)
        else:
            names += [device_type(name, emulate=emulate).name] * count
    if not names:
        raise ValueError(f"`devices={devices!r}` names no device. HINT: ask for at least one, such as `devices=1`.")
    _check_enough(names, devices, emulate)
    return tuple(names)


def d2_policy(pool: Sequence[str], *, emulate: bool | None = None) -> Literal["pinned", "portable"]:
    """How D2 is kept for a pool: ``"pinned"`` for CPU types alone, ``"portable"`` as soon as it has a CUDA type.

    A job's executors run on different machines, so a name may be that of a GPU this machine does not have; one type of
    the pool has to be here.

    Args:
        pool: names of all types the job may ever use.
        emulate: as in `device_type`.

    Raises:
        ValueError: if the pool is empty, none of its types is on this machine, or a name can be no device type.
        RuntimeError: if a type would be emulated and this machine cannot, with the reason.
    """
    if not pool:
        raise ValueError("`pool=()` names no device type. HINT: list every type the job may ever run on.")
    names = list(dict.fromkeys(pool))
    here = available_types(emulate)
    elsewhere = [name for name in names if name not in here]
    if elsewhere and (len(elsewhere) == len(names) or not all(_GPU_NAME.fullmatch(name) for name in elsewhere)):
        unknown = [name for name in elsewhere if not _GPU_NAME.fullmatch(name)] or elsewhere
        device_type(unknown[0], emulate=emulate)  # raises, and says what is here
    kinds = {device_type(name, emulate=emulate).kind for name in names if name in here}
    return "portable" if elsewhere or "cuda" in kinds else "pinned"


def has_cpu(pool: Sequence[str], *, emulate: bool | None = None) -> bool:
    """Whether a type of the pool is the CPU or emulated on it.

    Args:
        pool: names of all types the job may ever use.
        emulate: as in `device_type`.
    """
    emulated = EMULATED_TYPES if emulation_requested(emulate) else ()
    return any(name == "cpu" or name in emulated for name in pool)


def pinned_environment(pool: Sequence[str], *, emulate: bool | None = None) -> dict[str, str]:
    """The `pinned` D2 policy: one environment for every executor and stage of a job that may use the types of `pool`.

    It holds every device to the lowest instruction set that all types of the pool have.

    Args:
        pool: names of all types the job may ever use; repetitions and order do not matter.
        emulate: as in `device_type`.

    Raises:
        ValueError: if the pool is empty, names an unknown type, or contains a CUDA device, whose bits no environment
            variable can pin.
    """
    if not pool:
        raise ValueError("`pool=()` names no device type. HINT: list every type the job may ever run on.")
    types = [device_type(name, emulate=emulate) for name in dict.fromkeys(pool)]
    cuda = [t.name for t in types if t.kind == "cuda"]
    if cuda:
        raise ValueError(
            f"`pool={list(pool)}` has CUDA devices ({', '.join(cuda)}), and pinning instruction sets reaches CPU"
            " kernels only. HINT: such a pool has the policy `portable` (`d2_policy`)."
        )
    return pinned_cpu_environment([t.name for t in types])


def _cpu_type() -> DeviceType:
    environment = isa_environment()
    return DeviceType("cpu", "cpu", cpu_identity(environment), environment)


def _cuda_type(name: str, major: int, minor: int, multiprocessors: int) -> DeviceType:
    return DeviceType(_short_name(name), "cuda", (name, f"{major}.{minor}", str(multiprocessors)), isa_environment())


def _short_name(device_name: str) -> str:
    """``Tesla V100-SXM2-16GB`` -> ``v100``, ``NVIDIA GeForce RTX 3090`` -> ``rtx3090``, ``NVIDIA H200`` -> ``h200``."""
    words = [
        w
        for w in re.split(r"[\s\-_]+", device_name.lower())
        if w not in ("nvidia", "tesla", "geforce", "quadro", "amd")
    ]
    if len(words) > 1 and not re.search(r"\d", words[0]):
        return words[0] + words[1]
    return words[0] if words else device_name.lower()


def _read(devices: Any) -> list[tuple[str | None, int]]:
    """``(type name or None for the machine's own, count)`` for each entry of `devices`."""
    if isinstance(devices, Mapping):
        return [(str(name).strip().lower(), _count(count, devices)) for name, count in devices.items()]
    if isinstance(devices, int) and not isinstance(devices, bool):
        return [(None, devices)]
    if isinstance(devices, str):
        if re.fullmatch(r"\s*[+-]?\d+\s*", devices):
            return [(None, int(devices))]
        return [_entry(part, devices) for part in devices.split(",")]
    if isinstance(devices, Sequence) and all(isinstance(part, str) for part in devices):
        return [_entry(part, devices) for part in devices]
    raise ValueError(
        f"`devices={devices!r}` is not a choice of device types. HINT: write a count (`3`), a string"
        ' (`"v100:1,p100:2"`), a mapping of counts or a list of type names; choose single GPUs by CUDA_VISIBLE_DEVICES.'
    )


def _entry(text: str, devices: Any) -> tuple[str, int]:
    name, colon, count = (part.strip() for part in text.partition(":"))
    if not name or not re.search(r"[a-zA-Z]", name) or (colon and not count):
        raise ValueError(
            f"`devices={devices!r}` has the entry {text.strip()!r}, which is not `type:count`."
            ' HINT: write for example `devices="v100:1,p100:2"`.'
        )
    return name.lower(), _count(count, devices) if colon else 1


def _count(value: Any, devices: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(
        f"`devices={devices!r}` has the count {value!r}. HINT: a count is a whole number, such as `v100:2`."
    )


def _own_devices(count: int, devices: Any, emulate: bool | None) -> list[str]:
    if emulation_requested(emulate):
        return [device_type(EMULATED_TYPES[0], emulate=emulate).name] * count
    found = detect()
    if found[0].kind == "cpu":
        return ["cpu"] * count
    if count > len(found):
        raise ValueError(
            f"`devices={devices!r}` asks for {count} devices, and this machine has {len(found)} GPUs."
            f" HINT: set `devices={len(found)}`, or run several workers per GPU with `num_ests`."
        )
    return [t.name for t in found[:count]]


def _check_enough(names: Sequence[str], devices: Any, emulate: bool | None) -> None:
    """Refuses more devices of a CUDA type than there are."""
    asked = Counter(names)
    cuda = [name for name in asked if device_type(name, emulate=emulate).kind == "cuda"]
    present = Counter(t.name for t in detect()) if cuda else asked
    for name in cuda:
        count = asked[name]
        if count > present[name]:
            raise ValueError(
                f"`devices={devices!r}` asks for {count} devices of type {name}, and this machine has {present[name]}."
                f" HINT: set `{name}:{present[name]}`, or run several workers per device with `num_ests`."
            )


def _unknown_type(name: str, emulate: bool | None) -> str:
    here = available_types(emulate)
    close = difflib.get_close_matches(name, {*here, *EMULATED_TYPES}, n=1, cutoff=0.5)
    message = f"Device type `{name}` is not on this machine, which has: {', '.join(here)}."
    if name in EMULATED_TYPES:
        return (
            f"{message} HINT: to emulate it on the CPU, set `{EMULATE_VARIABLE}=1` or pass"
            " `accelerator=EasyScaleAccelerator(emulate=True)`."
        )
    return f"{message} HINT: " + (f"did you mean `{close[0]}`?" if close else "choose one of these.")
