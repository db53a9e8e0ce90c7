"""Calls of attention under test: composed, and as CUDA's dispatch makes them."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_easyscale.kernels import portable

from .cases import same_bits


@dataclass(frozen=True)
class Attention:
    """A call.

    Args:
        shape: batch, heads, queries, keys, and the sizes of a key and of a value.
        mask: which is added: none, ``bool``, ``float``, or ``trained``, which gets a gradient.
        mask_shape: sizes of 1 are broadcast; in front, dimensions may be missing.
        special: zeros, infinities, NaN and denormal numbers among operands.
    """

    shape: tuple[int, int, int, int, int, int]
    mask: str = ""
    mask_shape: tuple[int, ...] = ()
    causal: bool = False
    dropout: float = 0.0
    scale: float | None = None
    groups: int = 1
    dtype: torch.dtype = torch.float32
    special: bool = False

    @property
    def title(self) -> str:
        """What tells it from others."""
        b, h, queries, keys, size, value = self.shape
        extras = [self.mask and f"{self.mask} mask {list(self.mask_shape)}", self.causal and "causal"]
        extras += [self.dropout and f"dropout {self.dropout}", self.scale is not None and f"scale {self.scale}"]
        extras += [self.groups > 1 and f"{self.groups} groups", self.special and "special values"]
        extras += [self.dtype != torch.float32 and str(self.dtype).removeprefix("torch.")]
        return " ".join([f"{b}x{h}, {queries} to {keys}, {size} and {value}", *(e for e in extras if e)])

    def operands(self, seed: int = 0) -> list[Tensor]:
        """q, k, v, the result's gradient, and the mask if there is one."""
        g = torch.Generator().manual_seed(seed)
        b, h, queries, keys, size, value = self.shape
        shapes = [(b, h, queries, size), (b, h // self.groups, keys, size), (b, h // self.groups, keys, value)]
        made = [torch.randn(shape, generator=g) for shape in (*shapes, (b, h, queries, value))]
        if self.special:
            for x in made:
                for what in (0.0, -0.0, 1e-41, -3e-42, 1e-30, 3e38):
                    x[torch.rand(x.shape, generator=g) < 0.03] = what
            made[1][-1, -1, 0, 0], made[0][0, 0, -1, 0], made[2][0, -1, 0, -1] = math.inf, math.nan, -math.inf
            made[0][-1, -1, 0, 0] = 0.0  # NaN with that key; a mask takes the others away
        if self.mask == "bool":
            mask = torch.rand(self.mask_shape, generator=g) < 0.6
            mask[..., 0, :] = False  # a query that sees no key
            made.append(mask)
        elif self.mask:
            mask = torch.randn(self.mask_shape, generator=g) * 3
            mask[torch.rand(mask.shape, generator=g) < 0.2] = -math.inf
            mask[..., 0, :] = -math.inf
            made.append(mask)
        return [x if x.dtype == torch.bool else x.to(self.dtype) for x in made]

    def run(self, device: str = "cpu", *, whole: bool = False, composed: bool = False) -> list[Tensor]:
        """Result, gradients, and what the CPU's generator draws next, under the policy.

        Args:
            device: where.
            whole: call the operation that CUDA's dispatch calls, as it is called.
            composed: leave CUDA's dispatch no such operation.
        """
        moved = [x.to(device) for x in self.operands()]
        leaves = [x.requires_grad_() for x in moved[:3]]
        mask = moved[4] if self.mask else None
        if self.mask == "trained":
            leaves.append(moved[4].requires_grad_())
        torch.manual_seed(5)
        with portable(), sdpa_kernel(SDPBackend.MATH) if composed else nullcontext():
            made = (attend if whole else _composed)(*moved[:3], mask, self)
            gradients = torch.autograd.grad(made, leaves, moved[3])
        return [x.detach().cpu() for x in (made, *gradients)] + [torch.rand(3)]


def _composed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: Attention) -> Tensor:
    """As users call it: on CUDA it may be one operation, on the CPU it is not."""
    return F.scaled_dot_product_attention(
        q, k, v, mask, call.dropout, call.causal, scale=call.scale, enable_gqa=call.groups > 1
    )


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: Attention) -> Tensor:
    """As torch calls its memory efficient backend: masks are numbers, padded to whole vectors, and expanded."""
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask.logical_not(), -math.inf)
        if missing := -mask.shape[-1] % 8:
            mask = F.pad(mask, (0, missing))[..., : mask.shape[-1]]
        mask = mask.expand(*q.shape[:3], k.shape[2])
    made: Any = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, mask, True, call.dropout, call.causal, scale=call.scale
    )
    out: Tensor = made[0]
    return out


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two runs have the same bits."""
    return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))


ATTENTION = [
    Attention((2, 3, 17, 17, 8, 8)),
    Attention((1, 1, 1, 1, 4, 4)),
    Attention((0, 2, 5, 5, 8, 8), dropout=0.1),
    Attention((1, 2, 1, 33, 4, 8), dropout=0.3),
    Attention((1, 2, 5, 1, 16, 4), dropout=0.1),
    Attention((2, 3, 48, 48, 64, 64), "bool", (2, 1, 1, 48), dropout=0.1),
    Attention((2, 2, 24, 40, 8, 8), "bool", (2, 1, 24, 40), dropout=0.1),
    Attention((2, 2, 23, 129, 8, 12), "float", (2, 1, 23, 129), dropout=0.1),
    Attention((2, 4, 30, 31, 8, 8), "float", (30, 31)),
    Attention((2, 2, 16, 16, 8, 8), "float", (2, 2, 16, 1)),
    Attention((3, 2, 16, 16, 8, 8), "trained", (1, 2, 16, 16), dropout=0.2),
    Attention((2, 2, 9, 13, 8, 8), "trained", (2, 2, 9, 13)),
    Attention((2, 2, 9, 13, 8, 8), "trained", (1, 13)),
    Attention((2, 3, 17, 17, 8, 8), causal=True, dropout=0.1),
    Attention((1, 2, 20, 12, 8, 8), causal=True),
    Attention((1, 2, 12, 140, 8, 8), causal=True, dropout=0.5),
    Attention((2, 2, 13, 13, 8, 8), dropout=1.0),
    Attention((2, 2, 13, 13, 8, 8), scale=0.3),
    Attention((2, 2, 13, 13, 8, 8), scale=-0.3, dropout=0.1),
    Attention((2, 2, 13, 13, 8, 8), scale=0.0),
    Attention((2, 6, 13, 15, 8, 8), groups=3, dropout=0.1),
    Attention((2, 2, 33, 140, 8, 8), "float", (2, 1, 33, 140), special=True, dropout=0.1),
    Attention((2, 2, 33, 33, 8, 8), causal=True, special=True),
    Attention((1, 1, 300, 700, 4, 4), dropout=0.1),
    Attention((1, 1, 12, 1030, 4, 4), "float", (12, 1030), dropout=0.1),
    Attention((1, 2, 6, 4096, 4, 4), "bool", (1, 2, 6, 4096), dropout=0.1),
    Attention((1, 1, 5, 9000, 4, 4), "float", (1, 9000), dropout=0.1),
    Attention((1, 1, 4500, 7, 4, 4), dropout=0.1, causal=True),
    *(
        Attention((2, 2, 24, 40, 16, 16), mask, shape, dropout=0.1, dtype=dtype)
        for dtype in (torch.bfloat16, torch.float16)
        for mask, shape in (("", ()), ("bool", (2, 1, 1, 40)), ("trained", (1, 2, 24, 40)))
    ),
]
