"""On a GPU: Fig. 9's recipe with stages on the GPU, on CPU executors and on both at a time."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

pytest.importorskip("hydra")
from rich.console import Console

from lightning_easyscale.kernels import build
from recipes.accuracy_consistency import run

from ..recipes.test_accuracy_consistency import configure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(build.why_unavailable()), reason=build.why_unavailable() or "available"),
]
TO_THE_CPU_AND_BACK = (
    "{devices: {gpu: 1}, steps: 3}, {devices: {cpu: 2}, steps: 3}, {devices: {gpu: 1, cpu: 1}, steps: 3}"
)
LED_BY_THE_CPU = "{devices: {cpu: 1, gpu: 1}, steps: 3}, {devices: {gpu: 1}, steps: 3}"


def equal(folder: Path, stages: str, *overrides: str) -> dict[str, dict[str, bool]]:
    """Where each level equals its reference, stock DDP of three processes on devices of the first type."""
    pytest.importorskip("mlxtend")
    conf = configure(
        "experiment=fig9_gpu_cpu",
        "schedule.num_ests=3",
        f"schedule.stages=[{stages}]",
        "workload.batch_size=8",
        "threads_per_est=2",
        "jobs=4",
        *overrides,
    )
    console = Console(file=io.StringIO(), width=200)
    assert run(conf, folder, console) == 0, console.file.getvalue()
    return json.loads((folder / "report.json").read_text())["equal"]


def test_d2_equals_stock_ddp_from_gpu_to_cpu_and_back_and_d1_as_long_as_it_is_on_the_gpu(tmp_path):
    assert equal(tmp_path, TO_THE_CPU_AND_BACK) == {
        "d1": {"stage_0": True, "stage_1": False, "stage_2": False},
        "d1+d2": {"stage_0": True, "stage_1": True, "stage_2": True},
    }


def test_a_gpu_led_by_a_cpu_equals_stock_ddp_of_the_cpu(tmp_path):
    assert equal(tmp_path, LED_BY_THE_CPU, "determinism=d1_d2") == {"d1+d2": {"stage_0": True, "stage_1": True}}
