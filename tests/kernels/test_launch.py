"""Launches start the code that Triton itself would choose. Needs Triton, but no GPU: the driver is a stand-in."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
backends = pytest.importorskip("triton.backends.compiler")
cuda = pytest.importorskip("lightning_easyscale.kernels.cuda")
fused = pytest.importorskip("lightning_easyscale.kernels.cuda_fused")
pooling = pytest.importorskip("lightning_easyscale.kernels.cuda_pooling")
attention = pytest.importorskip("lightning_easyscale.kernels.cuda_attention")
convolutions = pytest.importorskip("lightning_easyscale.kernels.cuda_convolution")
winograd = pytest.importorskip("lightning_easyscale.kernels.cuda_winograd")
launching = pytest.importorskip("lightning_easyscale.kernels.launch")

from lightning_easyscale.kernels import plans, primitives  # noqa: E402
from lightning_easyscale.kernels.attention import Rows  # noqa: E402
from lightning_easyscale.kernels.convolution import Geometry  # noqa: E402


class _Driver:
    """Compiles for a device that is not there, whose number is that of CPU tensors, and notes launches."""

    def __init__(self) -> None:
        self.started: list[tuple[Any, ...]] = []
        self.utils = self
        driver = self

        class Launcher:
            def __init__(self, *_: Any) -> None:
                pass

            def __call__(self, *given: Any) -> None:
                grid, arguments = given[:3], given[9:]
                addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
                driver.started.append((self, grid, addresses))

        self.launcher_cls = Launcher

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return backends.GPUTarget("cuda", 90, 32)

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024

    def unload_module(self, *_: Any) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 200_000}


@pytest.fixture
def driver(monkeypatch, tmp_path):
    made = _Driver()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(made)
    plans.forget_plans()
    yield made
    plans.forget_plans()
    modules = (cuda, fused, convolutions, winograd, pooling, attention)
    for module in (fused.channel_kernels, *(module.kernels for module in modules)):
        for kernel in vars(module).values():
            if isinstance(kernel, triton.JITFunction):
                for compiled in kernel.device_caches.pop(-1, ({},))[0].values():
                    compiled.module = None  # a real driver would unload what it never loaded
    triton.runtime.driver.set_active(before)


def test_code_is_started_with_what_tritons_launcher_would_give(driver):
    nvidia = pytest.importorskip("triton.backends.nvidia.driver")
    calls: list[tuple[Any, ...]] = []
    launcher = object.__new__(nvidia.CudaLauncher)
    vars(launcher).update(launch=lambda *given: calls.append(given), num_ctas=1, launch_pdl=False)
    vars(launcher).update(launch_cooperative_grid=True, arg_annotations="annotations", kernel_signature="signature")
    vars(launcher).update(gsan_enabled=False)
    vars(launcher).update(dict.fromkeys(("global_scratch_size", "profile_scratch_size"), 0))
    vars(launcher).update(dict.fromkeys(("global_scratch_align", "profile_scratch_align"), 1))
    made = SimpleNamespace(run=launcher, packed_metadata="metadata")
    run, given = launching._start(made)
    run(1, 2, 3, "stream", "function", *given, 4, 5)
    assert len(calls) == 1
    launcher(1, 2, 3, "stream", "function", "metadata", None, None, None, 4, 5)
    assert run is not launcher
    assert calls[0] == calls[1]
    launcher.global_scratch_size = 8
    assert launching._start(made)[0] is launcher


@pytest.fixture
def checked(driver, monkeypatch):
    """Every launch is followed by Triton's own with the same arguments, which must start the same code."""
    launch = launching.Launch.__call__

    def both(self, *tensors, free=()):
        launch(self, *tensors, free=free)
        mine = driver.started.pop()
        self._kernel[self._grid](*tensors, *free, *self._fixed, **self._options)
        tritons = driver.started.pop()
        assert mine[0] is tritons[0], (self._kernel.__name__, self._fixed, [x.data_ptr() % 16 for x in tensors])
        assert mine[1:] == tritons[1:]
        counts[0] += 1

    counts = [0]
    monkeypatch.setattr(launching.Launch, "__call__", both)
    return counts


def at(offset: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A dense tensor that starts so many elements behind a multiple of 64 bytes."""
    size = torch.Size(shape).numel()
    room = torch.zeros(size + offset + 64, dtype=dtype)
    skip = -room.data_ptr() % 64 // room.element_size()
    return room[skip + offset : skip + offset + size].view(shape)


def test_segments_and_blocks_are_those_of_the_other_kernels():
    assert cuda.kernels.SEGMENT.value == primitives.SEGMENT
    assert cuda.kernels.BLOCK.value == primitives.BLOCK


def test_the_present_triton_is_started_directly():
    assert launching._DIRECT


@pytest.mark.parametrize("size", [1, 15, 16, 1000])
def test_pointers_that_alternate_between_alignments(checked, size):
    for (i, j), _ in itertools.product(itertools.product((0, 1, 4), repeat=2), range(2)):
        cuda.fold(at(i, 1, 2, size), 1, at(j, 1, size))
        fused.softmax_backward(at(i, 3, size), at(j, 3, size), log=False)
        cuda.quotient(at(i, size), 0.5 + i)
        fused.dropout(at(i, size), i << 31, 0.9)
        fused.dropout_backward(at(j, size), at(i, size, dtype=torch.bool), 0.9)
    assert checked[0] == 90


def test_sizes_and_strides_that_alternate(checked):
    sizes = [(1, 1, 1), (16, 16, 16), (16, 17, 16), (17, 16, 48), (1, 32, 16), (40, 1, 300), (40, 48, 4096)]
    for (m, n, k), offset in itertools.product(sizes * 2, (0, 1)):
        a, b = at(offset, m, k), at(0, k, n)
        cuda.matmul(a, b)
        cuda.matmul(at(0, k, m).t(), at(offset, n, k).t())
        cuda.matmul(a, b, base=at(offset, n).expand(m, n))
        cuda.matmul(at(0, 2, m, k + 1)[:, :, :k], b.expand(2, k, n))
    assert checked[0] >= 4 * 28


def test_convolutions_that_alternate(checked):
    cases = [(4, 4, 3, 1, 1, 8), (16, 16, 1, 1, 1, 8), (16, 16, 1, 2, 1, 7), (6, 6, 3, 1, 6, 8), (32, 16, 3, 2, 2, 9)]
    for (c, oc, kernel, stride, groups, size), offset in itertools.product(cases * 2, (0, 1)):
        x, w = at(offset, 2, c, size, size), at(0, oc, c // groups, kernel, kernel)
        g = Geometry(x.shape, w.shape, [stride] * 2, [kernel // 2] * 2, [1, 1], groups)
        dy = at(offset, 2, oc, *g.out)
        convolutions.forward(x, w, g)
        convolutions.forward(x.permute(0, 1, 3, 2), w, g)
        convolutions.input_gradient(dy, w, g)
        convolutions.weight_gradient(x, dy, g)
    assert checked[0] >= 80


def test_normalizations_and_pooling_that_alternate(checked):
    shapes = [(2, 3, 8, 8), (2, 16, 4, 4), (16, 1, 1, 1), (20, 2, 16, 16), (9, 2, 128, 128)]
    for shape, offset in itertools.product(shapes * 2, (0, 1)):
        x, dy, w = at(offset, *shape), at(0, *shape), at(offset, shape[1])
        for running in ((at(0, shape[1]), at(offset, shape[1])), None):
            _, mean, inverse = fused.batch_norm(x, w, None, running, 0.1, 1e-5)
            fused.batch_norm_backward(dy, x, w, mean, inverse)
        for windows in (((1, 1), (1, 1), (0, 0)), ((3, 3), (2, 2), (1, 1))):
            size = tuple((n + 2 * p - k) // s + 1 for n, k, s, p in zip(shape[2:], *windows, strict=True))
            index = torch.zeros(*shape[:2], *size, dtype=torch.int64)
            g = at(offset, *shape[:2], *size)
            pooling.max_pool_backward(g, index, shape, *windows, (1, 1))
            pooling.avg_pool(x, size, *windows, 0, padded=True)
            pooling.avg_pool_backward(g, shape, *windows, 1, padded=False)
    assert checked[0] == 20 * 6 + 16 * 4 + 4 * 2 * 8


def test_squares_that_alternate(checked):
    for (c, size), offset in itertools.product([(16, 8), (5, 7), (1, 1), (32, 16)] * 2, (0, 1)):
        x, out = at(offset, 2, c, size, size), (size, size)
        squares = 2 * ((size + 1) // 2) ** 2
        for start, last in itertools.product((0, squares // 2), (False, True)):
            winograd.input_squares(x, (1, 1), out, start, squares, last=last)
            winograd.input_squares(x.permute(0, 2, 3, 1), (1, 0), out, start, squares, last=last)
            winograd.gradient_squares(x, start, squares)
        winograd.output_squares(at(offset, 16, c, squares), at(0, 2, c, size, size), 0)
        for turned in (False, True):
            winograd.weight_squares(at(offset, c, 8, 3, 3), turned=turned)
        winograd.weight_gradient(at(offset, 16, c, 8))
    assert checked[0] == 16 * 16


def test_attention_that_alternates(checked):
    """Lengths, alignments, types, masks and pieces, all of which may choose the code."""
    types = (None, torch.float32, torch.bfloat16)
    for keys, dtype, offset, (unit, query) in itertools.product((16, 17), types, (0, 1), ((0, 0), (1, 0), (1, 16))):
        mask = None if dtype is None else at(offset, 2, 1, 32, keys, dtype=dtype).expand(2, 2, 32, keys)
        rows = Rows(slice(unit, unit + 1), slice(query, query + 16), 32, 2, mask, dtype is None, 0.1, 1 << 40)
        attention.weights(at(offset, 1, 16, keys), rows)
        attention.weights_backward(at(offset, 1, 16, keys), at(0, 1, 16, keys), rows)
    assert checked[0] == 2 * 3 * 2 * 3 * 2


def test_types_that_alternate(checked):
    for index, source in itertools.product((torch.int64, torch.int32), (torch.float32, torch.float16)):
        launch = cuda._index_add(5, 16)
        given = (at(0, 5, dtype=index), at(0, 5, dtype=torch.int64), at(0, 5, 16, dtype=source))
        for _ in range(2):
            launch(at(0, 3, 16), *given)
    assert checked[0] == 8


@pytest.mark.parametrize("key", [0, 1, 16, 1 << 31, 1 << 32, (1 << 64) - 1, 0x8000000000000001])
def test_keys_of_random_numbers_choose_no_code(checked, key):
    for _ in range(2):
        cuda.random("uniform", key, at(0, 64))
    words = cuda.words_of(key)
    assert sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words)) == key
    assert all(-(2**31) <= word < 2**31 for word in words)


def test_only_the_first_launch_of_its_kind_goes_through_triton(driver, monkeypatch):
    x = at(0, 64)
    cuda.unary("exp", x)
    with monkeypatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", None)
        cuda.unary("exp", x)
        with pytest.raises(TypeError):
            cuda.unary("exp", at(1, 64))
        with pytest.raises(TypeError):
            cuda.unary("exp", at(0, 65))
    assert len(driver.started) == 2


def test_a_profiler_hears_of_every_launch(driver):
    heard: list[Any] = []
    hook = triton.knobs.runtime.launch_enter_hook
    through = []
    run = triton.JITFunction.run
    hook.add(heard.append)
    try:
        triton.JITFunction.run = lambda self, *args, **kwargs: through.append(self) or run(self, *args, **kwargs)
        for _ in range(2):
            cuda.unary("exp", at(0, 64))
    finally:
        triton.JITFunction.run = run
        hook.remove(heard.append)
    assert len(through) == 2  # which is what calls the hooks


def test_what_another_triton_would_do_otherwise_goes_through_triton(driver, monkeypatch):
    monkeypatch.setattr(launching, "_DIRECT", False)
    for _ in range(2):
        cuda.unary("exp", at(0, 64))
    assert len(driver.started) == 2
    assert not cuda._unary("exp", 64)._code
