"""On a GPU: 20 steps of a workload under D2's `portable` policy have the bits of the CPU and its emulated types."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hydra")

from lightning_easyscale.compare import compare
from lightning_easyscale.emulation import EMULATED_TYPES
from lightning_easyscale.kernels import build
from recipes.workloads import prepare

from ..kernels.steps import train_on
from ..recipes.test_workloads import NAMES, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.emulation,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(build.why_unavailable()), reason=build.why_unavailable() or "available"),
]


@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_of_a_workload_on_a_gpu_have_the_bits_of_every_cpu_type(
    name: str, tmp_path: Path, tmp_path_factory: Any
) -> None:
    workload = tiny(name)
    folder = prepare(workload, tmp_path_factory.getbasetemp() / "workloads")
    kinds = ("gpu", *EMULATED_TYPES)
    with ThreadPoolExecutor(len(kinds)) as pool:
        on_gpu, *on_cpu = pool.map(lambda kind: train_on(kind, workload, folder, tmp_path / kind), kinds)
    differences = {kind: compare(on_gpu, record) for kind, record in zip(EMULATED_TYPES, on_cpu, strict=True)}
    assert differences == dict.fromkeys(EMULATED_TYPES)
