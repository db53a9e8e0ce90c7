"""Levels, flags, conflicts and the deterministic pooling gradient."""

import os
import subprocess
import sys
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.distributed import _suggested_max_num_threads

from lightning_easyscale import EasyScaleStrategy, determinism
from lightning_easyscale.determinism import (
    CUBLAS_VARIABLE,
    Level,
    applied,
    apply,
    check_conflicts,
    default_threads,
    deterministic_replacements,
    fingerprint,
    restore,
)
from lightning_easyscale.execution import Execution


@pytest.mark.parametrize(
    ("name", "canonical", "placement", "heterogeneous"),
    [
        ("D0", "D0", False, False),
        ("d1", "D1", True, False),
        ("d0+D2", "D0+D2", False, True),
        ("D1 + d2", "D1+D2", True, True),
        ("d2", "D1+D2", True, True),
    ],
)
def test_levels_parse(name, canonical, placement, heterogeneous):
    level = Level.parse(name)
    assert (str(level), level.placement_independent, level.heterogeneous) == (canonical, placement, heterogeneous)
    assert Level.parse(str(level)) == Level.parse(level) == level


@pytest.mark.parametrize("name", ["D3", "", "D0+D1", "D2+D1", "D1+", None, 1])
def test_other_levels_are_refused(name):
    with pytest.raises(ValueError, match=r"`determinism=.*` is no determinism level\. HINT: use one of 'D0'"):
        Level.parse(name)


@pytest.mark.parametrize("cuda", [False, True])
def test_flags_are_set_recorded_and_restored(monkeypatch, cuda):
    monkeypatch.delenv(CUBLAS_VARIABLE, raising=False)
    threads = torch.get_num_threads()
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    with applied(Level.parse("D1"), threads=threads + 1, device_type="cuda" if cuda else "cpu") as record:
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
        assert torch.get_num_threads() == threads + 1
        assert os.environ.get(CUBLAS_VARIABLE) == (":4096:8" if cuda else None)
        assert (record["level"], record["threads"], record["previous"]["threads"]) == ("D1", threads + 1, threads)
        assert record["deterministic_algorithms"] is True
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic) == before
    assert torch.get_num_threads() == threads
    assert CUBLAS_VARIABLE not in os.environ


def test_a_users_deterministic_workspace_is_kept_and_another_refused(monkeypatch):
    monkeypatch.setenv(CUBLAS_VARIABLE, ":16:8")
    record = apply(Level.parse("D0"), threads=1, device_type="cuda")
    assert record[CUBLAS_VARIABLE] == ":16:8"
    restore(record)
    monkeypatch.setenv(CUBLAS_VARIABLE, ":0:0")
    enabled = torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ValueError, match="`CUBLAS_WORKSPACE_CONFIG=:0:0` in the environment"):
        apply(Level.parse("D0"), threads=1, device_type="cuda")
    assert torch.are_deterministic_algorithms_enabled() == enabled


def test_bad_levels_and_threads_set_nothing():
    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match=r"`determinism='D1\+D2'` with the policy 'pinned' cannot run on CUDA"):
        apply(Level.parse("D2"), threads=1, device_type="cuda")
    with pytest.raises(ValueError, match="`threads_per_est=0`"):
        apply(Level.parse("D1"), threads=0, device_type="cpu")
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"benchmark": True, "deterministic": True}, "`benchmark=True`"),
        ({"benchmark": None, "deterministic": False}, "`deterministic=False`"),
        ({"benchmark": False, "deterministic": "warn"}, '`deterministic="warn"`'),
    ],
)
def test_conflicting_flags_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        check_conflicts(**flags)


@pytest.mark.parametrize("benchmark", [None, False])
@pytest.mark.parametrize("deterministic", [None, True])
def test_other_flags_pass(benchmark, deterministic):
    check_conflicts(benchmark=benchmark, deterministic=deterministic)


def test_default_threads_are_those_of_the_stock_launcher():
    assert [default_threads(n) for n in (1, 2, 3, 64)] == [_suggested_max_num_threads(n) for n in (1, 2, 3, 64)]
    assert default_threads(3, 16) == 5
    assert default_threads(8, 4) == 1
    with pytest.raises(ValueError, match="`num_ests=0`"):
        default_threads(0)


def test_fingerprint_is_plain_and_needs_no_lightning():
    found = fingerprint(["v100", "p100"])
    assert all(type(value) in (str, int) for value in found.values())
    assert found["torch"] == torch.__version__
    assert found["device_types"] == "v100,p100"
    assert {
        "format",
        "lightning",
        "cuda",
        "cudnn",
        "triton",
        "driver",
        "cpu",
        "cpu_capability",
        "python",
    } < found.keys()
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('det', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['det'] = module; spec.loader.exec_module(module)\n"
        "assert module.fingerprint([])['lightning'] and 'lightning' not in sys.modules\n"
    )
    path = sys.modules[Level.__module__].__file__
    subprocess.run([sys.executable, "-c", code, path], check=True, timeout=120)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("size", "out"), [((2, 3, 7, 7), (7, 7)), ((2, 3, 10, 13), (4, 6)), ((3, 5, 3), (7, 2)), ((1, 2, 6, 6), (3, 3))]
)
def test_replaced_pooling_has_the_bits_of_the_stock_cpu_kernel(monkeypatch, size, out, dtype):
    calls = []
    kernel = determinism._adaptive_avg_pool2d_backward
    monkeypatch.setattr(determinism, "_adaptive_avg_pool2d_backward", lambda *args: calls.append(1) or kernel(*args))

    def run():
        x = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=dtype, requires_grad=True)
        y = torch.nn.functional.adaptive_avg_pool2d(x, out)
        (y * torch.linspace(-1, 2, y.numel(), dtype=dtype).view_as(y)).sum().backward()
        return y.detach(), x.grad

    stock = run()
    assert calls == []
    with deterministic_replacements("cpu"):
        replaced = run()
    assert calls == [1]
    again = run()
    assert calls == [1]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(stock, replaced, again, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replaced_pooling_runs_under_strict_mode_on_cuda():
    x = torch.randn(2, 3, 10, 13)

    def gradient(device):
        leaf = x.to(device).requires_grad_()
        torch.nn.functional.adaptive_avg_pool2d(leaf, (4, 6)).square().sum().backward()
        return leaf.grad.cpu()

    with applied(Level.parse("D1"), threads=1, device_type="cuda"):
        with pytest.raises(RuntimeError, match="adaptive_avg_pool2d"):
            gradient("cuda")
        with deterministic_replacements():
            first = gradient("cuda")
            assert torch.equal(first, gradient("cuda"))
    torch.testing.assert_close(first, gradient("cpu"))


def test_the_strategy_puts_replacements_in_force_on_cuda():
    def replaced():
        return torch._C._dispatch_has_kernel_for_dispatch_key("aten::_adaptive_avg_pool2d_backward", "CUDA")

    before = replaced()
    for kind, expected in (("cpu", before), ("cuda", True)):
        strategy = SimpleNamespace(policy="pinned", root_device=torch.device(kind))
        with Execution(strategy, None, ())._arithmetic(SimpleNamespace(callbacks=[])):
            assert replaced() == expected
        assert replaced() == before


@pytest.mark.gpu
def test_a_module_that_pools_trains_on_cuda(tmp_path):
    class Pools(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(24, 1)

        def training_step(self, batch, index):
            x = torch.nn.functional.adaptive_avg_pool2d(self.first(batch), (2, 3))
            return self.last(x.flatten(1)).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = pl.Trainer(
        **{"strategy": EasyScaleStrategy(num_ests=2), "accelerator": "cuda", "devices": 1, "max_steps": 2},
        **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
    )
    trainer.fit(Pools(), torch.utils.data.DataLoader(torch.randn(8, 3, 9, 11), batch_size=2))
    assert trainer.global_step == 2
