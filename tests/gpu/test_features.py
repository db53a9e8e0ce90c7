"""Features that need a CUDA device, with the bits of stock DDP: three ranks that share one GPU over gloo."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from .features import FEATURES
from .test_parity import assert_equal, run

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
ON_CUDA = ("SyncBatchNorm", "skipped step under 16-mixed")


@pytest.mark.parametrize("split", [(3,), (2, 1)], ids=lambda split: "+".join(map(str, split)))
@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_equals_stock_ddp(
    feature: str, split: tuple[int, ...], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    device = "GPU" if torch.cuda.is_available() else "CPU"
    if feature in ON_CUDA and device == "CPU":
        pytest.skip(f"{feature} exists on CUDA only")
    placement = "+".join(map(str, split))
    named = {"feature": feature, "group": FEATURES[feature].group, "placement": placement, "device": device}
    for name, value in named.items():
        record_property(name, value)
    common = {"n": 3, "model": feature, "reduction": "ddp", "steps": 6, "digest_at": [2, 3, 6]}
    with ThreadPoolExecutor(2) as pool:
        reference = pool.submit(run, tmp_path, "reference", processes=3, kind="ddp", **common)
        ours = pool.submit(run, tmp_path, "ours", processes=len(split), kind="easyscale", split=list(split), **common)
    assert_equal(ours.result(), reference.result())
