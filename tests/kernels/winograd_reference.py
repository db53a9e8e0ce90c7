"""Winograd's transforms for F(2x2, 3x3) as operations of torch, to compare with those in C++ and Triton."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

CASES = [(2, 33, 5, (9, 7), (1, 1)), (3, 3, 5, (6, 5), (0, 2)), (1, 2, 3, (40, 36), (2, 1))]
"""Images, channels in and out, rows and columns, padding."""
ODD = (float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e-42)


def squares_of(y: Sequence[int]) -> int:
    """How many squares of 2x2 cover ``[N, C, H, W]``."""
    return y[0] * -(-y[2] // 2) * -(-y[3] // 2)


def input_squares(
    x: Tensor, padding: Sequence[int], out: Sequence[int], start: int, end: int, *, last: bool = False
) -> Tensor:
    """``B^T d B``; see `cpu_winograd.input_squares`."""
    rows, columns = (-(-size // 2) for size in out)
    first, behind = start // (rows * columns), -(-end // (rows * columns))
    x = x[first:behind]
    around = [(before, 2 * n + 2 - size - before) for before, n, size in
              zip(padding, (rows, columns), x.shape[2:], strict=True)]  # fmt: skip
    x = torch.constant_pad_nd(x, [*around[1], *around[0]])
    made = x.new_empty(16, x.shape[1], x.shape[0], rows, columns)
    for i, row in enumerate(_taken([x[:, :, k : k + 2 * rows - 1 : 2] for k in range(4)])):
        for j, value in enumerate(_taken([row[..., k : k + 2 * columns - 1 : 2] for k in range(4)])):
            made[4 * i + j] = value.transpose(0, 1)
    part = made.flatten(2)[:, :, start - first * rows * columns : end - first * rows * columns]
    return part.transpose(1, 2) if last else part


def _taken(d: list[Tensor]) -> list[Tensor]:
    """``B^T d``."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def weight_squares(weight: Tensor, *, turned: bool) -> Tensor:
    """``G g G^T``: ``[16, OC, C]`` of ``[OC, C, 3, 3]``; `turned`: ``[16, C, OC]`` of that turned by 180 degrees."""
    if turned:
        weight = weight.transpose(0, 1).flip(2, 3)
    made = [value for row in _spread(weight.unbind(2)) for value in _spread(row.unbind(2))]
    return torch.stack(made)


def _spread(g: Sequence[Tensor]) -> list[Tensor]:
    """``G g``."""
    ends = g[0] + g[2]
    return [g[0], (ends + g[1]) * 0.5, (ends - g[1]) * 0.5, g[2]]


def output_squares(products: Tensor, out: Tensor, start: int) -> None:
    """``A^T m A``: write the squares from `start` on, made of ``[16, C, squares]``, to ``[N, C, H, W]``."""
    height, width = out.shape[2:]
    rows, columns = -(-height // 2), -(-width // 2)
    upper = [_gathered([products[4 * i + j] for i in range(4)]) for j in range(4)]
    place = torch.arange(start, start + products.shape[2], device=out.device)
    image, row, column = place // (rows * columns), place // columns % rows, place % columns
    for i in range(2):
        for j, value in enumerate(_gathered([u[i] for u in upper])):
            y, z = 2 * row + i, 2 * column + j
            there = ((y < height) & (z < width)).nonzero()[:, 0]
            out[image[there], :, y[there], z[there]] = value[:, there].t()


def _gathered(m: list[Tensor]) -> list[Tensor]:
    """``A^T m``."""
    return [(m[0] + m[1]) + m[2], (m[1] - m[2]) - m[3]]


def gradient_squares(dy: Tensor, start: int, end: int) -> Tensor:
    """``A y A^T``: ``[16, C, end - start]`` of the output's gradient ``[N, C, H, W]``."""
    rows, columns = (-(-size // 2) for size in dy.shape[2:])
    first, behind = start // (rows * columns), -(-end // (rows * columns))
    dy = dy[first:behind]
    dy = torch.constant_pad_nd(dy, [0, 2 * columns - dy.shape[3], 0, 2 * rows - dy.shape[2]])
    made = dy.new_empty(16, dy.shape[1], dy.shape[0], rows, columns)
    for i, row in enumerate(_scattered([dy[:, :, 0::2], dy[:, :, 1::2]])):
        for j, value in enumerate(_scattered([row[..., 0::2], row[..., 1::2]])):
            made[4 * i + j] = value.transpose(0, 1)
    return made.flatten(2)[:, :, start - first * rows * columns : end - first * rows * columns]


def _scattered(y: list[Tensor]) -> list[Tensor]:
    """``A y``."""
    return [y[0], y[0] + y[1], y[0] - y[1], 0 - y[1]]


def weight_gradient(sums: Tensor) -> Tensor:
    """``G^T s G``: ``[OC, C, 3, 3]`` of ``[16, OC, C]``."""
    upper = [_collected([sums[4 * i + j] for i in range(4)]) for j in range(4)]
    made = [_collected([u[i] for u in upper]) for i in range(3)]
    return torch.stack([value for row in made for value in row], -1).unflatten(-1, (3, 3))


def _collected(s: list[Tensor]) -> list[Tensor]:
    """``G^T s``."""
    middle = (s[1] + s[2]) * 0.5
    return [s[0] + middle, (s[1] - s[2]) * 0.5, middle + s[3]]


def compared(
    other: ModuleType, n: int, c: int, oc: int, size: tuple[int, int], padding: tuple[int, int]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name and results of each transform, of another implementation and of this one."""
    generator = torch.Generator().manual_seed(n)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    out = (size[0] + 2 * padding[0] - 2, size[1] + 2 * padding[1] - 2)
    squares = squares_of((n, oc, *out))
    x, dy = random(n, c, *size), random(n, oc, *out)
    for values in (x.view(-1), dy.view(-1)):
        values[torch.randint(0, len(values), (12,), generator=generator)] = torch.tensor(ODD).repeat(2)
    for start, end in ((0, squares), (squares // 3, squares - 1), (squares - 1, squares)):
        for form in (torch.contiguous_format, torch.channels_last):
            images, dys = x.to(memory_format=form), dy.to(memory_format=form)
            for last in (False, True):
                given = (images, padding, out, start, end)
                yield "input", other.input_squares(*given, last=last), input_squares(*given, last=last)
            yield "gradient", other.gradient_squares(dys, start, end), gradient_squares(dys, start, end)
    mine, expected = torch.zeros(n, oc, *out), torch.zeros(n, oc, *out)
    products = random(16, oc, squares)
    for start, end in ((0, squares // 2), (squares // 2, squares)):
        part = products[:, :, start:end].contiguous()
        other.output_squares(part, mine, start)
        output_squares(part, expected, start)
    yield "output", mine, expected
    for w in (random(oc, c, 3, 3), random(c, oc, 3, 3).transpose(0, 1)):
        for turned in (False, True):
            yield "weight", other.weight_squares(w, turned=turned), weight_squares(w, turned=turned)
    sums = random(16, oc, c)
    yield "weight's gradient", other.weight_gradient(sums), weight_gradient(sums)
