"""On a GPU: launches in quick succession that differ in what chooses their code have the bits of the CPU."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_easyscale.kernels import build, portable

from .cases import differences

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(build.why_unavailable()), reason=build.why_unavailable() or "available"),
]

OFFSETS = (0, 1, 4, 3)  # elements of fp32: the pointer is a multiple of 16, or not
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def cuda():
    return pytest.importorskip("lightning_easyscale.kernels.cuda", reason="Triton is missing")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(x: Tensor, offset: int) -> Tensor:
    """A copy on the GPU with the same strides, that starts so many elements behind an aligned address."""
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    room = torch.empty(size + offset, dtype=x.dtype, device="cuda")
    room[offset:] = x.as_strided((size,), (1,))
    return room.as_strided(x.shape, x.stride(), offset)


def agree(function: Callable[..., Tensor | tuple[Tensor, ...]], calls: list[tuple[Tensor, ...]]) -> None:
    """All calls are made on the GPU without a pause, twice, and then on the CPU."""

    def results(made: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
        return [made] if isinstance(made, Tensor) else list(made)

    with portable():
        there = [
            results(function(*(moved(x, offset) for x in operands)))
            for _, operands, offset in itertools.product(range(2), calls, OFFSETS)
        ]
        here = [results(function(*operands)) for operands in calls]
    expected = [made for _, made, _ in itertools.product(range(2), here, OFFSETS)]
    for i, (ours, cpus) in enumerate(zip(there, expected, strict=True)):
        assert differences([x.cpu() for x in ours], cpus) == [], f"call {i}"


SIZES = (1, 15, 16, 17, 32, 1000, 1024)


@pytest.mark.parametrize("function", [torch.exp, F.gelu, F.silu, torch.sigmoid, lambda x: x / 3.1, lambda x: 3.1 / x])
def test_elementwise_functions_of_sizes_and_alignments(function):
    agree(function, [(random(n, seed=n).to(dtype),) for n, dtype in itertools.product(SIZES, TYPES)])


def test_gradients_whose_operands_are_aligned_otherwise_than_each_other():
    with portable():
        for i, j, n in itertools.product(OFFSETS, OFFSETS, (16, 17)):
            dy, x = random(3, n, seed=1), random(3, n, seed=2)
            ours = torch.ops.aten.gelu_backward(moved(dy, i), moved(x, j)).cpu()
            assert differences([ours], [torch.ops.aten.gelu_backward(dy, x)]) == [], (i, j, n)


SHAPES = [(1, 1, 1), (1, 16, 1), (16, 1, 16), (16, 16, 16), (17, 16, 16), (16, 17, 16), (16, 16, 17), (48, 64, 300)]
SHAPES += [(64, 48, 5000), (33, 80, 4096), (1, 64, 64), (64, 1, 64)]


def test_products_of_shapes_strides_types_and_alignments():
    def transposed(x: Tensor) -> Tensor:
        return x.t().contiguous().t()

    def spread(x: Tensor) -> Tensor:
        return torch.stack([x, -x], -1).flatten(1)[:, ::2]

    calls = []
    for (m, n, k), dtype in itertools.product(SHAPES, TYPES[:2]):
        a, b = random(m, k, seed=m).to(dtype), random(k, n, seed=n).to(dtype)
        calls += [(a, b), (transposed(a), b), (a, transposed(b)), (spread(a), spread(b))]
    agree(torch.mm, calls)


def test_products_with_a_summand_of_every_kind():
    calls = []
    for m, n, k in SHAPES:
        a, b = random(m, k, seed=m), random(k, n, seed=n)
        calls += [(random(n), a, b), (random(m, 1), a, b), (random(m, n), a, b), (random(n, m).t(), a, b)]
        calls += [(random(), a, b), tuple(x.bfloat16() for x in (random(n), a, b))]
    agree(torch.addmm, calls)
    agree(
        torch.baddbmm,
        [(random(2, m, n), random(2, m, k), random(2, k, n)) for m, n, k in SHAPES]
        + [(random(1, n), random(2, m, k), random(1, k, n).expand(2, k, n)) for m, n, k in SHAPES],
    )


def test_sums_of_shapes_dimensions_and_alignments():
    shapes = [(1, 1, 1), (1, 16, 16), (16, 17, 1), (3, 4096, 2), (3, 4097, 2), (2, 3, 5000), (16, 16, 16)]
    for dim in (0, 1, 2, (0, 2), (1, 2)):
        agree(lambda x, dim=dim: x.sum(dim), [(random(*shape, seed=1).to(t),) for shape in shapes for t in TYPES])
        agree(lambda x, dim=dim: x.mean(dim), [(random(*shape, seed=2),) for shape in shapes])


def test_normalizations_and_softmax_of_lengths_and_alignments():
    lengths = (1, 15, 16, 128, 129, 768, 4096)
    rows = [(random(*shape, n, seed=n).to(t),) for n in lengths for shape in ((1,), (16,)) for t in TYPES]
    agree(lambda x: torch.softmax(x, -1), rows)
    agree(lambda x: torch.log_softmax(x, -1), rows)
    scaled = [(x, *(random(x.shape[-1], seed=s).to(x.dtype) for s in (3, 4))) for (x,) in rows]
    agree(lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b), scaled)
    agree(lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, None, 1), scaled)
    images = [(2, 16, 4, 4), (3, 5, 1, 1), (1, 17, 3, 5), (16, 16, 16, 16), (2, 1, 70, 70)]
    images += [(32, 3, 64, 64), (33, 2, 64, 64), (130, 5, 7, 7), (25, 2, 64, 63)]  # 32 blocks to a channel, and 33
    agree(
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        [(random(*shape, seed=1), random(shape[1], seed=2), random(shape[1], seed=3)) for shape in images],
    )


def test_gradients_of_batch_normalization_of_blocks_and_alignments():
    calls = []
    for shape in [(2, 16, 4, 4), (3, 5, 1, 1), (2, 1, 70, 70), (32, 3, 64, 64), (33, 2, 64, 64), (25, 2, 64, 63)]:
        c = shape[1]
        moments = random(c, seed=1), random(c, seed=2).abs() + 0.1
        calls.append((random(*shape, seed=3), random(*shape, seed=4), random(c, seed=5), *moments))

    def gradients(dy: Tensor, x: Tensor, w: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, ...]:
        given = (dy, x, w, None, None, mean, inverse, True, 1e-5, [True] * 3)
        return torch.ops.aten.native_batch_norm_backward(*given)

    agree(gradients, calls)
    agree(lambda dy, x, w, mean, inverse: gradients(dy, x, None, mean, inverse), calls)


def test_running_moments_of_batch_normalization():
    def moments(x: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
        mean, variance = mean.clone(), variance.clone()
        F.batch_norm(x, mean, variance, training=True)
        return mean, variance

    agree(
        moments,
        [
            (random(*shape, seed=1), random(shape[1], seed=2).to(t), random(shape[1], seed=3).to(t))
            for shape in [(2, 16, 4, 4), (32, 3, 64, 64), (33, 2, 64, 64)]
            for t in (torch.float32, torch.bfloat16)
        ],
    )


def test_pooling_of_shapes_windows_types_and_alignments():
    for kernel, stride, padding, ceil in [((3, 3), 2, 1, False), ((2, 2), 2, 0, True), ((5, 2), (3, 1), (2, 1), True)]:

        def maxima(x: Tensor, kernel=kernel, stride=stride, padding=padding, ceil=ceil) -> tuple[Tensor, ...]:
            x = x.detach().requires_grad_()
            y = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil)
            return torch.autograd.grad(y, x, y * y)

        def means(x: Tensor, kernel=kernel, stride=stride, padding=padding, ceil=ceil) -> tuple[Tensor, ...]:
            made = []
            for counted, divisor in ((True, None), (False, None), (True, 7)):
                leaf = x.detach().requires_grad_()
                y = F.avg_pool2d(leaf, kernel, stride, padding, ceil, counted, divisor)
                made += [y.detach(), *torch.autograd.grad(y, leaf, y * y)]
            return tuple(made)

        xs = [(random(*shape, seed=1).to(t),) for shape in ((2, 3, 13, 11), (1, 16, 16, 16)) for t in TYPES]
        xs += [(random(2, 5, 9, 12).to(memory_format=torch.channels_last),), (random(3, 9, 16),)]
        agree(maxima, xs)
        agree(means, xs)


def test_convolutions_of_shapes_layouts_and_alignments():
    cases = [(4, 4, 3, 1, 1, 8), (16, 16, 1, 1, 1, 8), (16, 16, 1, 2, 1, 7), (6, 6, 3, 1, 6, 8), (32, 16, 3, 2, 2, 9)]
    for c, oc, kernel, stride, groups, size in [*cases, (1, 1, 1, 1, 1, 1), (3, 17, 5, 1, 1, 16)]:
        w = random(oc, c // groups, kernel, kernel, seed=1)
        wide = random(2, c, size, size + 2, seed=3)
        xs = [random(2, c, size, size, seed=2), wide[..., 1:-1], wide.to(memory_format=torch.channels_last)]
        g = {"stride": stride, "padding": kernel // 2, "groups": groups}
        agree(lambda x, w, g=g: F.conv2d(x, w, **g), [(x, w) for x in xs])
        dys = [random(*F.conv2d(x, w, **g).shape, seed=4) for x in xs]
        agree(
            lambda dy, x, w, g=g: torch.ops.aten.convolution_backward(
                dy,
                x,
                w,
                None,
                [g["stride"]] * 2,
                [g["padding"]] * 2,
                [1, 1],
                False,
                [0, 0],
                g["groups"],
                [True, True, False],
            )[:2],
            [(dy, x, w) for dy, x in zip(dys, xs, strict=True)],
        )


def test_additions_into_places_of_both_kinds_of_index():
    for width, rows in itertools.product((1, 16, 17), (1, 16, 33)):
        index = torch.arange(rows) * 7 % 5
        source, start = random(rows, width, seed=1), random(5, width, seed=2)
        with portable():
            expected = start.index_add(0, index, source)
            for i, kind in itertools.product(OFFSETS, (torch.int64, torch.int32)):
                ours = moved(start, i).index_add(0, moved(index.to(kind), i), moved(source, 4 - i)).cpu()
                assert differences([ours], [expected]) == []


def test_dropout_of_sizes_and_alignments():
    def drop(x: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        kept, mask = torch.native_dropout(x, 0.3, True)
        return kept, mask.float(), torch.ops.aten.native_dropout_backward(x, mask, 1 / 0.7)

    agree(drop, [(x.to(t),) for n in SIZES for t in TYPES for x in (random(n), random(3, n), random(n, 3).t())])


def test_random_numbers_whatever_the_key(cuda):
    from lightning_easyscale.kernels import cpu

    for key, n in itertools.product((0, 1, 16, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1), (1, 16, 1000)):
        ours = cuda.random("normal", key, torch.empty(n, device="cuda")).cpu()
        assert differences([ours], [cpu.random("normal", key, torch.empty(n))]) == []


def test_launches_follow_the_current_stream_and_come_from_any_thread():
    x = random(1 << 20)
    with portable():
        expected = x.exp()
    found: list[Tensor] = []

    def compute() -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), portable():
            for _ in range(20):
                y = torch.empty(x.shape, device="cuda")
                y.copy_(x)  # on this stream: a launch on another would run too early
                found.append(y.exp())
        stream.synchronize()

    threads = [threading.Thread(target=compute) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 60
    assert all(torch.equal(y.cpu(), expected) for y in found)


def test_an_operand_on_the_cpu_is_refused_also_when_the_launch_is_known():
    x, w = random(4, 16).cuda(), random(16).cuda()
    with portable():
        for _ in range(2):
            F.layer_norm(x, (16,), w)
        with pytest.raises((ValueError, RuntimeError)):
            F.layer_norm(x, (16,), w.cpu())


@pytest.mark.gpu(2)
def test_a_tensor_of_another_device_is_computed_there():
    x = random(1000)
    with portable():
        expected = x.exp()
        for _ in range(2):
            found = [x.to(f"cuda:{i}").exp() for i in (0, 1)]
            assert all(torch.equal(y.cpu(), expected) for y in found)


@pytest.mark.timeout(900)  # compiles each kernel several times
def test_tuned_launches_have_the_bits_of_untuned_ones(tmp_path, monkeypatch):
    from lightning_easyscale.kernels import plans, tiles, tuning

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "CANDIDATES", tiles.CANDIDATES[:6])
    a, b = random(130, 700, seed=1).cuda(), random(700, 90, seed=2).cuda()
    x, w = random(4, 32, 20, 20, seed=3).cuda(), random(48, 32, 3, 3, seed=4).cuda()
    leaves = [t.requires_grad_() for t in (a, b, x, w)]

    def compute() -> list[Tensor]:
        with portable():
            product, image = a @ b, F.conv2d(x, w, stride=2, padding=1)
            gradients = torch.autograd.grad(product.sum() + (image * image).sum(), leaves)
        return [t.detach().cpu() for t in (product, image, *gradients)]

    def forget() -> None:
        tiles._cache_of.cache_clear()
        plans.forget_plans()

    forget()
    untuned = compute()
    with tuning.measuring():
        measured = compute()
    found = tiles.tile_cache()._known
    forget()
    after = compute()
    assert {"matmul", "forward", "input_gradient", "weight_gradient"} == {shapes.split()[0] for shapes in found}
    assert tiles.tile_cache()._known == found
    forget()
    assert differences(untuned, measured) == []
    assert differences(untuned, after) == []
