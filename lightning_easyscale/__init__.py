"""Elastic data-parallel training for PyTorch Lightning, bit for bit equal to stock DDP.

Importing the package registers ``Trainer(strategy="easyscale")`` and ``Trainer(accelerator="easyscale")``.
"""

import sys

# The commands that train nothing need no Lightning, which takes seconds and hundreds of megabytes. While Python looks
# for the module of `python -m`, `sys.argv` begins so.
_COMMANDS = [
    "lightning_easyscale.elastic",
    "lightning_easyscale.elastic.snapshot_process",
    "lightning_easyscale.compare",
    "lightning_easyscale.doctor",
]
if not (sys.argv[:1] == ["-m"] and any(name in sys.orig_argv for name in _COMMANDS)):
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
