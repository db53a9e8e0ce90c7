"""Convolutions with 3x3 kernels by Winograd's algorithm F(2x2, 3x3): 16 products instead of 36 multiplications.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016), section 4.1. The output is cut
into squares of 2x2, in the order of images, rows, columns; what sticks out of it is left out, and the input around is
zero. A square comes from 4x4 inputs d and the weight g: ``A^T [(G g G^T) * (B^T d B)] A``, where the products of all
channels are products of the format (k runs over channels). The gradient of the input is such a convolution of the
output's gradient with the weight turned by 180 degrees; that of the weight is ``G^T [(A y A^T) * (B^T d B)] G``, whose
products' k runs over squares. The transforms (`winograd.h`) only add, subtract and halve, one rounding each, across the
rows first; so errors stay near those of a direct convolution, which larger squares do not achieve.

Whether a convolution is computed so depends on its kernel and channels alone, never on the device or on other samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor

from . import primitives
from .plans import planned
from .primitives import BLOCK

if TYPE_CHECKING:
    from .convolution import Geometry

_WORTH = 32
"""``C * OC / (C + OC)`` from which the multiplications that are saved repay the transforms."""
_KEPT = 1 << 26
"""Elements of transformed squares that are made at once."""


@planned
def takes(g: Geometry) -> bool:
    """Whether a convolution of this geometry is computed so. Part of the format."""
    plain = g.kernel == (3, 3) and g.groups == 1 and g.stride == g.dilation == (1, 1) and max(g.padding) <= 2
    worth = g.channels * g.out_channels >= _WORTH * (g.channels + g.out_channels)
    return plain and worth and g.batch * g.pixels > 0


def forward(x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    """``[N, OC, OH, OW]`` of ``[N, C, H, W]`` and ``[OC, C, 3, 3]``, all fp32."""
    out = x.new_empty(g.batch, g.out_channels, *g.out)
    return _correlate(x, _transforms(x).weight_squares(weight, turned=False), g.padding, out)


def input_gradient(dy: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    """``[N, C, H, W]`` of ``[N, OC, OH, OW]`` and the weight."""
    out = dy.new_empty(g.batch, g.channels, *g.spatial)
    padding = (2 - g.padding[0], 2 - g.padding[1])
    return _correlate(dy, _transforms(dy).weight_squares(weight, turned=True), padding, out)


def weight_gradient(x: Tensor, dy: Tensor, g: Geometry) -> Tensor:
    """``[OC, C, 3, 3]`` of ``[N, C, H, W]`` and ``[N, OC, OH, OW]``."""
    transforms = _transforms(x)
    total: Tensor | None = None
    for start, end in _parts(dy, max(g.channels, g.out_channels)):
        a = transforms.gradient_squares(dy, start, end)
        b = transforms.input_squares(x, g.padding, g.out, start, end, last=True)
        total = primitives.matmul(a, b, total)
    assert total is not None
    made: Tensor = transforms.weight_gradient(total.view(16, g.out_channels, g.channels))
    return made


def _transforms(x: Tensor) -> ModuleType:
    return primitives.module("cuda_winograd" if x.is_cuda else "cpu_winograd")


def _correlate(x: Tensor, weight: Tensor, padding: tuple[int, ...], out: Tensor) -> Tensor:
    transforms = _transforms(x)
    for start, end in _parts(out, max(weight.shape[1:])):
        squares = transforms.input_squares(x, padding, out.shape[2:], start, end)
        transforms.output_squares(primitives.matmul(weight, squares), out, start)
    return out


def _parts(y: Tensor, channels: int) -> Iterator[tuple[int, int]]:
    """Ranges of the squares of `y`, whole blocks of k each, so that sums go on as if there were one."""
    squares = y.shape[0] * -(-y.shape[2] // 2) * -(-y.shape[3] // 2)
    step = max(1, _KEPT // (16 * channels) // BLOCK) * BLOCK
    return ((start, min(start + step, squares)) for start in range(0, squares, step))
