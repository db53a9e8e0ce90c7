"""The `portable` policy in force: a dispatch mode under which every operation is of the format, or is refused.

The mode sits below autograd and autocast and above torch's kernels. It is the property of a thread, as dispatch modes
are, and autograd carries it into the threads of a backward pass. Data workers are left alone: what they compute reaches
every device as data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import get_worker_info

from .lists import on_lists
from .registry import EXACT, RANDOM, REPLACED

_FOREACH = "aten::_foreach_"
# Operations of the format that torch's kernels compute exactly on whole numbers, with a whole result.
_WHOLE = frozenset(f"aten::{name}" for name in ("add", "sub", "rsub", "index_add", "scatter_add", "index_put"))
_WIDE = (torch.float64, torch.complex64, torch.complex128)


class UnvettedOperationError(RuntimeError):
    """Under D2's `portable` policy an operation was called whose bits may differ between devices."""


def how_covered(name: str) -> str:
    """How the policy computes an operation: ``"exact"``, ``"format"`` or, where it has no answer, ``""``.

    Args:
        name: as in a schema, without overload, for example ``aten::mm`` or ``aten::mul_``.
    """
    if not name.startswith("aten::"):
        return "exact"  # communication and the like: no arithmetic of a device
    for known in (name, name.removesuffix("_")):
        if known in REPLACED:
            return "format"
        if known in EXACT:
            return "exact"
    if name.startswith(_FOREACH):
        return how_covered(_single(name))
    return ""


def _single(name: str) -> str:
    """The operation on one tensor that a ``_foreach`` operation repeats."""
    single = name.removesuffix("_").removeprefix(_FOREACH)
    return "aten::linalg_vector_norm" if single == "norm" else f"aten::{single}"


@cache
def _plan(func: Any) -> tuple[str, Callable[..., Any] | None]:
    """The name of an operation and what computes it, None for torch's own kernel.

    Raises:
        UnvettedOperationError: for an operation that is not on the list.
    """
    name = func._schema.name
    if not name.startswith("aten::") or func.is_view:
        return name, None
    if name in REPLACED:
        return name, REPLACED[name]
    base = name.removesuffix("_")
    if name in EXACT or base in EXACT:
        return name, None
    if base in REPLACED:
        return name, _in_place(REPLACED[base])
    if name.startswith(_FOREACH) and how_covered(name):
        single = _single(name)
        return name, on_lists(single.removeprefix("aten::"), REPLACED[single], in_place=name.endswith("_"))
    raise UnvettedOperationError(
        f"`{name}` is not on the list of operations whose bits D2's `portable` policy vouches for."
        f" HINT: replace it, or accept its bits with `allow=[{name!r}]`."
    )


def _in_place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def apply(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x.copy_(function(x, *args, **kwargs))

    return apply


class PortableMode(TorchDispatchMode):
    """Computes every operation by the format; see the package's docstring.

    Args:
        allow: names of operations (``aten::cumsum``) that keep torch's kernels although nothing vouches for their bits.
        audit: collect what is called instead of refusing it.

    Attributes:
        seen: calls of each operation so far, by name, when auditing.
    """

    def __init__(self, *, allow: Iterable[str] = (), audit: bool = False) -> None:
        super().__init__()
        self.allow = frozenset(allow)
        self.audit = audit
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute one operation."""
        kwargs = kwargs or {}
        if get_worker_info() is not None:
            return func(*args, **kwargs)
        name = func._schema.name
        if self.audit:
            self.seen[name] += 1
        if name in self.allow:
            return func(*args, **kwargs)
        try:
            function = _plan(func)[1]
        except UnvettedOperationError:
            tensors = _tensors(args, kwargs)
            if self.audit or (tensors and not any(x.is_floating_point() or x.is_complex() for x in tensors)):
                return func(*args, **kwargs)  # whole numbers are exact in any order
            raise
        if function is None or _untouched(args, kwargs, name):
            return func(*args, **kwargs)
        out = kwargs.pop("out", None) if "out" in kwargs else None
        made = function(*args, **kwargs)
        if out is None:
            return made
        return out.resize_(made.shape).copy_(made)


def _untouched(args: Any, kwargs: Any, name: str) -> bool:
    """Whether an operation of the format is called on data that is exact anyway: whole numbers, or no device at all."""
    if name in RANDOM:
        return False
    leaves = _tensors(args, kwargs)
    if any(x.is_meta for x in leaves):
        return True
    wide = [x for x in leaves if x.dtype in _WIDE and x.dim() > 0]
    if wide:
        raise NotImplementedError(
            f"`{name}` was called on {str(wide[0].dtype).removeprefix('torch.')}, for which D2's `portable` policy has"
            f" no kernels. HINT: use float32, or accept torch's bits with `allow=[{name!r}]`."
        )
    whole = bool(leaves) and not any(x.is_floating_point() for x in leaves)
    return whole and name.removesuffix("_") in _WHOLE


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among an operation's arguments; it is called for every operation, so not by pytrees."""
    found = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(x for x in value if isinstance(x, Tensor))
    return found


@contextmanager
def portable(*, allow: Iterable[str] = ()) -> Iterator[PortableMode]:
    """Compute by the format for the time of a ``with`` block, in this thread.

    Attention is computed by its composed form and normalization by torch's own path, so that every device calls the
    same operations.
    """
    with common_paths(), PortableMode(allow=allow) as mode:
        yield mode


@contextmanager
def common_paths() -> Iterator[None]:
    """Process-wide switches under which CPU and CUDA call the same operations."""
    cuda, mha = torch.backends.cuda, torch.backends.mha
    switches: list[tuple[Callable[[bool], None], bool, bool]] = [
        (cuda.enable_flash_sdp, cuda.flash_sdp_enabled(), False),
        (cuda.enable_mem_efficient_sdp, cuda.mem_efficient_sdp_enabled(), False),
        (cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled(), False),
        (cuda.enable_math_sdp, cuda.math_sdp_enabled(), True),
        (mha.set_fastpath_enabled, mha.get_fastpath_enabled(), False),
    ]
    cudnn, mkldnn = torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled
    for switch, _, wanted in switches:
        switch(wanted)
    torch.backends.cudnn.enabled = False
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for switch, before, _ in switches:
            switch(before)
        torch.backends.cudnn.enabled = cudnn
        torch.backends.mkldnn.enabled = mkldnn  # type: ignore[assignment]


def audit(function: Callable[[], Any]) -> dict[str, tuple[int, str]]:
    """Run `function` and report every operation it called.

    Returns:
        For each name the number of calls and how it is covered: ``"exact"`` (torch's kernel, one rounding or none),
        ``"format"`` (a kernel of the format) or ``""`` (refused under the policy).
    """
    mode = PortableMode(audit=True)
    with common_paths(), mode:
        function()
    return {name: (calls, how_covered(name)) for name, calls in sorted(mode.seen.items())}
