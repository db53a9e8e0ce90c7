"""Lightning accelerator that gives every device a type.

``Trainer(accelerator="easyscale", devices="v100:1,p100:2")`` reads like a cluster request. Lightning asks an
accelerator's *class* to parse `devices`, so what an instance was told (may types be emulated?) has to be part of its
class: constructing an `EasyScaleAccelerator` yields one of its three variants, for emulated types, for GPUs, and for a
plain CPU. The types travel to the strategy on the list of devices that Lightning hands it, so two Trainers in one
process, or one accelerator given to two Trainers, never see each other's.

Invariants: nothing is stored on the class; with a stock ``cpu`` or ``cuda`` accelerator `device_types_of` gives the
detected types, so a strategy has one way to ask.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import AcceleratorRegistry, CPUAccelerator, CUDAAccelerator
from lightning.pytorch.accelerators.accelerator import Accelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_easyscale._lightning import requested_devices
from lightning_easyscale.devices import (
    DevicesInput,
    DeviceType,
    detect,
    device_type,
    emulation_requested,
    environment_in_force,
    parse_devices,
)
from lightning_easyscale.elastic.membership import DEVICES_VARIABLE
from lightning_easyscale.probe import what_does_not_differ


class TypedDevices(list[torch.device]):
    """Torch devices, one per executor, that know their types.

    Args:
        devices: one per executor.
        types: one per executor.
    """

    def __init__(self, devices: Iterable[torch.device] = (), types: Iterable[DeviceType] = ()) -> None:
        super().__init__(devices)
        self.types = tuple(types)


def device_types_of(devices: Sequence[torch.device]) -> tuple[DeviceType, ...]:
    """The type of each device that a strategy was given as ``parallel_devices``, in executor order.

    Args:
        devices: from `EasyScaleAccelerator` (types as the user asked) or from a stock accelerator (types detected).
    """
    if isinstance(devices, TypedDevices):
        return devices.types
    found = detect() if any(device.type == "cuda" for device in devices) else ()
    return tuple(found[d.index or 0] if d.type == "cuda" else device_type("cpu") for d in devices)


def devices_for_workers(devices: list[torch.device], workers: int) -> list[torch.device]:
    """One device for each worker process that an agent has started on this host, starting from the Trainer's.

    The supervisor may name the type of each, whatever the Trainer was given.

    Args:
        devices: what the Trainer was given.
        workers: number of processes on this host; workers beyond the host's GPUs share them in turn.

    Raises:
        ValueError: if `devices` are of several types, so that nobody can say which type the others have.
    """
    named = os.environ.get(DEVICES_VARIABLE)
    if named:
        accelerator = EasyScaleAccelerator()
        return accelerator.get_parallel_devices(accelerator.parse_devices(named))
    if len(devices) == workers:
        return devices
    if not isinstance(devices, TypedDevices):
        if devices[0].type == "cpu":
            return [torch.device("cpu")] * workers
        return [torch.device("cuda", i % torch.cuda.device_count()) for i in range(workers)]
    names = [found.name for found in devices.types]
    if len(set(names)) > 1:
        raise ValueError(
            f"`devices={names}` names {len(names)} devices of different types, and torchrun has started {workers}"
            " workers on this host. HINT: give one type per worker, or start as many workers as devices."
        )
    first = devices.types[0]
    if first.kind == "cpu":
        return TypedDevices([devices[0]] * workers, [first] * workers)
    indices = [i for i, found in enumerate(detect()) if found.name == first.name]
    return TypedDevices([torch.device("cuda", indices[i % len(indices)]) for i in range(workers)], [first] * workers)


class EasyScaleAccelerator(Accelerator):
    """Devices by type, real or emulated: ``Trainer(accelerator=EasyScaleAccelerator(emulate=True), ...)``.

    ``Trainer(accelerator="easyscale")`` is the same with the environment variable ``EASYSCALE_EMULATE`` in the place of
    `emulate`. `devices` is whatever `lightning_easyscale.devices.parse_devices` reads, or ``"auto"``.

    Args:
        emulate: whether ``v100``, ``p100`` and ``t4`` mean CPU types that differ in their instruction set.

    Raises:
        ValueError: if a subclass is given an `emulate` that its class-level parsing cannot know of.
    """

    _emulate: ClassVar[bool] = False

    def __new__(cls, *, emulate: bool | None = None) -> EasyScaleAccelerator:
        """Chooses the variant whose class-level parsing does what this instance was asked for."""
        if cls is EasyScaleAccelerator:
            if emulation_requested(emulate):
                return super().__new__(_EmulatingAccelerator)
            return super().__new__(_CUDATypesAccelerator if CUDAAccelerator.is_available() else _CPUTypesAccelerator)
        if emulate is not None and emulate != cls._emulate:
            raise ValueError(
                f"`emulate={emulate}` cannot be chosen for the subclass `{cls.__name__}`."
                f" HINT: use `EasyScaleAccelerator(emulate={emulate})` itself."
            )
        return super().__new__(cls)

    def __init__(self, *, emulate: bool | None = None) -> None:
        self.device_types: tuple[DeviceType, ...] = ()

    @classmethod
    def parse_devices(cls, devices: DevicesInput) -> tuple[str, ...]:
        """The name of each device's type; errors as `lightning_easyscale.devices.parse_devices`."""
        return parse_devices(devices, emulate=cls._emulate)

    @classmethod
    def get_parallel_devices(cls, devices: Sequence[str]) -> TypedDevices:
        """The torch device and the type of each name: the next free GPU of that type, or the CPU."""
        gpus: dict[str, Iterator[torch.device]] = {}
        types = [device_type(name, emulate=cls._emulate) for name in devices]
        if any(found.kind == "cuda" for found in types):
            present = detect()
            for name in dict.fromkeys(devices):
                gpus[name] = iter([torch.device("cuda", i) for i, found in enumerate(present) if found.name == name])
        return TypedDevices(
            (next(gpus[found.name]) if found.kind == "cuda" else torch.device("cpu") for found in types), types
        )

    @classmethod
    def auto_device_count(cls) -> int:
        """Every visible GPU, or one CPU executor."""
        return 1 if cls._emulate else max(1, CUDAAccelerator.auto_device_count())

    @staticmethod
    def is_available() -> bool:
        """There is always a device, if only the CPU."""
        return True

    @staticmethod
    def name() -> str:
        """The name for ``Trainer(accelerator=...)``."""
        return "easyscale"

    def setup_device(self, device: torch.device) -> None:
        """Makes `device` the current one of this process."""
        _stock(device).setup_device(device)

    def setup(self, trainer: pl.Trainer) -> None:
        """Names each executor's type in the log, and warns of types in use that cannot be told apart.

        Raises:
            RuntimeError: if the Trainer's strategy, being none of ours, mixes CPUs and GPUs or runs a process without
                its type's environment.
        """
        devices = getattr(trainer.strategy, "parallel_devices", None) or requested_devices(trainer)
        self.device_types = device_types_of(devices)
        ours, own = getattr(trainer.strategy, "applies_device_types", False), trainer.strategy.root_device
        if not ours and len({device.type for device in devices}) > 1:
            raise RuntimeError(
                f"`devices={[found.name for found in self.device_types]}` mixes GPUs and CPUs, which `strategy="
                f"{type(trainer.strategy).__name__}` cannot bring together. HINT: use `strategy='easyscale'`."
            )
        if not ours and devices[0].type == "cuda" and own.type == "cpu":
            raise RuntimeError(
                "`accelerator='easyscale'` was given GPUs, but Lightning chose its single-device strategy for the CPU,"
                " because it does not know the accelerator's name. HINT: pass `accelerator=EasyScaleAccelerator()`, or"
                " `strategy='easyscale'`."
            )
        _stock(own).setup(trainer)
        _mix_precision_on_cpu(trainer, own)
        if not ours:
            _check_own_environment(trainer, self.device_types)
        executors = ", ".join(f"{i}: {found}" for i, found in enumerate(self.device_types))
        rank_zero_info(f"Device types of the executors: {executors}")
        if trainer.is_global_zero and any(found.emulated for found in self.device_types):
            warning = what_does_not_differ([found.name for found in self.device_types], emulate=True)
            if warning:
                rank_zero_warn(warning)

    def teardown(self) -> None:
        """Frees what the stock accelerator of these devices would free."""
        if any(found.kind == "cuda" for found in self.device_types):
            CUDAAccelerator().teardown()

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """What the stock accelerator of `device` reports."""
        return _stock(torch.device(device)).get_device_stats(device)


class _CPUTypesAccelerator(EasyScaleAccelerator):
    """The variant for a machine without GPUs."""


class _EmulatingAccelerator(EasyScaleAccelerator):
    """The variant that may emulate."""

    _emulate = True


# Lightning decides by `isinstance` whether the machine's GPUs are in use.
class _CUDATypesAccelerator(EasyScaleAccelerator, CUDAAccelerator):  # type: ignore[misc]
    """The variant for a machine with GPUs."""


def _stock(device: torch.device) -> Accelerator:
    return CUDAAccelerator() if device.type == "cuda" else CPUAccelerator()


def _mix_precision_on_cpu(trainer: pl.Trainer, device: torch.device) -> None:
    """Points autocast at the CPU: for an accelerator it does not know Lightning picks CUDA, which leaves it off."""
    plugin = trainer.strategy.precision_plugin
    if device.type != "cpu" or not isinstance(plugin, MixedPrecision) or plugin.device == "cpu":
        return
    if plugin.precision == "16-mixed":
        rank_zero_warn(
            "`precision='16-mixed'` is not supported on CPU devices. Using `precision='bf16-mixed'` instead."
        )
    trainer.strategy.precision_plugin = MixedPrecision("bf16-mixed", "cpu")


def _check_own_environment(trainer: pl.Trainer, types: Sequence[DeviceType]) -> None:
    own = types[trainer.local_rank % len(types)]
    if environment_in_force(own.environment):
        return
    settings = " ".join(f"{key}={value}" for key, value in own.environment.items())
    raise RuntimeError(
        f"`Trainer(accelerator='easyscale')` was asked for a device of type {own.name}, whose process must start with"
        f" `{settings or 'no instruction-set variables'}`, and `strategy={type(trainer.strategy).__name__}` does not"
        " see to that. HINT: use `strategy='easyscale'`, or start the script with these variables and one device type."
    )


AcceleratorRegistry.register(
    EasyScaleAccelerator.name(), EasyScaleAccelerator, description="Devices by type, real or emulated", override=True
)
