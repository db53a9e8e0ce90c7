"""Attention as CUDA calls it, with the bits of the composed form and without its tensors of queries times keys.

Under the policy the CPU composes attention: q and k are scaled by the root of the scale; a product, the sum with a
mask, a softmax, dropout and another product follow, each by the format (`reductions.py`, `random.py`). On CUDA torch's
memory efficient backend is left on, because it hands attention over as one operation, and so is its backward. Both are
computed here, with the composed form's roundings in its order.

Scores, weights and their gradients are made for as many heads at a time, or queries of a head, as fit into a piece of
fixed size. Products are those of `primitives.py`, and what lies between them, which is elementwise or a sum over keys,
is one kernel in place (`cuda_attention.py`). The backward pass makes scores anew. To make more of it anew would
cost time: without tensor cores a product with a head of 64 takes five times what it takes to store the result and load
it. Gradients of keys and values are sums over queries; a piece's part of them is whole segments.

Random numbers are keyed by the element's index among all weights, as for `random.dropout`, and the key travels to the
backward pass as the operation's seed. What the backend refuses (sizes of heads that are no multiples of 4, say), and
what is called with it turned off, for example to take second derivatives, is composed on CUDA too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import primitives, random
from .arithmetic import divide
from .primitives import BLOCK, SEGMENT
from .reductions import safe_softmax, softmax_backward, tree_sum

_PIECE = 1 << 24
"""Elements of scores that are there at once, unless a segment of queries has more."""


@dataclass(frozen=True)
class Rows:
    """Some queries of some heads, and what becomes of their scores.

    Args:
        units: which heads, numbered through all batches.
        rows: which queries, all of them where there are several heads.
        queries: how many a head has.
        heads: how many a batch has.
        bias: ``[batch, heads, queries, keys]``, added to scores; may be expanded.
        causal: whether a query sees no later keys.
        dropout: the part of the weights that is dropped.
        key: of the random numbers.
    """

    units: slice
    rows: slice
    queries: int
    heads: int
    bias: Tensor | None
    causal: bool
    dropout: float
    key: int

    @property
    def first(self) -> int:
        """The first row, numbered through all heads."""
        return int(self.units.start) * self.queries + int(self.rows.start)

    def of(self, x: Tensor) -> Tensor:
        """Their part of ``[all heads, queries, *]``."""
        return x[self.units, self.rows]


@dataclass(frozen=True)
class _Call:
    """The operands of a call."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    dropout: float
    causal: bool
    scale: float | None

    @property
    def factors(self) -> tuple[float, float]:
        """What q and k are multiplied by."""
        scale = 1.0 / math.sqrt(self.q.shape[-1]) if self.scale is None else self.scale
        root = math.sqrt(abs(scale))
        return (-root if scale < 0 else root), root

    def dense(self, x: Tensor, factor: float = 1.0) -> Tensor:
        """``[batch, *, n, size]``, scaled, as dense fp32 ``[heads, n, size]``, a head's own where some share one."""
        x = x.float()
        if factor != 1:
            x = torch.mul(x, factor, out=x.new_empty(x.shape))
        if x.shape[1] != self.q.shape[1]:
            x = x.repeat_interleave(self.q.shape[1] // x.shape[1], 1)
        return x.reshape(-1, *x.shape[2:]).contiguous()

    def scaled(self) -> tuple[Tensor, Tensor]:
        """Dense q and k, scaled."""
        first, second = self.factors
        return self.dense(self.q, first), self.dense(self.k, second)

    def pieces(self, key: int) -> Iterator[Rows]:
        """All rows, in ascending order."""
        units, queries, keys = self.q.shape[0] * self.q.shape[1], self.q.shape[2], self.k.shape[2]
        size, rows = 1, max(1, queries)
        if queries * keys <= _PIECE:
            size = max(1, -(-units // max(1, -(-units * queries * keys // _PIECE))))
        else:
            rows = SEGMENT
            while rows < BLOCK and 2 * rows * keys <= _PIECE:
                rows *= 2
        rest = (queries, self.q.shape[1], self.bias, self.causal, self.dropout, key)
        for unit in range(0, units, size):
            for row in range(0, queries, rows):
                yield Rows(slice(unit, min(units, unit + size)), slice(row, min(queries, row + rows)), *rest)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``aten::_scaled_dot_product_efficient_attention``: result, an empty tensor, key of the random numbers, and 0."""
    call = _Call(q, k, v, bias, dropout, causal, scale)
    some = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] > 0
    key = random.draw_key() if some and 0 < dropout < 1 else 0
    (scaled_q, scaled_k), values = call.scaled(), call.dense(v)
    parts = []
    for rows in call.pieces(key):
        weights = _weights(primitives.matmul(rows.of(scaled_q), scaled_k[rows.units].mT), rows)
        parts.append(primitives.matmul(weights, values[rows.units]))
    made = _joined(parts, values.new_zeros(0)).view(*q.shape[:3], v.shape[-1])
    seed = torch.tensor(key - (1 << 64) if key >> 63 else key, device="cpu")
    return made.to(q.dtype), values.new_empty(*q.shape[:2], 0), seed, torch.zeros_like(seed)


def backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    log_sumexp: Tensor,
    seed: Tensor,
    offset: Tensor,
    dropout: float,
    output_mask: Sequence[bool],
    causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``aten::_scaled_dot_product_efficient_attention_backward``: gradients of q, k, v and what is added to scores."""
    call = _Call(q, k, v, bias, dropout, causal, scale)
    (scaled_q, scaled_k), values = call.scaled(), call.dense(v)
    dy = dy.float().reshape(-1, *dy.shape[2:]).contiguous()
    for_q, for_k, for_v, for_bias = output_mask
    dbias = dy.new_empty(dy.shape[0], q.shape[2], k.shape[2]) if for_bias and bias is not None else None
    parts: tuple[list[Tensor], ...] = ([], [], [])
    of_k, of_v = _Sum(), _Sum()
    for rows in call.pieces(int(seed) & 0xFFFFFFFFFFFFFFFF):
        queries, keys, gradients = rows.of(scaled_q), scaled_k[rows.units], rows.of(dy)
        dw = primitives.matmul(gradients, values[rows.units].mT)
        weights, ds = _weights_backward(primitives.matmul(queries, keys.mT), dw, rows)
        if for_q:
            parts[0].append(primitives.matmul(ds, keys))
        if for_k and (made := of_k.add(ds.mT, queries, rows)) is not None:
            parts[1].append(made)
        if for_v and (made := of_v.add(weights.mT, gradients, rows)) is not None:
            parts[2].append(made)
        if dbias is not None:
            rows.of(dbias).copy_(ds)
    dq, dk, dv = (_joined(*given) for given in zip(parts, (scaled_q, scaled_k, values), strict=True))
    first, second = call.factors
    return (
        _shared(dq * first, q) if for_q else None,
        _shared(dk * second, k) if for_k else None,
        _shared(dv, v) if for_v else None,
        None if dbias is None or bias is None else _of_bias(dbias.view(bias.shape), bias),
    )


def _joined(parts: list[Tensor], empty: Tensor) -> Tensor:
    """All heads or rows, of pieces; zeros like `empty` where there are none."""
    if not parts:
        return torch.zeros_like(empty)
    return parts[0] if len(parts) == 1 else torch.cat([x.flatten(0, 1) for x in parts])


class _Sum:
    """A product whose k runs over all queries of a head, of which a piece has some: segments and blocks ascend."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._block: Tensor | None = None

    def add(self, a: Tensor, b: Tensor, rows: Rows) -> Tensor | None:
        """The part of some queries, ``a @ b``; returns the sum with the last ones."""
        first, last = rows.rows.start, rows.rows.stop == rows.queries
        if first == 0:
            if last:
                return primitives.matmul(a, b)
            self._total = a.new_zeros(*a.shape[:-1], b.shape[-1])
        total = self._total
        assert total is not None
        for start in range(0, a.shape[-1], SEGMENT):
            segment = slice(start, start + SEGMENT)
            block = torch.zeros_like(total) if self._block is None else self._block
            self._block = primitives.matmul(a[..., segment], b[:, segment], block)
            if (first + start + SEGMENT) % BLOCK == 0:
                total += self._block
                self._block = None
        if not last:
            return None
        if self._block is not None:
            total += self._block
        self._total = self._block = None
        return total


def _shared(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient of what some heads share, from that of each."""
    batch, heads, *rest = like.shape
    each = gradient.numel() // max(1, like.numel())
    if each > 1:
        gradient = tree_sum(gradient.view(batch, heads, each, *rest), 2)
    return gradient.view(like.shape).to(like.dtype)


def _of_bias(gradient: Tensor, bias: Tensor) -> Tensor:
    """The gradient of what is added to scores, in its type.

    Torch sums it over the dimensions that it has expanded. The composed form rounds to a shorter type behind that sum,
    so the node that sums is told the result.
    """
    node = bias.grad_fn
    if bias.dtype != torch.float32 and node is not None and node.name().startswith("Expand"):

        def sums(made: Sequence[Tensor | None], _: Any) -> tuple[Tensor | None, ...]:
            handle.remove()
            return tuple(x if x is None else gradient.sum_to_size(x.shape).to(x.dtype) for x in made)

        handle = node.register_hook(sums)
    return gradient.to(bias.dtype)


def _fused(scores: Tensor) -> ModuleType | None:
    """The module that computes what lies between products as one kernel, where it takes these scores."""
    found = primitives.module("cuda_attention") if scores.is_cuda else None
    return found if found is not None and found.takes(scores) else None


def _weights(scores: Tensor, rows: Rows) -> Tensor:
    """What values are multiplied by; `scores` may be overwritten."""
    if (fused := _fused(scores)) is not None:
        made: Tensor = fused.weights(scores, rows)
        return made
    weights, noise = _composed(scores, rows)
    return weights if noise is None else weights * noise


def _weights_backward(scores: Tensor, dw: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """What values are multiplied by, and the gradient of scores, from that of the weights; both may be overwritten."""
    if (fused := _fused(scores)) is not None:
        made: tuple[Tensor, Tensor] = fused.weights_backward(scores, dw, rows)
        return made
    weights, noise = _composed(scores, rows)
    ds = softmax_backward(dw if noise is None else dw * noise, weights, -1, torch.float32)
    return (weights if noise is None else weights * noise), ds


def _composed(scores: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
    """Softmax of the scores, and what dropout multiplies it by."""
    keys = scores.shape[-1]
    if rows.bias is not None:
        scores = scores + rows.of(rows.bias.flatten(0, 1)).float()
    if rows.causal:
        later = torch.ones(rows.queries, keys, dtype=torch.bool, device=scores.device).tril().logical_not()
        scores = scores + torch.zeros_like(scores).masked_fill(later[rows.rows], -math.inf)
    weights = safe_softmax(scores, -1)
    if rows.dropout == 0:
        return weights, None
    if rows.dropout == 1:
        return weights, torch.zeros_like(weights)
    drawn = primitives.random("uniform", rows.key, scores.new_empty(rows.units.stop, rows.queries, keys))
    keep = 1 - rows.dropout
    return weights, divide((rows.of(drawn) < keep).float(), keep)
