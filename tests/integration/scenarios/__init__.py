"""One module per group of features; importing the package registers them all."""

import importlib
import pkgutil

MODULES = [f"{__name__}.{m.name}" for m in pkgutil.iter_modules(__path__)]
for _name in MODULES:
    importlib.import_module(_name)
