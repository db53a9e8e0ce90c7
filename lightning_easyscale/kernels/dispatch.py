"""The `portable` policy in torch's dispatcher: what torch's kernels compute anyway costs nothing.

A dispatch mode is asked about every operation, for some microseconds of Python, and most are views and copies. The
dispatcher has a key below autograd and autocast and above torch's kernels and dispatch modes that torch does not use:
``Fake``. Under it every operation is registered once per process: exact ones, and those composed of others, fall
through without a call; those of the format are Python functions; a fallback refuses what is left. The policy is in
force in a thread while its key is included there; autograd carries included keys into the threads of a backward pass,
as it does dispatch modes.

Where a torch uses the key itself the policy is in force as a dispatch mode instead (`mode.PortableMode`), with equal
bits.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import torch

from .mode import Plan, PortableMode, common_paths, compute, how_covered, plan_of

_NAME = "Fake"
_KEY = torch._C._dispatch_key_parse(_NAME)
_include = torch._C._dispatch_tls_set_dispatch_key_included
_exclude = torch._C._dispatch_tls_set_dispatch_key_excluded
_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key

_allowed: Counter[str] = Counter()
_libraries: list[torch.library.Library] = []
_lock = threading.Lock()


class _Heard(Counter[str]):
    """A list of what is allowed that counts what it is asked about, and allows what would be refused."""

    def __contains__(self, name: object) -> bool:
        self[str(name)] += 1
        return not how_covered(str(name))


def available() -> bool:
    """Whether this torch leaves the key to others."""
    return bool(_libraries) or not torch._C._dispatch_has_backend_fallback(_KEY)


class _Here(threading.local):
    """How often the policy is in force in this thread."""

    depth = 0


_here = _Here()


class PortableDispatch(AbstractContextManager[None]):
    """The policy in force in the thread that enters; see `mode.PortableMode` for what is computed.

    It may be left by another thread, when the one that entered is gone; nothing changes in the other one then.

    Args:
        allow: names of operations (``aten::cumsum``) that keep torch's kernels although nothing vouches for their bits,
            in all threads in which the policy is in force meanwhile.
    """

    def __init__(self, *, allow: Iterable[str] = ()) -> None:
        self._allow = tuple(allow)
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        with _lock:
            if not _libraries:
                _register()
            _allowed.update(self._allow)
        self._thread = threading.current_thread()
        _here.depth += 1
        _include(_KEY, True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is threading.current_thread():
            _here.depth -= 1
            _include(_KEY, _here.depth > 0)
        with _lock:
            for name in self._allow:
                _allowed[name] -= 1
                if not _allowed[name]:
                    del _allowed[name]


def put_in_force(*, allow: Iterable[str] = ()) -> AbstractContextManager[Any]:
    """The policy for the time of a ``with`` block, in this thread; `allow` as for `PortableDispatch`."""
    return PortableDispatch(allow=allow) if available() else PortableMode(allow=allow)


@contextmanager
def portable(*, allow: Iterable[str] = ()) -> Iterator[None]:
    """Compute by the format for the time of a ``with`` block, in this thread; `allow` as for `PortableDispatch`.

    Attention has the bits of its composed form and normalization takes torch's own path, so that devices agree.
    """
    with common_paths(), put_in_force(allow=allow):
        yield


def _register() -> None:
    fallback, operations = torch.library.Library("_", "IMPL", _NAME), torch.library.Library("aten", "IMPL", _NAME)
    fallback.fallback(_not_registered, _NAME)
    for full in torch._C._dispatch_get_all_op_names():
        space, _, name = full.partition("::")
        if space != "aten":
            continue
        if _has_kernel(full, "CompositeImplicitAutograd") and not _has_kernel(full, "CPU"):
            operations.impl(name, torch.library.fallthrough_kernel, _NAME)
            continue
        base, _, overload = name.partition(".")
        operation = getattr(getattr(torch.ops.aten, base), overload or "default")
        plan = plan_of(operation)
        if plan.function is not None:
            operations.impl(name, _kernel(plan), _NAME)
        elif not plan.refusal:
            operations.impl(name, torch.library.fallthrough_kernel, _NAME)
    _libraries.extend((fallback, operations))


def _kernel(plan: Plan) -> Callable[..., Any]:
    """An operation of the format, as the dispatcher calls it; what it calls itself is torch's."""

    def call(*args: Any, **kwargs: Any) -> Any:
        _exclude(_KEY, True)
        try:
            return compute(plan, args, kwargs, _allowed)
        finally:
            _exclude(_KEY, False)

    return call


def _not_registered(operation: Any, *args: Any, **kwargs: Any) -> Any:
    _exclude(_KEY, True)
    try:
        return compute(plan_of(operation), args, kwargs, _allowed)
    finally:
        _exclude(_KEY, False)


def audit(function: Callable[[], Any]) -> dict[str, tuple[int, str]]:
    """Run `function` twice and report every operation it called.

    A dispatch mode sees all of them. But torch computes some gradients in other ways where there is none, so what is
    called in a run, and not exact, is added.

    Returns:
        For each name the number of calls and how it is covered: ``"exact"`` (torch's kernel, one rounding or none),
        ``"format"`` (a kernel of the format) or ``""`` (refused under the policy).
    """
    global _allowed
    mode = PortableMode(audit=True)
    with common_paths(), mode:
        function()
    seen = mode.seen
    if available():
        before, _allowed = _allowed, _Heard()
        try:
            with portable():
                function()
            seen |= _allowed
        finally:
            _allowed = before
    return {name: (calls, how_covered(name)) for name, calls in sorted(seen.items())}
