"""One module per group of features; importing the package registers them all."""

import importlib
import pkgutil

from lightning.pytorch import callbacks

MODULES = [f"{__name__}.{m.name}" for m in pkgutil.iter_modules(__path__)]
if not hasattr(callbacks, "EMAWeightAveraging"):
    MODULES.remove(f"{__name__}.weight_averaging")
for _name in MODULES:
    importlib.import_module(_name)
