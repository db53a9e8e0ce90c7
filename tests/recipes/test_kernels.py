"""The recipe that times D2's kernels: what it refuses, its arithmetic, and all operations in small from end to end."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lightning_easyscale.kernels import build, portable
from recipes import _kernel_timing, kernels
from recipes._config import ConfigError
from recipes._kernel_cases import GROUPS, cases
from recipes._kernel_timing import Stopwatch, peak
from recipes.kernels import KernelsConf, check, run, summary, tables

ROOT = Path(__file__).parents[2]
IN_SMALL = {"size": "smoke", "accelerator": "cpu", "blocks": 1, "sample_ms": 0.1, "threads": 1, "ways": ["d1", "d2"]}
compiles = pytest.mark.skipif(bool(build.why_unavailable()), reason=build.why_unavailable() or "available")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": ["fft"]}, "`groups` has 'fft'. HINT: there are product"),
        ({"ways": ["d3"]}, "`ways` has 'd3'"),
        ({"ways": ["d1"]}, r"`ways=\['d1'\]` compares nothing"),
        ({"size": "huge"}, "`size=huge`"),
        ({"accelerator": "tpu"}, "`accelerator=tpu`"),
        ({"blocks": 0}, "`blocks` is at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        check(KernelsConf(**{"accelerator": "cpu", **options}))


def test_without_a_compiler_the_cure_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="HINT: (install g\\+\\+|run on)"):
        check(KernelsConf(**IN_SMALL))


def test_both_sizes_have_the_same_operations():
    small, full = cases("smoke"), cases("full")
    assert [(c.group, c.title) for c in small] == [(c.group, c.title) for c in full]
    assert len({c.title for c in full}) == len(full)
    assert {c.group for c in full} == set(GROUPS)
    assert all((c.flops > 0) != (c.bytes > 0) for c in full)
    product = next(c for c in full if c.title == "BERT feed-forward, forward")
    assert product.flops == 2 * 3072 * 768 * 3072
    depthwise = next(c for c in full if c.title == "ShuffleNetv2 depthwise 3x3/2 58, input gradient")
    assert depthwise.flops == 2 * 128 * 58 * 28 * 28 * 9


@compiles
@pytest.mark.parametrize("case", cases("smoke"), ids=lambda case: case.title)
def test_d2_computes_what_torch_computes(case):
    if "dropout" in case.title:
        pytest.skip("draws other numbers")
    operands = case.make(torch.device("cpu"))
    expected = case.begin(*operands)()
    with portable():
        made = case.begin(*operands)()
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (made, expected)), strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_rates_and_ratios_are_of_the_same_turn():
    times = {"d1": {"device": [1.0, 2.0, 4.0], "wall": [2.0] * 3}, "d2": {"device": [2.0, 5.0, 8.0], "wall": [3.0] * 3}}
    row = {"group": "product", "name": "x", "part": "forward", "flops": 4 * 10**9, "bytes": 0, "times_ms": times}
    made = summary(row, 2.0)
    assert (made["d2_to_d1_device"], made["d2_to_d1_device_least"], made["d2_to_d1_device_greatest"]) == (2.0, 2.0, 2.5)
    assert made["d2_to_d1_wall"] == 1.5
    assert (made["d1_tflops"], made["d1_of_peak"], made["d2_tflops"]) == (2.0, 1.0, 0.8)
    assert made["d2_gbs"] is None
    assert summary({**row, "flops": 0, "bytes": 10**9}, None)["d2_gbs"] == 200.0


def test_a_stopwatch_finds_how_many_calls_it_needs():
    calls = []
    watch = Stopwatch(lambda: calls.append(1), gpu=False)
    watch.settle(1e-4)
    before = len(calls)
    assert watch.calls > 1
    assert watch.wall() == watch.device() > 0
    assert len(calls) - before == watch.calls
    assert peak(gpu=False)[0] is None


class Device:
    """Stands for a GPU whose queue takes so many calls; a call takes a millisecond."""

    def __init__(self, monkeypatch, room):
        self.room, self.events, self.queue = room, [], 0
        for name, value in (("Event", self.event), ("synchronize", lambda: None), ("_sleep", self.sleep)):
            monkeypatch.setattr(torch.cuda, name, value)

    def sleep(self, cycles):
        assert cycles > 0
        self.queue = 0

    def call(self):
        self.queue += 1

    def event(self, *, enable_timing):
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.at = self.device.queue

    def query(self):
        return self.device.queue > self.device.room

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return float(other.at - self.at)


@pytest.mark.parametrize(("room", "queued"), [(100, True), (10, True), (0, False)])
def test_a_device_is_timed_with_as_many_calls_as_can_be_queued(monkeypatch, room, queued):
    device = Device(monkeypatch, room)
    watch = Stopwatch(device.call, gpu=True)
    watch.settle(1.0)
    assert watch.calls == 64
    assert watch.device() == pytest.approx(1e-3)
    assert watch.queued is queued
    assert device.queue == {100: 64, 10: 8, 0: 1}[room]


def test_the_peak_is_that_of_multiprocessors_lanes_and_clock(monkeypatch):
    properties = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(_kernel_timing, "_clock", lambda: (1980.0, "highest by nvidia-smi"))
    tflops, how = peak(gpu=True)
    assert tflops == pytest.approx(66.9, abs=0.05)
    assert how == "132 multiprocessors x 128 lanes x 2 x 1980 MHz (highest by nvidia-smi)"


@compiles
def test_all_operations_in_small_go_on_where_they_stopped(tmp_path, monkeypatch):
    console = Console(quiet=True)
    run(KernelsConf(**IN_SMALL, seconds=0.0), tmp_path, console)
    assert len(json.loads((tmp_path / "kernels.json").read_text())["rows"]) == 1

    def failing(case, *rest, measure=kernels.measure):
        if case.group == "optimizer":
            raise RuntimeError("no memory")
        return measure(case, *rest)

    monkeypatch.setattr(kernels, "measure", failing)
    run(KernelsConf(**IN_SMALL), tmp_path, console)
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert [*report["failed"].values()] == ["RuntimeError: no memory"] * 2
    assert len(report["rows"]) == len(cases("smoke")) - 2
    assert len(list(tables(report))) == len(GROUPS)  # without the optimizers', with a first line
    with (tmp_path / "kernels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report["rows"])
    assert all(float(row["d2_to_d1_device"]) > 0 for row in rows)
    with pytest.raises(ConfigError, match="measured in another way"):
        run(KernelsConf(**{**IN_SMALL, "blocks": 2}), tmp_path, console)


@compiles
def test_the_command_line(tmp_path):
    def command(*options):
        whole = [sys.executable, "-m", "recipes.kernels", f"hydra.run.dir={tmp_path}", *options]
        return subprocess.run(
            whole, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200
        )

    small = ["size=smoke", "accelerator=cpu", "groups=[softmax]", "blocks=1", "sample_ms=0.1", "threads=1"]
    for options in (small, ["plot_only=true"]):
        done = command(*options)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "softmax, BERT, backward" in done.stdout
        assert (tmp_path / "kernels.png").read_bytes()[:4] == b"\x89PNG"
        (tmp_path / "kernels.png").unlink()
    done = command("block=3")
    assert done.returncode != 0
    assert "Key 'block' not in 'KernelsConf'" in done.stderr
