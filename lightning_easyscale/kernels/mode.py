"""What the `portable` policy does with every operation, and a dispatch mode that does it.

The policy sits below autograd and autocast and above torch's kernels. It is the property of a thread, and autograd
carries it into the threads of a backward pass. Data workers are left alone: what they compute reaches every device as
data. The mode sees every operation, which an audit needs; a run has the policy in force in a cheaper way
(`dispatch.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import get_worker_info

from .lists import one_by_one, together
from .registry import COMMUNICATION, EXACT, RANDOM, REPLACED

_FOREACH = "aten::_foreach_"
# Operations of the format that torch's kernels compute exactly on whole numbers, with a whole result.
_WHOLE = frozenset(f"aten::{name}" for name in ("add", "sub", "rsub", "index_add", "scatter_add", "index_put"))
_WIDE = (torch.float64, torch.complex64, torch.complex128)
_NARROW = {torch.float32, torch.bfloat16, torch.float16}


class UnvettedOperationError(RuntimeError):
    """Under D2's `portable` policy an operation was called whose bits may differ between devices."""


def how_covered(name: str) -> str:
    """How the policy computes an operation: ``"exact"``, ``"format"`` or, where it has no answer, ``""``.

    Args:
        name: as in a schema, without overload, for example ``aten::mm`` or ``aten::mul_``.
    """
    if name.partition("::")[0] in COMMUNICATION:
        return "exact"
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


class Plan(NamedTuple):
    """What is done when an operation is called.

    Args:
        name: of the operation, without overload.
        torchs: torch's own kernel.
        function: what computes it instead, None for torch's kernel.
        refusal: why it is refused, if it is.
        together: computes lists of tensors at once, or returns NotImplemented; takes arguments and keyword arguments.
    """

    name: str
    torchs: Callable[..., Any]
    function: Callable[..., Any] | None = None
    refusal: str = ""
    together: Callable[[Any, Any], Any] | None = None


# By the overload's id, as its hash is Python code; overloads live as long as the process.
_plans: dict[int, Plan] = {}


def plan_of(func: Any) -> Plan:
    """What is done when an overload is called."""
    return _plans.get(id(func)) or _plan(func)


def _plan(func: Any) -> Plan:
    name = func._schema.name
    torchs = func._op if type(func) is torch._ops.OpOverload else func
    base = name.removesuffix("_")
    plan = Plan(name, torchs)
    if func.is_view or (not name.startswith("aten::") and _makes_no_tensor(func._schema)):
        pass
    elif name in REPLACED:
        plan = Plan(name, torchs, REPLACED[name])
    elif base in REPLACED:
        plan = Plan(name, torchs, _in_place(REPLACED[base]))
    elif how_covered(name) == "exact":
        pass
    elif name.startswith(_FOREACH) and how_covered(name):
        single, in_place = _single(name), name.endswith("_")
        bare = single.removeprefix("aten::")
        function = one_by_one(bare, REPLACED[single], in_place=in_place)
        plan = Plan(name, torchs, function, together=together(bare, in_place=in_place))
    else:
        refusal = (
            f"`{name}` is not on the list of operations whose bits D2's `portable` policy vouches for."
            f" HINT: replace it, or accept its bits with `allow=[{name!r}]`."
        )
        plan = Plan(name, torchs, refusal=refusal)
    _plans[id(func)] = plan
    return plan


def _makes_no_tensor(schema: Any) -> bool:
    """Whether an operation, say one that tells a library's version, neither returns a tensor nor changes one."""
    written = any(argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments)
    return not written and not any("Tensor" in str(made.type) for made in schema.returns)


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

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Asked by torch: whether to turn its compiler off around each operation, for some microseconds.

        There is nothing to turn off: compiled modules are refused under D2.
        """
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute one operation."""
        plan = plan_of(func)
        kwargs = kwargs or {}
        if self.audit:
            self.seen[plan.name] += 1
            if plan.function is None:
                return plan.torchs(*args, **kwargs)
        return compute(plan, args, kwargs, self.allow)


def compute(plan: Plan, args: Any, kwargs: Any, allow: Container[str]) -> Any:
    """One operation under the policy; what it calls itself is torch's.

    Args:
        plan: of the operation.
        args: of its call.
        kwargs: likewise.
        allow: names of operations that keep torch's kernels.

    Raises:
        UnvettedOperationError: for an operation that is not on the list.
    """
    name, torchs, function, refusal, at_once = plan
    if (function is None and not refusal) or get_worker_info() is not None or name in allow:
        return torchs(*args, **kwargs)
    if function is None:
        tensors = _tensors(args, kwargs)
        if tensors and not any(x.is_floating_point() or x.is_complex() for x in tensors):
            return torchs(*args, **kwargs)  # whole numbers are exact in any order
        raise UnvettedOperationError(refusal)
    if at_once is not None and (made := at_once(args, kwargs)) is not NotImplemented:
        return made
    if not _narrow(args, kwargs) and _untouched(args, kwargs, name):
        return torchs(*args, **kwargs)
    out = kwargs.pop("out", None) if "out" in kwargs else None
    made = function(*args, **kwargs)
    if out is None:
        return made
    return out.resize_(made.shape).copy_(made)


def _narrow(args: Any, kwargs: Any) -> bool:
    """Whether the tensors among an operation's arguments, one at least, are plainly the format's; quick to say."""
    some = False
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            if value.dtype not in _NARROW or value.is_meta:
                return False
            some = True
        elif isinstance(value, (list, tuple)) and value and not isinstance(value[0], (int, float)):
            return False
    return some


def _untouched(args: Any, kwargs: Any, name: str) -> bool:
    """Whether an operation of the format is called on data that is exact anyway: whole numbers, or no device at all."""
    if name in RANDOM:
        return False
    leaves = _tensors(args, kwargs)
    types = {x.dtype for x in leaves}
    if any(x.is_meta for x in leaves):
        return True
    if types <= _NARROW:
        return False
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
        elif isinstance(value, (list, tuple)) and value and not isinstance(value[0], (int, float)):
            found.extend([x for x in value if isinstance(x, Tensor)])
    return found


@contextmanager
def common_paths() -> Iterator[None]:
    """Process-wide switches under which CPU and CUDA call the same operations.

    But for attention: CUDA calls its memory efficient form, which has a kernel with the bits of the composed form.
    """
    cuda, mha = torch.backends.cuda, torch.backends.mha
    switches: list[tuple[Callable[[bool], None], bool, bool]] = [
        (cuda.enable_flash_sdp, cuda.flash_sdp_enabled(), False),
        (cuda.enable_mem_efficient_sdp, cuda.mem_efficient_sdp_enabled(), True),
        (cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled(), False),
        (cuda.enable_math_sdp, cuda.math_sdp_enabled(), True),
        (cuda.allow_fp16_bf16_reduction_math_sdp, cuda.fp16_bf16_reduction_math_sdp_allowed(), False),
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
