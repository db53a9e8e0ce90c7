"""On a GPU: the Triton kernels have the bits of the C++ ones, for every tile size, over random and adversarial data."""

from __future__ import annotations

import pytest
import torch

from lightning_easyscale.kernels import build, cpu

from .cases import same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(build.why_unavailable()), reason=build.why_unavailable() or "available"),
]

SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-45, 1.1754942e-38, -1e-38, 3.4e38, -3.4e38]


@pytest.fixture(scope="module")
def cuda():
    return pytest.importorskip("lightning_easyscale.kernels.cuda", reason="Triton is missing")


def tile_choices(cuda):
    return [
        cuda.Tiles(),
        cuda.Tiles(16, 16, 16, 1, 1, 128),
        cuda.Tiles(16, 64, 64, 2, 2, 256),
        cuda.Tiles(128, 32, 32, 4, 3, 512),
        cuda.Tiles(32, 128, 128, 8, 2, 2048),
        cuda.Tiles(128, 128, 16, 8, 3, 4096),
        cuda.Tiles(64, 64, 32, 4, 4, 1024),
        cuda.Tiles(128, 64, 64, 8, 2, 64),
    ]


def wide_range(*shape, seed=0, special=0.0):
    """Magnitudes from denormal to large; a fraction of the elements is `SPECIAL`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-60, 50, shape, generator=generator)
    if special:
        chosen = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), shape, generator=generator)]
        x = torch.where(torch.rand(shape, generator=generator) < special, chosen, x)
    return x


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 17, 33, 300), (1, 128, 257, 1000), (3, 5, 70, 9001), (1, 65, 1, 256)]
)
@pytest.mark.parametrize("special", [0.0, 0.001])
def test_products_have_the_cpus_bits_for_every_tile(cuda, shape, special):
    batch, m, n, k = shape
    a, b = wide_range(batch, m, k, seed=1, special=special), wide_range(batch, k, n, seed=2, special=special)
    start = wide_range(batch, m, n, seed=3)
    expected, continued = cpu.matmul(a, b), cpu.matmul(a, b, start.clone())
    transposed = b.transpose(1, 2).contiguous().cuda().transpose(1, 2)
    for choice in tile_choices(cuda)[:: 1 if k == 300 else 3]:
        with cuda.tiles(choice):
            assert same_bits(cuda.matmul(a.cuda(), b.cuda()).cpu(), expected), choice
            assert same_bits(cuda.matmul(a.cuda(), transposed).cpu(), expected), choice
            assert same_bits(cuda.matmul(a.cuda(), b.cuda(), start.cuda()).cpu(), continued), choice


def test_products_that_underflow_to_minus_zero_have_the_cpus_bits(cuda):
    for k in (1, 2, 16, 17, 256, 257, 5000):
        a, b = torch.full((1, 3, k), 1e-30), torch.full((1, k, 3), -1e-30)
        expected = cpu.matmul(a, b)
        assert not expected.signbit().any()
        for choice in tile_choices(cuda)[:2]:
            with cuda.tiles(choice):
                assert same_bits(cuda.matmul(a.cuda(), b.cuda()).cpu(), expected), (k, choice)


def test_a_product_over_a_million_has_the_cpus_bits(cuda):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(1, 24, 1_000_003, generator=generator), torch.randn(1, 1_000_003, 40, generator=generator)
    assert same_bits(cuda.matmul(a.cuda(), b.cuda()).cpu(), cpu.matmul(a, b))


def test_products_do_not_depend_on_batch_position_alignment_or_memory_format(cuda):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(70, 200, generator=generator).cuda(), torch.randn(200, 90, generator=generator).cuda()
    whole = cuda.matmul(a[None], b[None])[0]
    assert torch.equal(cuda.matmul(a[None, 33:34], b[None])[0, 0], whole[33])
    assert torch.equal(cuda.matmul(a[None, 7:], b[None, :, 5:])[0], whole[7:, 5:])
    shifted = torch.empty(70 * 200 + 1, device="cuda")[1:].view(70, 200).copy_(a)
    assert torch.equal(cuda.matmul(shifted[None], b[None])[0], whole)
    assert torch.equal(cuda.matmul(a.t().contiguous().t()[None], b[None])[0], whole)
    stacked = cuda.matmul(a.expand(5, 70, 200), b.expand(5, 200, 90))
    assert all(torch.equal(one, whole) for one in stacked)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (3, 130, 1), (2, 5000, 3), (1, 4096 * 3 + 5, 40), (5, 7, 300), (1, 20_000_001, 1), (700, 512, 1)],
)
@pytest.mark.parametrize("special", [0.0, 0.0003])
def test_sums_have_the_cpus_bits_for_every_width(cuda, shape, special):
    x = wide_range(*shape, seed=4, special=special)
    expected = cpu.sum_middle(x)
    for choice in tile_choices(cuda):
        with cuda.tiles(choice):
            assert same_bits(cuda.sum_middle(x.cuda()).cpu(), expected), choice


@pytest.mark.parametrize("name", cpu.UNARY)
def test_elementary_functions_have_the_cpus_bits(cuda, name):
    bits = torch.arange(0, 2**32, 997, dtype=torch.int64)  # 4.3 million numbers of every exponent
    x = torch.cat(
        [bits.to(torch.int32).view(torch.float32), torch.tensor(SPECIAL), torch.linspace(-110, 90, 1_000_001)]
    )
    expected = cpu.unary(name, x)
    for choice in tile_choices(cuda)[:3]:
        with cuda.tiles(choice):
            assert same_bits(cuda.unary(name, x.cuda()).cpu(), expected), choice


@pytest.mark.parametrize("kind", ["uniform", "normal"])
@pytest.mark.parametrize("key", [0, 12345, (1 << 64) - 1, 1 << 31, 1 << 63])
def test_random_numbers_have_the_cpus_bits(cuda, kind, key):
    expected = cpu.random(kind, key, torch.empty(1_000_003))
    for choice in tile_choices(cuda)[:3]:
        with cuda.tiles(choice):
            assert same_bits(cuda.random(kind, key, torch.empty(1_000_003, device="cuda")).cpu(), expected), choice


@pytest.mark.parametrize(("rows", "width", "places"), [(300, 37, 20), (5000, 1, 3), (1, 5, 1), (999, 130, 999)])
def test_scattered_additions_have_the_cpus_bits(cuda, rows, width, places):
    index = torch.randint(0, places, (rows,), generator=torch.Generator().manual_seed(0))
    source, start = wide_range(rows, width, seed=5, special=0.001), wide_range(places, width, seed=6)
    expected = cpu.index_add(start.clone(), index, source)
    for choice in tile_choices(cuda):
        with cuda.tiles(choice):
            assert same_bits(cuda.index_add(start.cuda(), index.cuda(), source.cuda()).cpu(), expected), choice
