"""Lightning's file loggers, made to go on where a run has stopped; like `_lightning.py`, it uses underscored names.

Lightning starts a new version of a log in every process, and its CSV writer deletes what it finds. A resumed elastic
run is the same run.
"""

from __future__ import annotations

import csv
import os
import warnings
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def log_versions(trainer: Trainer) -> list[dict[str, Any]]:
    """Of every logger of `trainer`: its class, name and version, and how many rows its CSV file has."""
    return [
        {
            "class": type(logger).__name__,
            "name": str(logger.name),
            "version": logger.version if isinstance(logger.version, (int, str)) else None,
            "rows": len(_rows(logger)) if isinstance(logger, CSVLogger) else 0,
        }
        for logger in trainer.loggers
    ]


def continue_logs(trainer: Trainer, versions: list[dict[str, Any]], *, writes: bool) -> None:
    """Let the loggers of `trainer` write into the versions that `log_versions` named.

    A logger that has begun to write, or that the script gives another name, is left as it is.

    Args:
        trainer: the trainer, before it runs.
        versions: from `log_versions`.
        writes: whether this process is the one that writes.
    """
    for logger, saved in zip(trainer.loggers, versions, strict=False):
        same = type(logger).__name__ == saved["class"] and str(logger.name) == saved["name"]
        if not same or not isinstance(logger, (CSVLogger, TensorBoardLogger)) or logger._experiment is not None:
            continue
        logger._version = saved["version"]
        if writes and isinstance(logger, CSVLogger):
            rows = _rows(logger)[: saved["rows"]]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
                logger.experiment.metrics = rows  # the file is written again with the first new row
            logger.save()


def _rows(logger: CSVLogger) -> list[dict[str, Any]]:
    path = os.path.join(logger.log_dir, "metrics.csv")
    if not os.path.isfile(path):
        return []
    with open(path, newline="") as file:
        return [{key: value for key, value in row.items() if value != ""} for row in csv.DictReader(file)]
