import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_easyscale

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE_DIRECTORIES = {"lightning_easyscale": "lightning_easyscale", "conf": "lightning_easyscale.conf"}
PACKAGE_DIRECTORIES["recipes"] = "lightning_easyscale.recipes"


def python_packages(top):
    """Every directory under `top` that has an `__init__.py`, as an import name."""
    for init in sorted((ROOT / top).rglob("__init__.py")):
        inner = init.parent.relative_to(ROOT / top).parts
        yield ".".join([PACKAGE_DIRECTORIES[top], *inner])


def test_every_package_is_in_the_distribution():
    found = {name for top in PACKAGE_DIRECTORIES for name in python_packages(top)}
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_version_is_the_same_everywhere():
    assert lightning_easyscale.__version__ == PROJECT["project"]["version"]


def test_no_extra_but_vision_pulls_torchvision():
    extras = PROJECT["project"]["optional-dependencies"]
    assert extras["vision"] == ["torchvision"]
    others = [*PROJECT["project"]["dependencies"], *(r for name in extras if name != "vision" for r in extras[name])]
    assert not [requirement for requirement in others if re.match(r"torchvision|.*\[.*vision", requirement)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A directory with what `pip install .` copies, built from a copy of the source tree."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for top in PACKAGE_DIRECTORIES:
        shutil.copytree(ROOT / top, source / top, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*pip, "--target", str(target), str(source)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return target


def test_an_installed_copy_imports_with_conf_and_recipes(installed, tmp_path):
    code = (
        "import lightning_easyscale, lightning_easyscale.conf, lightning_easyscale.recipes as r;"
        "print(lightning_easyscale.__file__, r.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(installed)) for path in done.stdout.split())


def test_an_installed_copy_has_every_configuration_file_and_the_type_marker(installed):
    wanted = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    package = installed / "lightning_easyscale"
    assert {path.relative_to(package / "conf") for path in (package / "conf").rglob("*.yaml")} == wanted
    assert (package / "py.typed").exists()


def imported_modules(path):
    """Absolute names of all modules that `path` imports or imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


PACKAGE = ROOT / "lightning_easyscale"
# What runs inside Lightning; everything else is the core, which knows nothing of it.
GLUE = {
    "callbacks.py",
    "progress.py",
    "rebalance.py",
    "checkpointing.py",
    "portability.py",
    "seed.py",
    "snapshot.py",
    "topology.py",
    "__init__.py",
    "_lightning.py",
    "accelerator.py",
    "launcher.py",
    "strategy.py",
}
GLUE |= {"execution.py", "_lightning_loggers.py", "_lightning_loops.py", "_lightning_steps.py", "stopping.py"}
GLUE |= {"checkpoint_strategy.py", "model_strategy.py", "optimization.py", "session.py", "virtual_environment.py"}


def lightning_imports(path):
    return [name for name in imported_modules(path) if name.split(".")[0] in ("lightning", "pytorch_lightning")]


def test_only_the_glue_imports_lightning():
    importing = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if lightning_imports(path)}
    assert importing <= GLUE


def test_underscored_lightning_names_are_imported_in_one_place():
    for path in set(PACKAGE.rglob("*.py")) - {PACKAGE / "_lightning.py"}:
        assert not [name for name in lightning_imports(path) if "._" in name], path


@pytest.mark.parametrize("room", ["planning", "simulation"])
def test_planning_and_simulation_import_no_torch(room):
    for path in (PACKAGE / room).rglob("*.py"):
        assert not [m for m in imported_modules(path) if m.split(".")[0] in ("torch", "lightning")], path


def test_make_lists_its_commands():
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    done = subprocess.run([make, "help"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    for target in ("demo", "test", "test-all", "test-gpu", "test-machine-code", "clean"):
        assert re.search(rf"^  make {target} ", done.stdout, re.MULTILINE)


def test_make_says_what_is_wrong_with_an_unusable_python(tmp_path):
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    command = [make, "install", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode != 0
    assert "older than 3.10. HINT" in done.stderr
