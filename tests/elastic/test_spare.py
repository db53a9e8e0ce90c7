from __future__ import annotations

import threading
import time

import pytest

from lightning_easyscale.elastic.spare import Spares, wait_as_spare
from tests.ports import free_port


def test_spares_wait_for_an_executor_that_comes_later_and_for_the_end_of_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr("lightning_easyscale.elastic.spare._CONNECT_SECONDS", 0.2)
    ended: list[tuple[object, float]] = []

    def spare() -> None:
        with pytest.raises(SystemExit) as end:
            wait_as_spare(interval=0.01)
        ended.append((end.value.code, time.monotonic()))

    threads = [threading.Thread(target=spare) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    spares = Spares(2)
    time.sleep(0.3)
    before = time.monotonic()
    spares.release()
    for thread in threads:
        thread.join()
    assert [code for code, _ in ended] == [0, 0]
    assert all(when >= before for _, when in ended)
