"""The workloads of the recipes: eight published ones and a small convolutional net, each with its data.

A workload is a Lightning module and a datamodule, made by `build` from a plain mapping (`WorkloadConf` as a dict), so
that every process of a run makes the same ones. Its ``data`` is one of

- ``small``: real data that a package brings, read offline;
- ``synthetic``: random data of the same shapes, for measuring speed;
- ``full``: the user's own copy of a data set in its usual format, at ``path``.

Models and data draw from the generators that ``seed_everything`` seeds and keep none of their own, so that a checkpoint
taken inside an epoch continues exactly. Whatever a package is needed for is imported only when it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from ._common import Loaders

TASKS = {
    "small_conv": "classification",
    "shufflenetv2": "classification",
    "resnet50": "classification",
    "vgg19": "classification",
    "swin": "classification",
    "yolov3": "detection",
    "neumf": "recommendation",
    "bert": "question_answering",
    "electra": "question_answering",
}
"""Model -> the module here that builds it."""

DATA = ("small", "synthetic", "full")


def prepare(workload: Mapping[str, Any], directory: Path) -> Path:
    """Write what the small data needs into ``directory``, once, and return it.

    Raises:
        ImportError: if the package that brings the data is missing.
        ValueError: as `build`.
    """
    task = _task(workload)
    directory.mkdir(parents=True, exist_ok=True)
    if workload["data"] == "small" and hasattr(task, "prepare"):
        task.prepare(directory)
    return directory


def build(workload: Mapping[str, Any], directory: str | Path) -> tuple[pl.LightningModule, Loaders]:
    """The module and the data of a workload.

    Args:
        workload: the fields of `WorkloadConf`.
        directory: what `prepare` returned.

    Raises:
        ImportError: if a package is missing.
        ValueError: for a model, source, data choice or argument of ``net`` that there is not.
        FileNotFoundError: if ``path`` lacks a file of the user's data set.
    """
    task = _task(workload)
    try:
        module, data = task.build(workload, Path(directory))
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"`workload.net={dict(workload['net'])}` does not fit {workload['model']}: {error}") from error
    data.workers, data.persistent_workers = workload["workers"], workload["persistent_workers"]
    data.validation_batch_size = workload["validation_batch_size"] or data.validation_batch_size
    return module, data


def _task(workload: Mapping[str, Any]) -> Any:
    if workload["model"] not in TASKS:
        raise ValueError(f"`workload.model={workload['model']}` is unknown. HINT: there are {', '.join(TASKS)}.")
    if workload["data"] not in DATA:
        raise ValueError(f"`workload.data={workload['data']}` is unknown. HINT: there are {', '.join(DATA)}.")
    if (workload["data"] == "full") != (workload["path"] is not None):
        raise ValueError(
            f"`workload.data={workload['data']}` with `workload.path={workload['path']}`."
            " HINT: `path` names your copy of the data set and belongs to `workload.data=full`."
        )
    return import_module(f"{__name__}.{TASKS[workload['model']]}")
