"""A mode that computes every operation twice, on the device it is called on and on the CPU, and notes other bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_easyscale.kernels import PortableMode

from .cases import difference, same_bits

_UNDEFINED = ("empty", "resize", "set_", "record_stream", "_local_scalar_dense")


class Mirror(PortableMode):
    """The portable policy, checked operation by operation on the operands that a real model gives.

    Attributes:
        found: a line for each operation whose results differ, with its operands' shapes and the first bits.
        calls: operations compared.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute and compare one operation."""
        kwargs = kwargs or {}
        name = func._schema.name
        if func.is_view or any(word in name for word in _UNDEFINED):
            return super().__torch_dispatch__(func, types, args, kwargs)
        mirrored = tree_map(_on_cpu, (args, kwargs))
        before = torch.get_rng_state()
        made = super().__torch_dispatch__(func, types, args, dict(kwargs))
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        expected = super().__torch_dispatch__(func, types, mirrored[0], dict(mirrored[1]))
        torch.set_rng_state(after)
        self.calls += 1
        # Operands too: some operations change them in place.
        pairs = zip(tree_leaves((expected, mirrored)), tree_leaves((made, (args, kwargs))), strict=True)
        for cpu, device in pairs:
            if isinstance(cpu, Tensor) and not _equal(cpu, device.detach().cpu()):
                shapes = [list(x.shape) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
                numbers = [x for x in tree_leaves((args, kwargs)) if isinstance(x, (int, float))]
                self.found.append(f"{func} of {shapes} {numbers}: {difference(cpu, device.detach().cpu())}")
        return made


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _equal(a: Tensor, b: Tensor) -> bool:
    floating = a.is_floating_point() and a.element_size() in (2, 4)
    return same_bits(a, b) if floating else torch.equal(a, b)
