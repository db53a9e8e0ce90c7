"""Convolutions by Winograd's algorithm: exact where numbers allow it, split in any way; their transforms' bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_easyscale.kernels import build, cpu_winograd, portable, winograd
from lightning_easyscale.kernels.convolution import Geometry

from . import winograd_reference
from .cases import differences

GEOMETRIES = [
    (2, 96, 88, 9, 7, (1, 1)),
    (3, 128, 80, 6, 10, (0, 2)),
    (1, 80, 80, 3, 3, (2, 0)),
    (2, 90, 90, 2, 1, (1, 1)),
]
with_kernels = pytest.mark.skipif(bool(build.why_unavailable()), reason=build.why_unavailable() or "available")


def geometry(n, c, oc, height, width, padding, stride=(1, 1), dilation=(1, 1), groups=1, kernel=(3, 3)) -> Geometry:
    return Geometry((n, c, height, width), (oc, c // groups, *kernel), stride, padding, dilation, groups)


def whole(*shape: int, limit: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randint(-limit, limit + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


@with_kernels
@pytest.mark.parametrize("sizes", GEOMETRIES)
def test_whole_numbers_have_the_exact_results_of_a_convolution(sizes):
    """Every transform, product and sum of small whole numbers is exact, so any mistake shows."""
    g = geometry(*sizes)
    assert winograd.takes(g)
    x, w = whole(g.batch, g.channels, *g.spatial, seed=1), whole(g.out_channels, g.channels, 3, 3, seed=2)
    dy = whole(g.batch, g.out_channels, *g.out, seed=3)
    assert torch.equal(winograd.forward(x, w, g), F.conv2d(x, w, padding=g.padding))
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, w, None, (1, 1), g.padding, (1, 1), False, (0, 0), 1, (True, True, False)
    )
    assert torch.equal(winograd.input_gradient(dy, w, g), dx)
    assert torch.equal(winograd.weight_gradient(x, dy, g), dw)


@with_kernels
def test_bits_do_not_depend_on_how_many_squares_are_made_at_once(monkeypatch):
    g = geometry(5, 80, 80, 61, 60, (1, 1))
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(shape, generator=generator) for shape in ((5, 80, 61, 60), (80, 80, 3, 3), (5, 80, 61, 60)))
    at_once = winograd.forward(x, w, g), winograd.input_gradient(dy, w, g), winograd.weight_gradient(x, dy, g)
    monkeypatch.setattr(winograd, "_KEPT", 1)
    assert len(list(winograd._parts(dy, 80))) == 2
    in_parts = winograd.forward(x, w, g), winograd.input_gradient(dy, w, g), winograd.weight_gradient(x, dy, g)
    assert all(torch.equal(a, b) for a, b in zip(at_once, in_parts, strict=True))


@with_kernels
def test_a_sample_has_the_same_bits_in_any_batch():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(7, 80, 5, 6, generator=generator), torch.randn(80, 80, 3, 3, generator=generator)
    with portable():
        whole = F.conv2d(x, w, padding=1)
        assert torch.equal(F.conv2d(x[4:5], w, padding=1)[0], whole[4])
        assert torch.equal(F.conv2d(x.to(memory_format=torch.channels_last), w, padding=1), whole)


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, True),
        ({"c": 63, "oc": 64}, False),
        ({"c": 64, "oc": 64}, True),
        ({"stride": (1, 2)}, False),
        ({"dilation": (2, 1)}, False),
        ({"groups": 2}, False),
        ({"kernel": (1, 1)}, False),
        ({"kernel": (3, 1)}, False),
        ({"padding": (3, 1)}, False),
        ({"n": 0}, False),
    ],
)
def test_which_convolutions_are_computed_so(changes, taken):
    plain = {"n": 1, "c": 160, "oc": 160, "height": 8, "width": 8, "padding": (1, 1)}
    assert winograd.takes(geometry(**{**plain, **changes})) == taken


@with_kernels
@pytest.mark.parametrize("threads", [1, 2])
def test_the_cpus_transforms_have_the_bits_of_torchs_operations(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for case in winograd_reference.CASES:
            for name, found, expected in winograd_reference.compared(cpu_winograd, *case):
                assert differences([found], [expected]) == [], name
    finally:
        torch.set_num_threads(before)
