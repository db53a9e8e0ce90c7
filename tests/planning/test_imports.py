import ast
from pathlib import Path

import pytest

import lightning_easyscale.planning
import lightning_easyscale.simulation

PACKAGES = [Path(p.__file__).parent for p in (lightning_easyscale.planning, lightning_easyscale.simulation)]
FORBIDDEN = {"torch", "lightning", "pytorch_lightning", "torchmetrics", "pandas"}


@pytest.mark.parametrize("path", [f for p in PACKAGES for f in sorted(p.rglob("*.py"))], ids=lambda p: p.stem)
def test_neither_torch_nor_lightning_is_imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not FORBIDDEN & {n.split(".")[0] for n in names}
