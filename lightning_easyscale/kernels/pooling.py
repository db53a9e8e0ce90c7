"""Pooling and interpolation: sums over a window's or a target's positions in ascending order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import primitives
from .arithmetic import divide
from .reductions import mean


def _pair(value: Sequence[int] | int, default: Sequence[int] | None = None) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else list(value)
    if not values:
        assert default is not None
        values = list(default)
    return values[0], values[-1]


def _ends(start: int, dilation: int, stride: int, size: int) -> slice:
    first = start * dilation
    return slice(first, first + stride * (size - 1) + 1, stride)


def _padded_size(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return max(size + 2 * padding, (out - 1) * stride + dilation * (kernel - 1) + 1)


def max_pool2d_backward(
    dy: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """``aten::max_pool2d_with_indices_backward``: over the window's positions, ascending, its outputs' gradients."""
    kernel, (ph, pw), (dh, dw) = _pair(kernel_size), _pair(padding), _pair(dilation)
    sh, sw = _pair(stride, kernel)
    if (direct := primitives.pooling(x, dy)) is not None:
        windows = (kernel, (sh, sw), (ph, pw), (dh, dw))
        made: Tensor = direct.max_pool_backward(primitives.wide(dy), indices, x.shape, *windows)
        return made.to(x.dtype)
    (height, width), (rows, columns) = x.shape[-2:], dy.shape[-2:]
    tall = _padded_size(height, rows, kernel[0], sh, ph, dh)
    wide = _padded_size(width, columns, kernel[1], sw, pw, dw)
    padded = torch.zeros(*x.shape[:-2], tall, wide, dtype=torch.float32, device=x.device)
    top = torch.arange(rows, device=x.device)[:, None] * sh - ph
    left = torch.arange(columns, device=x.device)[None, :] * sw - pw
    g = dy.float()
    for i, j in itertools.product(range(kernel[0]), range(kernel[1])):
        here = (top + i * dh) * width + (left + j * dw)
        # A position outside the input may share its number with one inside.
        there = (indices == here) & (left + j * dw >= 0) & (left + j * dw < width)
        padded[..., _ends(i, dh, sh, rows), _ends(j, dw, sw, columns)] += torch.where(there, g, torch.zeros_like(g))
    return padded[..., ph : ph + height, pw : pw + width].to(x.dtype, copy=True)


def _divisors(
    x: Tensor,
    out: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    count_include_pad: bool,
) -> Tensor:
    """How many positions each window counts, ``[rows, columns]``."""
    lengths = []
    for size, n, k, s, p in zip(x.shape[-2:], out, kernel, stride, padding, strict=True):
        starts = torch.arange(n, device=x.device) * s - p
        ends = (starts + k).clamp(max=size + p)
        lengths.append(ends - starts if count_include_pad else ends.clamp(max=size) - starts.clamp(min=0))
    return (lengths[0][:, None] * lengths[1][None, :]).float()


def avg_pool2d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """``aten::avg_pool2d``: the window's sum over its positions in row-major order, divided by their number."""
    kernel, (ph, pw) = _pair(kernel_size), _pair(padding)
    sh, sw = _pair(stride, kernel)
    shaped = torch.ops.aten.avg_pool2d(
        torch.empty(x.shape, device="meta"), kernel, (sh, sw), (ph, pw), ceil_mode, count_include_pad
    )
    rows, columns = shaped.shape[-2:]
    if (direct := primitives.pooling(x, shaped)) is not None:
        windows = ((rows, columns), kernel, (sh, sw), (ph, pw), divisor_override or 0)
        made: Tensor = direct.avg_pool(primitives.wide(x), *windows, padded=count_include_pad)
        return made.to(x.dtype)
    tall = _padded_size(x.shape[-2], rows, kernel[0], sh, ph, 1)
    wide = _padded_size(x.shape[-1], columns, kernel[1], sw, pw, 1)
    padded = torch.zeros(*x.shape[:-2], tall, wide, dtype=torch.float32, device=x.device)
    padded[..., ph : ph + x.shape[-2], pw : pw + x.shape[-1]] = x
    total = torch.zeros(*x.shape[:-2], rows, columns, dtype=torch.float32, device=x.device)
    for i, j in itertools.product(range(kernel[0]), range(kernel[1])):
        total += padded[..., _ends(i, 1, sh, rows), _ends(j, 1, sw, columns)]
    if divisor_override:
        return divide(total, divisor_override).to(x.dtype)
    counts = _divisors(x, (rows, columns), kernel, (sh, sw), (ph, pw), count_include_pad)
    return divide(total, counts).to(x.dtype)


def avg_pool2d_backward(
    dy: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """``aten::avg_pool2d_backward``: for each position of the window, ascending, the shares of its outputs."""
    kernel, (ph, pw) = _pair(kernel_size), _pair(padding)
    sh, sw = _pair(stride, kernel)
    if (direct := primitives.pooling(x, dy)) is not None:
        windows = (kernel, (sh, sw), (ph, pw), divisor_override or 0)
        made: Tensor = direct.avg_pool_backward(primitives.wide(dy), x.shape, *windows, padded=count_include_pad)
        return made.to(x.dtype)
    rows, columns = dy.shape[-2:]
    tall = _padded_size(x.shape[-2], rows, kernel[0], sh, ph, 1)
    wide = _padded_size(x.shape[-1], columns, kernel[1], sw, pw, 1)
    counts = divisor_override or _divisors(x, (rows, columns), kernel, (sh, sw), (ph, pw), count_include_pad)
    share = divide(dy.float(), counts)
    padded = torch.zeros(*x.shape[:-2], tall, wide, dtype=torch.float32, device=x.device)
    for i, j in itertools.product(range(kernel[0]), range(kernel[1])):
        padded[..., _ends(i, 1, sh, rows), _ends(j, 1, sw, columns)] += share
    return padded[..., ph : ph + x.shape[-2], pw : pw + x.shape[-1]].to(x.dtype, copy=True)


def _adaptive_windows(size: int, out: int) -> list[slice]:
    return [slice(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]


def adaptive_avg_pool2d(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """``aten::_adaptive_avg_pool2d``: the mean of each window."""
    vertical, horizontal = (_adaptive_windows(s, o) for s, o in zip(x.shape[-2:], output_size, strict=True))
    return torch.stack([torch.stack([mean(x[..., v, h], [-2, -1]) for h in horizontal], -1) for v in vertical], -2)


def adaptive_avg_pool2d_backward(dy: Tensor, x: Tensor) -> Tensor:
    """``aten::_adaptive_avg_pool2d_backward``: outputs in row-major order give each position its share."""
    made = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    vertical, horizontal = (_adaptive_windows(s, o) for s, o in zip(x.shape[-2:], dy.shape[-2:], strict=True))
    for (i, v), (j, h) in itertools.product(enumerate(vertical), enumerate(horizontal)):
        window = made[..., v, h]
        window += divide(dy[..., i : i + 1, j : j + 1].float(), window.shape[-1] * window.shape[-2])
    return made.to(x.dtype)


def upsample_bilinear2d(
    x: Tensor,
    output_size: Sequence[int],
    align_corners: bool,
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> Tensor:
    """``aten::upsample_bilinear2d``: rows first, then columns; each ``a + weight * (b - a)``."""
    wide = x.float()
    for dim, size, scale in ((-2, output_size[0], scales_h), (-1, output_size[1], scales_w)):
        low, high, weight = _sources(x.shape[dim], size, align_corners, scale)
        a, b = (wide.index_select(dim, i.to(x.device)) for i in (low, high))
        w = weight.to(x.device)
        wide = a + (w[:, None] if dim == -2 else w) * (b - a)
    return wide.to(x.dtype)


def _sources(size: int, out: int, align_corners: bool, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """For each output position its two source positions and the weight of the second, made in double precision."""
    at = torch.arange(out, dtype=torch.float64)
    if align_corners:
        at = at * ((size - 1) / (out - 1) if out > 1 else 0.0)
    else:
        at = ((at + 0.5) * (1 / scale if scale else size / out) - 0.5).clamp(min=0)
    low = at.long().clamp(max=size - 1)
    return low, (low + 1).clamp(max=size - 1), (at - low).float()


def upsample_bilinear2d_backward(
    dy: Tensor,
    output_size: Sequence[int],
    input_size: Sequence[int],
    align_corners: bool,
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> Tensor:
    """``aten::upsample_bilinear2d_backward``: columns first, then rows, outputs ascending."""
    from .scatter import index_add

    g = dy.float()
    for dim, size, scale in ((-1, input_size[-1], scales_w), (-2, input_size[-2], scales_h)):
        low, high, weight = (v.to(dy.device) for v in _sources(size, g.shape[dim], align_corners, scale))
        w = weight[:, None] if dim == -2 else weight
        shape = list(g.shape)
        shape[dim] = size
        made = torch.zeros(shape, device=dy.device)
        g = index_add(index_add(made, dim, low, g * (1 - w)), dim, high, g * w)
    return g.to(dy.dtype)


def upsample_nearest2d_backward(
    dy: Tensor,
    output_size: Sequence[int],
    input_size: Sequence[int],
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> Tensor:
    """``aten::upsample_nearest2d_backward``: columns first, then rows, outputs ascending."""
    from .scatter import index_add

    g = dy.float()
    for dim, size, scale in ((-1, input_size[-1], scales_w), (-2, input_size[-2], scales_h)):
        at = torch.arange(g.shape[dim], dtype=torch.float32) * (1 / scale if scale else size / g.shape[dim])
        shape = list(g.shape)
        shape[dim] = size
        g = index_add(torch.zeros(shape, device=dy.device), dim, at.long().clamp(max=size - 1).to(dy.device), g)
    return g.to(dy.dtype)
