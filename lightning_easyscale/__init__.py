"""Elastic data-parallel training for PyTorch Lightning, bit for bit equal to stock DDP.

Importing the package registers ``Trainer(strategy="easyscale")`` and ``Trainer(accelerator="easyscale")``.
"""

from .accelerator import EasyScaleAccelerator
from .callbacks import DeterminismCallback, RunRecord
from .placement import Placement
from .rebalance import Rebalance
from .reduction.hook import ordered_allreduce_hook
from .strategy import EasyScaleStrategy

__version__ = "0.1.0"

__all__ = [
    "DeterminismCallback",
    "EasyScaleAccelerator",
    "EasyScaleStrategy",
    "Placement",
    "Rebalance",
    "RunRecord",
    "__version__",
    "ordered_allreduce_hook",
]
