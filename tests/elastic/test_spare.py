from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from lightning_easyscale.elastic.spare import mark_finished, wait_as_spare


def test_a_spare_waits_for_the_end_of_this_run_not_of_an_earlier_one(tmp_path: Path) -> None:
    mark_finished(tmp_path)
    time.sleep(0.01)
    began = time.monotonic()
    timer = threading.Timer(0.3, mark_finished, [tmp_path])
    timer.start()
    with pytest.raises(SystemExit) as end:
        wait_as_spare(tmp_path, interval=0.01)
    assert end.value.code == 0
    assert time.monotonic() - began > 0.2
    timer.join()
