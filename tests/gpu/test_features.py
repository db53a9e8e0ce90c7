"""Features that need a CUDA device, with the bits of stock DDP: three ranks that share one GPU over gloo."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from .features import FEATURES
from .test_parity import assert_equal, run

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
ON_CUDA = ("SyncBatchNorm", "skipped step under 16-mixed")


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_equals_stock_ddp(feature: str, tmp_path: Path) -> None:
    if feature in ON_CUDA and not torch.cuda.is_available():
        pytest.skip(f"{feature} exists on CUDA only")
    common = {"n": 3, "model": feature, "reduction": "ddp", "steps": 6, "digest_at": [2, 3, 6]}
    with ThreadPoolExecutor(3) as pool:
        reference = pool.submit(run, tmp_path, "reference", processes=3, kind="ddp", **common)
        ours = [
            pool.submit(run, tmp_path, f"ours{split}", processes=len(split), kind="easyscale", split=split, **common)
            for split in ([3], [2, 1])
        ]
    for result in ours:
        assert_equal(result.result(), reference.result())
