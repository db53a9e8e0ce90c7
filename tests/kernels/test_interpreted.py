"""Kernels have the bits of the composed forms, as far as Triton's interpreter runs them. Needs Triton, but no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_easyscale.kernels import build

pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(bool(build.why_unavailable()), reason=build.why_unavailable() or "available")

ROOT = Path(__file__).parents[2]
KERNELS = {
    "batch_norms": ["batch_norm", "batch_norm_backward"],
    "folds": ["fold"],
    "pools": ["avg_pool", "avg_pool_backward", "max_pool_backward"],
    "depthwise": ["depthwise_weight_gradient", "fold"],
    "squares": ["gradient_of_squares", "gradient_squares", "input_squares", "output_squares", "weight_squares"],
    "attentions": ["attention_weights", "attention_weights_backward"],
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KERNELS)
def test_kernels_have_the_bits_of_the_composed_forms(kind: str) -> None:
    given = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.kernels.interpret", kind]
    made = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines() == [f"launched: {' '.join(KERNELS[kind])}"]
