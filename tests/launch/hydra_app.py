"""The same as a Hydra application that changes the working directory."""

from __future__ import annotations

import argparse
from pathlib import Path

import hydra
import lightning.pytorch as pl
from omegaconf import DictConfig

from tests.launch.script import run


@hydra.main(version_base="1.3", config_path=None)
def main(config: DictConfig) -> None:
    pl.seed_everything(11, verbose=False)
    Path("where").mkdir(exist_ok=True)  # relative to the job's directory
    defaults = {"num_nodes": 1, "accelerator": "cpu", "determinism": "D1", "start_method": "popen", "fail": None}
    run(argparse.Namespace(out=Path(config.out), devices="2", num_ests=3, **defaults))


if __name__ == "__main__":
    main()
