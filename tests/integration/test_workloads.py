"""The equality with stock DDP holds for every workload of the recipes, on its real data, in a small size."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hydra")

from recipes.workloads import prepare

from ..recipes.test_workloads import tiny
from .harness import RunFailedError, Runs, compare
from .scenarios import MODULES

JOB = "tests.integration.scenarios.workloads:workload_job"
SLOW = ("shufflenetv2", "resnet50", "vgg19", "electra")
NAMES = ("neumf", "yolov3", "bert", "swin", *SLOW)


@pytest.fixture(scope="module")
def warm_runs() -> Iterator[Runs]:
    """Their processes are forked from one that has imported the models, which takes seconds."""
    models = ("transformers.models.bert.modeling_bert", "transformers.models.swin.modeling_swin")
    runs = Runs([*MODULES, *(models if find_spec("transformers") else ())])
    yield runs
    runs.close()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.matrix] if name in SLOW else []) for name in NAMES]
)
def test_workload_equals_stock_ddp_through_two_moves(warm_runs: Runs, tmp_path: Path, name: str) -> None:
    workload = tiny(name)
    config: dict[str, Any] = {"workload": workload, "data": str(prepare(workload, tmp_path))}
    reference = warm_runs.reference(JOB, config, 2)
    if reference.error is not None:
        raise RunFailedError(f"{reference.error['traceback']}\n{reference.error['log']}")
    # In the middle of the first epoch, and of the second.
    compare(reference, warm_runs.elastic(JOB, config, [((2,), 3), ((1, 1), 6), ((2,), None)]))
