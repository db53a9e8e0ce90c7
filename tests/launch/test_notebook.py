"""In a notebook: one device needs no other process, several are forked, and a script cannot be run again."""

from __future__ import annotations

import sys

from .test_launch import finish, start

# What IPython sets; Lightning looks for it when it is imported.
NOTEBOOK = """
import sys
sys.ps1 = ">>> "
import warnings
warnings.simplefilter("ignore")
import lightning.pytorch as pl
from lightning_easyscale import EasyScaleStrategy
from tests.launch.job import Classifier, loader, make_trainer

def train(devices, start_method):
    pl.seed_everything(5, verbose=False)
    strategy = EasyScaleStrategy(num_ests=3, start_method=start_method, threads_per_est=1)
    trainer = make_trainer(None, strategy=strategy, devices=devices, max_epochs=1, barebones=False)
    module = Classifier()
    trainer.fit(module, loader())
    return {name: value.tolist() for name, value in module.named_parameters()}

try:
    train(2, "popen")
except RuntimeError as error:
    print("refused:", error)
forked = train(2, "fork")
print("equal:", train(1, "popen") == forked)
"""


def test_a_notebook() -> None:
    (output,) = finish(start([sys.executable, "-c", NOTEBOOK]))
    assert "refused: `2` devices need as many processes" in output
    assert "HINT: `EasyScaleStrategy(..., start_method='fork')`, or one device" in output
    assert "equal: True" in output
