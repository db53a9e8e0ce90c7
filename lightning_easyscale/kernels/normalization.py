"""Batch, layer and group normalization.

Variances are sums of squared distances to the mean; every product and sum is rounded by itself, in the order written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import primitives
from .arithmetic import divide, square_root
from .reductions import tree_sum


def _inverse_deviation(variance: Tensor, eps: float) -> Tensor:
    return divide(1.0, square_root(variance + eps))


def _moments(x: Tensor, dims: Sequence[int], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Distances to the mean, mean and variance over `dims`, which are kept."""
    mean = divide(tree_sum(x, dims, True), count)
    away = x - mean
    return away, mean, divide(tree_sum(away * away, dims, True), count)


def _scale(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


def _gradient(g: Tensor, normal: Tensor, inverse: Tensor, dims: Sequence[int], count: int) -> Tensor:
    """Through a normalization: ``((g - mean(g)) - normal * mean(g * normal)) * inverse``."""
    first = divide(tree_sum(g, dims, True), count)
    second = divide(tree_sum(g * normal, dims, True), count)
    return ((g - first) - normal * second) * inverse


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten::native_layer_norm``: result, mean and inverse deviation."""
    dims = list(range(x.dim() - len(shape), x.dim()))
    count = math.prod(shape) or 1
    if (fused := primitives.fused(x)) is not None and x.numel() and fused.takes_rows(count):
        made, mean, inverse = fused.layer_norm(primitives.wide(x), count, weight, bias, eps)
        kept = (*x.shape[: x.dim() - len(shape)], *[1] * len(shape))
        return primitives.cast(made, x.dtype), mean.view(kept), inverse.view(kept)
    away, mean, variance = _moments(x.float(), dims, count)
    inverse = _inverse_deviation(variance, eps)
    return _scale(away * inverse, _wide(weight), _wide(bias)).to(x.dtype), mean, inverse


def _wide(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``aten::native_layer_norm_backward``."""
    dims, rows = list(range(x.dim() - len(shape), x.dim())), list(range(x.dim() - len(shape)))
    count = math.prod(shape)
    if (fused := primitives.fused(x)) is not None and x.numel() and rows and fused.takes_rows(count):
        made = fused.layer_norm_backward(primitives.wide(dy), primitives.wide(x), count, mean, inverse, weight)
        types = (x.dtype, *(None if p is None else p.dtype for p in (weight, bias)))
        shaped = (made[0], made[1].view(list(shape)), made[2].view(list(shape)))
        dx, dw, db = (
            primitives.cast(g, t) if wanted and t is not None else None
            for g, t, wanted in zip(shaped, types, output_mask, strict=True)
        )
        return dx, dw, db
    g, normal = dy.float(), (x.float() - mean) * inverse
    dx = dw = db = None
    if output_mask[0]:
        dx = _gradient(g if weight is None else g * weight.float(), normal, inverse, dims, count).to(x.dtype)
    if output_mask[1] and weight is not None:
        dw = (tree_sum(g * normal, rows) if rows else g * normal).to(weight.dtype)
    if output_mask[2] and bias is not None:
        db = (tree_sum(g, rows) if rows else g.clone()).to(bias.dtype)
    return dx, dw, db


def _channels(x: Tensor) -> tuple[list[int], list[int], int]:
    """All dimensions but the second, the shape that broadcasts along it, and the elements of one channel."""
    return [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)], x.numel() // max(1, x.shape[1])


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten::native_batch_norm``: result, and the batch's mean and inverse deviation; updates the running ones."""
    fused = primitives.fused(x)
    if fused is not None and x.numel() and fused.takes_channels(x):
        return _batch_norm_fused(fused, x, weight, bias, running_mean, running_var, training, momentum, eps)
    dims, shape, count = _channels(x)
    wide = x.float()
    if training:
        away, mean, variance = _moments(wide, dims, count)
        inverse = _inverse_deviation(variance, eps)
        saved = mean.flatten(), inverse.flatten()
        unbiased = variance.flatten() * (count / max(1, count - 1))
        for running, new in ((running_mean, saved[0]), (running_var, unbiased)):
            if running is not None:
                running.copy_(running.float() * (1 - momentum) + new * momentum)
    else:
        assert running_mean is not None
        assert running_var is not None
        away = wide - running_mean.float().view(shape)
        inverse = _inverse_deviation(running_var.float(), eps).view(shape)
        saved = x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)
    scale = [None if p is None else p.float().view(shape) for p in (weight, bias)]
    return _scale(away * inverse, *scale).to(x.dtype), *saved


def _batch_norm_fused(
    fused: ModuleType,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if training:
        running = None if running_mean is None or running_var is None else (running_mean, running_var)
        wide = (
            None
            if running is None
            else (primitives.wide(running[0]).contiguous(), primitives.wide(running[1]).contiguous())
        )
        made, mean, inverse = fused.batch_norm(primitives.wide(x), weight, bias, wide, momentum, eps)
        for kept, new in zip(running or (), wide or (), strict=True):
            if kept is not new:
                kept.copy_(new)
        return primitives.like_layout(primitives.cast(made, x.dtype), x), mean, inverse
    assert running_mean is not None
    assert running_var is not None
    inverse = _inverse_deviation(running_var.float(), eps)
    made = fused.normalize(x.float(), running_mean.float().contiguous(), inverse, weight, bias)
    empty = x.new_empty(0, dtype=torch.float32)
    return primitives.like_layout(made.to(x.dtype), x), empty, empty.clone()


def batch_norm_legit(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Tensor | bool | float
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten::_native_batch_norm_legit``, with running statistics or without."""
    if len(rest) == 3:
        rest = (None, None, *rest)  # type: ignore[assignment]
    return batch_norm(x, weight, bias, *rest)  # type: ignore[arg-type]


def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    inverse: Tensor | None,
    training: bool,
    eps: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``aten::native_batch_norm_backward``."""
    fused = primitives.fused(x)
    if training and fused is not None and x.numel() and fused.takes_channels(x):
        assert mean is not None
        assert inverse is not None
        dx, dw, db = fused.batch_norm_backward(primitives.wide(dy), primitives.wide(x), weight, mean, inverse)
        made = primitives.like_layout(primitives.cast(dx, x.dtype), x)
        return made if output_mask[0] else None, dw if output_mask[1] else None, db if output_mask[2] else None
    dims, shape, count = _channels(x)
    if not training:
        assert running_mean is not None
        assert running_var is not None
        mean, inverse = running_mean.float(), _inverse_deviation(running_var.float(), eps)
    assert mean is not None
    assert inverse is not None
    g, inverse = dy.float(), inverse.view(shape)
    normal = (x.float() - mean.view(shape)) * inverse
    dx = dw = db = None
    if output_mask[0]:
        scaled = g if weight is None else g * weight.float().view(shape)
        dx = (_gradient(scaled, normal, inverse, dims, count) if training else scaled * inverse).to(x.dtype)
    if output_mask[1]:
        dw = tree_sum(g * normal, dims)
    if output_mask[2]:
        db = tree_sum(g, dims)
    return dx, dw, db


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, pixels: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten::native_group_norm``: result, mean and inverse deviation, ``[n, groups]``."""
    away, mean, variance = _moments(x.float().reshape(n, groups, -1), [2], c // groups * pixels)
    inverse = _inverse_deviation(variance, eps)
    scale = [None if p is None else p.float().view(1, c, 1) for p in (weight, bias)]
    made = _scale((away * inverse).view(n, c, pixels), *scale).view(x.shape)
    return made.to(x.dtype), mean.view(n, groups), inverse.view(n, groups)


def group_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    n: int,
    c: int,
    pixels: int,
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``aten::native_group_norm_backward``."""
    inverse = inverse.float().view(n, groups, 1)
    normal = (x.float().reshape(n, groups, -1) - mean.float().view(n, groups, 1)) * inverse
    g = dy.float().reshape(n, c, pixels)
    dx = dw = db = None
    if output_mask[0]:
        scaled = (g if weight is None else g * weight.float().view(1, c, 1)).view(n, groups, -1)
        dx = _gradient(scaled, normal, inverse, [2], c // groups * pixels).view(x.shape).to(x.dtype)
    if output_mask[1]:
        dw = tree_sum(g * normal.view(n, c, pixels), [0, 2])
    if output_mask[2]:
        db = tree_sum(g, [0, 2])
    return dx, dw, db
