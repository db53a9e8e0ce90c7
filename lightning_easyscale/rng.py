"""Generator states of one EST, and their swap when the process goes over to another EST.

Under stock DDP every rank is a process with generators of its own: torch's for the CPU and its device, Python's
`random`, NumPy's legacy global. Here several ESTs share one process, so each has a `Generators` object: `capture` when
it gives up the process, `install` when it gets it back. Invariant: between `install` and `capture` the process draws
exactly the numbers the EST's own process would have drawn, whatever other ESTs drew in between.

What is cheap is swapped by handle, not by value: each EST has a NumPy bit generator of its own, and on CUDA a state
object of its own (`graphsafe_set_state`). `numpy.random.set_bit_generator` forgets the second number that a Box-Muller
draw keeps for later, so that is carried along. Python's generator is copied as the bytes it is; to make the 625 objects
of `random.getstate` takes as long as all the rest.
"""

from __future__ import annotations

import ctypes
import random
import struct
import weakref
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.random import mtrand

_MT19937_BYTES = 4 * 624 + 4  # uint32 key[624]; int pos

Parts = tuple[Any, Any, Any]
"""States of torch's CPU generator, `random` and NumPy, as `Generators.parts` gives them."""


class Generators:
    """The states of all generators of one EST; a new one holds those that the process has just now.

    Args:
        devices: the devices whose generators the EST uses; the CPU's is always part of it.
        extra: generators by name that user modules hold as globals, see `find_module_generators`.

    Raises:
        ValueError: if a device is neither a CPU nor a CUDA device.
    """

    _installed: weakref.ref[Generators] | None = None

    def __init__(self, devices: Sequence[torch.device], *, extra: Mapping[str, object] | None = None) -> None:
        """Capture the process as it is."""
        unknown = [device for device in devices if device.type not in ("cpu", "cuda")]
        if unknown:
            raise ValueError(
                f"`devices={[str(device) for device in devices]}` has generators we cannot swap: {unknown[0]}."
                " HINT: use CPU or CUDA devices."
            )
        self._extra = dict(extra or {})
        self._extra_states: dict[str, Any] = {}
        self._device_generators = [_device_generator(device) for device in devices if device.type == "cuda"]
        self._device_states: list[torch.Generator] = []
        self._numpy = _NumpyState()
        self._python = _PythonState()
        self.capture()

    def capture(self) -> None:
        """Remember the process's generators as this EST's."""
        self._torch = torch.default_generator.get_state()
        self._python.capture()
        self._numpy.capture()
        if Generators._installed is not None and Generators._installed() is self:
            self._device_states = [generator.graphsafe_get_state() for generator in self._device_generators]
        else:
            self._device_states = [generator.clone_state() for generator in self._device_generators]
        self._extra_states = {name: _get_state(generator) for name, generator in self._extra.items()}

    def install(self) -> None:
        """Give the process this EST's generators."""
        torch.default_generator.set_state(self._torch)
        self._python.install()
        self._numpy.install()
        for generator, state in zip(self._device_generators, self._device_states, strict=True):
            generator.graphsafe_set_state(state)
        for name, state in self._extra_states.items():
            _set_state(self._extra[name], state)
        Generators._installed = weakref.ref(self)

    def state_dict(self) -> dict[str, Any]:
        """A copy of the captured states: tensors, numbers, strings and plain containers, `weights_only` loadable.

        Device states are listed in the order of `devices`, whatever their index in this process.
        """
        return {
            "torch": self._torch.clone(),
            "devices": [state.get_state() for state in self._device_states],
            "python": _to_plain(_python_state(self._python.part)),
            "numpy": _to_plain(self._numpy.state()),
            "extra": {name: _to_plain(state) for name, state in self._extra_states.items()},
        }

    def parts(self) -> Parts:
        """The captured states of torch's CPU generator, `random` and NumPy: cheap to take, compare and send."""
        return self._torch.numpy().tobytes(), self._python.part, self._numpy.part()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the states of `state_dict`; `install` puts them to use.

        A device without a state in `state` (the EST comes from another kind of device) and a generator of `extra` that
        the saving process did not know keep the state they have.
        """
        self._torch = state["torch"].clone()
        self._device_states = [
            own.clone_state() for own in self._device_states
        ]  # not those that may be in use just now
        for own, saved in zip(self._device_states, state["devices"], strict=False):
            own.set_state(saved)
        self._python.load(_from_plain(state["python"]))
        self._numpy.load(_from_plain(state["numpy"]))
        known = self._extra_states.keys() & state["extra"].keys()
        self._extra_states.update({name: _from_plain(state["extra"][name]) for name in known})


def state_of_parts(parts: Parts) -> dict[str, Any]:
    """What `Generators.state_dict` would have returned when `Generators.parts` returned `parts`."""
    torch_state, python, (kind, bits, kept) = parts
    if isinstance(bits, bytes):
        words = np.frombuffer(bits, dtype=np.uint32)
        bits = _to_plain({"bit_generator": kind, "state": {"key": words[:-1], "pos": int(words[-1])}})
    gauss = {"has_gauss": int(kept is not None), "gauss": kept or 0.0}
    return {
        "torch": torch.frombuffer(bytearray(torch_state), dtype=torch.uint8),
        "devices": [],
        "python": _to_plain(_python_state(python)),
        "numpy": {**bits, **gauss},
        "extra": {},
    }


def _python_memory() -> memoryview | None:
    """Where CPython's `random` keeps its words, if that is where they were always kept; source: `_randommodule.c`."""
    generator: Any = random._inst  # type: ignore[attr-defined]
    size = struct.calcsize(_PYTHON_WORDS)
    if type(generator).__mro__[1].__basicsize__ < object.__basicsize__ + size:
        return None
    address = id(generator) + object.__basicsize__
    memory = memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
    return memory if _python_state((memory.tobytes(), generator.gauss_next)) == random.getstate() else None


def _python_state(part: Any) -> Any:
    """What `random.getstate` would have returned when `_PythonState.part` was taken."""
    if not isinstance(part[0], bytes):
        return part
    position, *words = struct.unpack(_PYTHON_WORDS, part[0])
    return 3, (*words, position), part[1]


_PYTHON_WORDS = "=i624I"  # int index; uint32_t state[624]
_PYTHON_MEMORY = _python_memory()


class _PythonState:
    """Python's global generator: its words as bytes, and the number kept by `random.gauss`."""

    part: Any
    """Words and kept number; where they are not found, what `random.getstate` returns."""

    def capture(self) -> None:
        if _PYTHON_MEMORY is None:
            self.part = random.getstate()
        else:
            self.part = _PYTHON_MEMORY.tobytes(), random._inst.gauss_next  # type: ignore[attr-defined]

    def install(self) -> None:
        if _PYTHON_MEMORY is None:
            random.setstate(self.part)
        else:
            _PYTHON_MEMORY[:], random._inst.gauss_next = self.part  # type: ignore[attr-defined]

    def load(self, state: Any) -> None:
        _, (*words, position), kept = state
        self.part = state if _PYTHON_MEMORY is None else (struct.pack(_PYTHON_WORDS, position, *words), kept)


class _NumpyState:
    """NumPy's legacy global generator: a bit generator of this EST's own, and the number kept by Box-Muller."""

    def __init__(self) -> None:
        self._bits: Any = None
        self._seen = b""
        self._kept: dict[str, Any] | None = None  # the whole state while there is a kept number, else None

    def capture(self) -> None:
        current = mtrand.get_bit_generator()
        if current is not self._bits:
            self._adopt(current)
        # A number is kept only by a draw, and a draw moves the bit generator: no need to look if it did not move.
        seen = self._memory()
        if seen is None or seen != self._seen or self._kept is not None:
            state: Any = np.random.get_state(legacy=False)
            self._kept = state if state["has_gauss"] else None
            self._seen = seen or b""

    def install(self) -> None:
        mtrand.set_bit_generator(self._bits)
        if self._kept is not None:
            np.random.set_state(self._kept)

    def state(self) -> dict[str, Any]:
        return self._kept or {**self._bits.state, "has_gauss": 0, "gauss": 0.0}

    def part(self) -> tuple[str, Any, float | None]:
        """Kind of bit generator, its memory (MT19937) or state, and the number kept by Box-Muller."""
        kept = None if self._kept is None else float(self._kept["gauss"])
        if self._address is not None:
            return "MT19937", self._seen, kept
        return type(self._bits).__name__, _to_plain(self._bits.state), kept

    def load(self, state: dict[str, Any]) -> None:
        self._make(getattr(np.random, state["bit_generator"]))  # not the one that may be in use just now
        self._bits.state = state
        self._kept = state if state["has_gauss"] else None
        self._seen = self._memory() or b""

    def _adopt(self, current: Any) -> None:
        if type(self._bits) is not type(current):
            self._make(type(current))
        self._bits.state = current.state
        self._seen = b""

    def _make(self, kind: Any) -> None:
        self._bits = kind(0)
        self._address = self._bits.ctypes.state_address if kind is np.random.MT19937 else None

    def _memory(self) -> bytes | None:
        return None if self._address is None else ctypes.string_at(self._address, _MT19937_BYTES)


def _device_generator(device: torch.device) -> torch.Generator:
    torch.cuda.init()
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def find_module_generators(modules: Iterable[ModuleType]) -> dict[str, object]:
    """The generators that modules hold as globals, by `module.name`; an object with several names is listed once.

    Under DDP each rank has its own; here they are one object per process, unless passed to `Generators` as `extra`.
    Found are `random.Random`, `torch.Generator`, `numpy.random.Generator` and `numpy.random.RandomState`; the global
    generators of those libraries are left out, which `Generators` swaps anyway. Best effort: generators in containers,
    classes or closures are not seen.
    """
    seen = {id(random._inst), id(np.random.mtrand._rand), id(torch.default_generator)}  # type: ignore[attr-defined]
    seen.update(map(id, torch.cuda.default_generators))
    found: dict[str, object] = {}
    for module in modules:
        for name, value in sorted(vars(module).items()):
            if (
                isinstance(value, GENERATOR_KINDS)
                and id(value) not in seen
                and not isinstance(value, random.SystemRandom)
            ):
                seen.add(id(value))
                found[f"{module.__name__}.{name}"] = value
    return found


GENERATOR_KINDS = (random.Random, torch.Generator, np.random.Generator, np.random.RandomState)


def _get_state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.bit_generator.state


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, (torch.Generator, np.random.RandomState)):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


def generator_state(generator: Any) -> Any:
    """The state of a generator object of one of `GENERATOR_KINDS`: plain values or a tensor."""
    return _to_plain(_get_state(generator))


def set_generator_state(generator: Any, state: Any) -> None:
    """Put a state of `generator_state` back."""
    _set_state(generator, _from_plain(state))


def _to_plain(state: Any) -> Any:
    """Arrays and tuples as tagged lists, NumPy numbers as Python's."""
    if isinstance(state, dict):
        return {key: _to_plain(value) for key, value in state.items()}
    if isinstance(state, tuple):
        return ["tuple", *map(_to_plain, state)]
    if isinstance(state, np.ndarray):
        return ["array", state.dtype.name, *state.tolist()]
    if isinstance(state, torch.Tensor):
        return state.clone()
    return state.item() if isinstance(state, np.generic) else state


def _from_plain(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _from_plain(value) for key, value in state.items()}
    if isinstance(state, list):
        kind, *values = state
        return tuple(map(_from_plain, values)) if kind == "tuple" else np.array(values[1:], dtype=values[0])
    return state.clone() if isinstance(state, torch.Tensor) else state
