import os
from pathlib import Path

import pytest


@pytest.fixture
def shared_data():
    """The published figures' numbers; absent outside the project's own machines."""
    root = Path(os.environ.get("EASYSCALE_SHARED") or Path(__file__).parents[3] / "shared")
    if not (root / "data").is_dir():
        pytest.skip(f"published data not found under {root} (set EASYSCALE_SHARED)")
    return root / "data"
