"""D2's `portable` policy on whole workloads: training steps have the same bits on every emulated type of the CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("hydra")

from lightning_easyscale.compare import compare
from lightning_easyscale.kernels import build
from recipes.workloads import prepare

from ..recipes.test_workloads import tiny
from .steps import train_on

pytestmark = [
    pytest.mark.emulation,
    pytest.mark.skipif(bool(build.why_unavailable()), reason=build.why_unavailable() or "available"),
]


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("mnist_conv", ("v100", "t4")),
        *(pytest.param(name, ("v100", "p100", "t4"), marks=pytest.mark.matrix) for name in ("neumf", "bert", "swin")),
    ],
)
def test_twenty_steps_of_a_workload_have_the_same_bits_on_every_emulated_type(name, types, tmp_path, tmp_path_factory):
    workload = tiny(name)
    folder = prepare(workload, tmp_path_factory.getbasetemp() / "workloads")
    with ThreadPoolExecutor(2) as pool:
        first, *others = pool.map(lambda kind: train_on(kind, workload, folder, tmp_path / kind), types)
    for record in others:
        assert compare(record, first) is None
