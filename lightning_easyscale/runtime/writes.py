"""In-place changes of shared parameters outside the optimizer: made once, when every EST has come to them.

DDP's ranks each hold a replica and each change it: weights that are clamped after a step, swapped for their average
before validation, perturbed, re-initialised, loaded. The ESTs of an executor share one replica, of which such a change
must be made once, and not before the slowest of them has passed all code that comes before it.

So while an EST runs user code, a `TorchFunctionMode` looks at every operation that writes. One that writes into a
shared parameter is a rendezvous of the executor's ESTs; then the lead, which runs first, does it, and the others leave
it out (they still draw the random numbers that it draws). Forward and backward of automatic optimization and
`optimizer.step` are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode

_OPERATORS = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
_NO_WRITE = {"requires_grad_", "detach_", "share_memory_", "rename_", "refine_names_", "retain_grad_"}
_RANDOM = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_", "cauchy_", "geometric_", "log_normal_"}


def has_compiled(module: torch.nn.Module) -> bool:
    """Whether some part of `module` was compiled by `torch.compile`."""
    return any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in module.modules())


class SharedStorages:
    """The memory of the parameters that the ESTs of an executor share."""

    def __init__(self) -> None:
        self._parameters: list[torch.nn.Parameter] = []
        self._addresses: frozenset[int] = frozenset()
        self.replacement: Tensor | None = None  # the lead's last; the next one waits for the others to have taken it

    def set(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """These are the lead's parameters from now on."""
        self._parameters = list(parameters)
        self._addresses = frozenset(filter(None, (p.untyped_storage().data_ptr() for p in self._parameters)))

    def refresh(self) -> None:
        """The lead's parameters have got other memory."""
        self.set(self._parameters)

    def __contains__(self, tensor: object) -> bool:
        return (
            isinstance(tensor, Tensor)
            and tensor.layout is torch.strided
            and tensor.untyped_storage().data_ptr() in self._addresses
        )


class ParameterWrites(TorchFunctionMode):
    """Guards the shared parameters while one EST runs.

    Args:
        shared: the parameters that the executor's ESTs share.
        is_lead: whether this EST's writes are the ones that count.
        meet: waits for the executor's ESTs.
    """

    def __init__(
        self,
        shared: SharedStorages,
        *,
        is_lead: bool,
        meet: Callable[[str], None],
    ) -> None:
        super().__init__()
        self._shared = shared
        self._is_lead = is_lead
        self._meet = meet
        self._on = False
        self._pushed = False

    @contextmanager
    def watching(self, on: bool) -> Iterator[None]:
        """Look at writes, or do not, inside the block."""
        before = self._on
        self._switch(on)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, on: bool) -> None:
        self._on = on
        if on and not self._pushed:
            self.__enter__()
            self._pushed = True
        elif not on and self._pushed and _get_current_function_mode() is self:
            # Taken off, it costs nothing; below another mode it stays and lets everything pass.
            self.__exit__(None, None, None)
            self._pushed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._on:
            name = getattr(func, "__name__", "")
            if name == "__set__":
                if getattr(func, "__self__", None) is Tensor.data and args[0] in self._shared:
                    return self._replace(func, args)
            elif name == "__setitem__" or name in _OPERATORS or (name[-1:] == "_" and name[:2] != "__"):
                if name not in _NO_WRITE and self._writes(_target(args, kwargs)):
                    return self._write(name, func, args, kwargs)
            elif kwargs.get("out") is not None and self._writes(kwargs["out"]):
                return self._write(name, func, args, kwargs, target=kwargs["out"])
        return func(*args, **kwargs)

    def _writes(self, target: Any) -> bool:
        if isinstance(target, (list, tuple)):
            return any(t in self._shared for t in target)
        return target in self._shared

    def _write(self, name: str, func: Any, args: Any, kwargs: Any, target: Any = None) -> Any:
        target = _target(args, kwargs) if target is None else target
        with self.watching(False):
            self._meet(f"write to parameters ({name})")
            if self._is_lead:
                return func(*args, **kwargs)
            if name in _RANDOM:
                scratch = torch.empty_like(target)
                func(*(scratch if a is target else a for a in args), **_replaced(kwargs, target, scratch))
        return target if isinstance(target, Tensor) else None

    def _replace(self, func: Any, args: Any) -> None:
        parameter, value = args
        with self.watching(False):
            self._meet("replacement of a parameter's data")
            if self._is_lead:
                func(parameter, value)
                self._shared.replacement = parameter.data
                self._shared.refresh()
            else:
                func(parameter, self._shared.replacement)


def _target(args: Any, kwargs: Any) -> Any:
    return args[0] if args else kwargs.get("tensor", kwargs.get("self", kwargs.get("input")))


def _replaced(kwargs: dict[str, Any], target: Any, scratch: Tensor) -> dict[str, Any]:
    return {key: scratch if value is target else value for key, value in kwargs.items()}
