"""Five scripts of the kind found in Lightning's examples, from the command line, changed in the strategy only.

The whole run is compared with stock DDP's: the record (every step's losses on every rank, digests of parameters,
buffers and optimizer state, logged metrics), the last checkpoint and the metrics that the loggers wrote.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_easyscale.compare import compare
from tests.launch.test_launch import ROOT, environment, finish, start

pytestmark = pytest.mark.timeout(600)
SCRIPTS = ["autoencoder", "language_model", "gan", "image_classifier", "contrastive"]
# Each of a GAN's losses leaves one network, and a frozen backbone itself, without gradients.
UNUSED = ("gan", "image_classifier")
# (script, N, devices): one executor and two uneven ones, N over 2, 3, 4.
CASES = [("autoencoder", 3, 2)]
MORE = [(s, n, d) for s in SCRIPTS for n, d in ((2, 1), (3, 2), (4, 1)) if (s, n, d) not in CASES]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .digits import Digits

    folder = tmp_path_factory.mktemp("digits")
    Digits(str(folder)).prepare_data()
    return folder


def command(script: str, strategy: str, devices: int, data: Path, out: Path) -> list[str]:
    base = [sys.executable, "-m", f"tests.scripts.{script}"]
    if script in UNUSED:
        strategy += "_find_unused_parameters_true"
    if script != "autoencoder":
        return [*base, f"--strategy={strategy}", f"--devices={devices}", f"--data={data}", f"--out={out}"]
    callbacks = [f"--trainer.callbacks+=lightning_easyscale.{name}" for name in ("RunRecord", "DeterminismCallback")]
    ours = strategy != "ddp"
    return [
        *base,
        "--trainer.strategy=" + ("lightning_easyscale.EasyScaleStrategy" if ours else strategy),
        *(["--trainer.strategy.threads_per_est=1"] if ours else []),
        f"--trainer.devices={devices}",
        f"--data.folder={data}",
        f"--trainer.default_root_dir={out}",
        callbacks[0],
        f"--trainer.callbacks.dirpath={out}/record",
        "--trainer.callbacks.digest_every_n_steps=2",
        *([] if ours else [callbacks[1], "--trainer.callbacks.threads=1"]),
    ]


def train(script: str, strategy: str, n: int, devices: int, data: Path, out: Path) -> Path:
    variables = {"EASYSCALE_NUM_ESTS": str(n)} if strategy != "ddp" else {}
    finish(start(command(script, strategy, devices, data, out), **variables), seconds=270)
    return out


def written(out: Path, pattern: str) -> dict[str, Path]:
    return {str(p.relative_to(out)): p for p in sorted(out.rglob(pattern))}


def assert_records_equal(a: Path, b: Path) -> None:
    """By the command that the README names."""
    done: Any = subprocess.run(
        [sys.executable, "-m", "lightning_easyscale.compare", str(a), str(b)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("bitwise equal")


def run_case(case: tuple[str, int, int], data: Path, tmp_path: Path) -> None:
    script, n, devices = case
    if script == "contrastive":
        pytest.importorskip("lightning", minversion="2.6")
    stock = train(script, "ddp", n, n, data, tmp_path / "stock")
    ours = train(script, "easyscale", n, devices, data, tmp_path / "ours")
    assert_records_equal(stock / "record", ours / "record")
    checkpoints = written(stock, "*.ckpt")
    assert checkpoints
    assert list(checkpoints) == list(written(ours, "*.ckpt"))
    for name, file in checkpoints.items():
        difference = compare(file, ours / name)
        assert difference is None, str(difference)
    for name, file in written(stock, "metrics.csv").items():
        assert file.read_text() == (ours / name).read_text()


@pytest.mark.parametrize("case", CASES, ids="-".join(["%s"] * 3).__mod__)
def test_a_script_equals_stock_ddp(case: tuple[str, int, int], data: Path, tmp_path: Path) -> None:
    run_case(case, data, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("case", MORE, ids="-".join(["%s"] * 3).__mod__)
def test_a_script_equals_stock_ddp_in_the_full_product(case: tuple[str, int, int], data: Path, tmp_path: Path) -> None:
    run_case(case, data, tmp_path)
