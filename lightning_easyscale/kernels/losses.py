"""Losses: sums and means of the format over elementwise terms."""

from __future__ import annotations

import torch
from torch import Tensor

from . import primitives
from .arithmetic import divide
from .reductions import mean, tree_sum

_NONE, _MEAN = 0, 1  # torch's reductions; 2 is the sum


def _reduce(terms: Tensor, reduction: int, dtype: torch.dtype) -> Tensor:
    if reduction == _NONE:
        return terms.to(dtype)
    return (mean(terms) if reduction == _MEAN else tree_sum(terms)).to(dtype)


def _picked(target: Tensor, ignore: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The class to read for each target and the weight it has, 0 for ignored ones."""
    kept = target != ignore
    safe = torch.where(kept, target, torch.zeros_like(target))
    scale = torch.ones_like(safe, dtype=torch.float32) if weight is None else weight.float()[safe]
    return safe, torch.where(kept, scale, torch.zeros_like(scale))


def nll_loss(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """``aten::nll_loss_forward`` and ``nll_loss2d_forward``: loss and total weight; classes are dimension 1."""
    rows, targets = (x[None], target[None]) if x.dim() == 1 else (x, target)
    safe, scale = _picked(targets, ignore_index, weight)
    terms = -rows.float().gather(1, safe.unsqueeze(1)).squeeze(1)
    # An ignored term may be infinite, and 0 times it would not be 0.
    terms = torch.where(scale != 0, terms * scale, torch.zeros_like(terms))
    if reduction == _NONE:
        return terms.view(target.shape).to(x.dtype), x.new_zeros(())
    total = tree_sum(scale)
    loss = divide(tree_sum(terms), total) if reduction == _MEAN else tree_sum(terms)
    return loss.to(x.dtype), total.to(x.dtype)


def nll_loss_backward(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    total_weight: Tensor,
) -> Tensor:
    """``aten::nll_loss_backward`` and ``nll_loss2d_backward``."""
    rows, targets = (x[None], target[None]) if x.dim() == 1 else (x, target)
    safe, scale = _picked(targets, ignore_index, weight)
    g = divide(dy.float(), total_weight.float()) if reduction == _MEAN else dy.float()
    terms = -scale * (g.view(targets.shape) if reduction == _NONE else g)
    made = torch.zeros_like(rows, dtype=torch.float32)
    made.scatter_(1, safe.unsqueeze(1), torch.where(scale != 0, terms, torch.zeros_like(terms)).unsqueeze(1))
    return made.view(x.shape).to(x.dtype)


def mse_loss(x: Tensor, target: Tensor, reduction: int = _MEAN) -> Tensor:
    """Squared differences."""
    away = x.float() - target.float()
    return _reduce(away * away, reduction, x.dtype)


def mse_loss_backward(dy: Tensor, x: Tensor, target: Tensor, reduction: int) -> Tensor:
    """``((x - target) * 2 / n) * dy``."""
    away = (x.float() - target.float()) * 2
    return ((divide(away, x.numel()) if reduction == _MEAN else away) * dy.float()).to(x.dtype)


def l1_loss_terms(x: Tensor, beta: float) -> Tensor:
    """Smooth L1 of differences."""
    size = x.abs()
    return torch.where(size < beta, (x * x) * (0.5 / beta), size - 0.5 * beta) if beta > 0 else size


def smooth_l1_loss(x: Tensor, target: Tensor, reduction: int = _MEAN, beta: float = 1.0) -> Tensor:
    """``aten::smooth_l1_loss``."""
    return _reduce(l1_loss_terms(x.float() - target.float(), beta), reduction, x.dtype)


def smooth_l1_loss_backward(dy: Tensor, x: Tensor, target: Tensor, reduction: int, beta: float) -> Tensor:
    """``aten::smooth_l1_loss_backward``."""
    away = x.float() - target.float()
    slope = torch.where(away.abs() < beta, divide(away, beta), away.sign()) if beta > 0 else away.sign()
    return ((divide(slope, x.numel()) if reduction == _MEAN else slope) * dy.float()).to(x.dtype)


def bce_with_logits(
    x: Tensor, target: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None, reduction: int = _MEAN
) -> Tensor:
    """``(1 - t) * x + p * (log1p(exp(-|x|)) + max(-x, 0))``, where p is ``(pos_weight - 1) * t + 1``."""
    wide, t = x.float(), target.float()
    soft = primitives.unary("log1p", primitives.unary("exp", -wide.abs())) + (-wide).clamp(min=0)
    if pos_weight is not None:
        soft = soft * ((pos_weight.float() - 1) * t + 1)
    terms = (1 - t) * wide + soft
    return _reduce(terms if weight is None else terms * weight.float(), reduction, x.dtype)
