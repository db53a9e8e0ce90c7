"""What an executor loads before others wait for it."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_easyscale import warm_up
from lightning_easyscale.runtime import peers

from .ports import free_port


def generators(device: torch.device) -> list[Any]:
    states: list[Any] = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    return states + ([torch.cuda.get_rng_state(device).tolist()] if device.type == "cuda" else [])


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_it_draws_no_number_and_leaves_no_group(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_up, "_done", False)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.init()
    before = generators(device)
    warm_up.warm_up(device, "nccl" if kind == "cuda" else "gloo")
    assert generators(device) == before
    assert not dist.is_initialized()


def test_a_change_of_executors_does_not_look_through_what_was_there_before() -> None:
    code = (
        "import torch, gc, sys; from lightning_easyscale.warm_up import warm_up; before = gc.get_freeze_count();"
        "warm_up(torch.device('cpu'), 'gloo'); warm_up(torch.device('cpu'), 'gloo');"
        "assert before == 0 and gc.get_freeze_count() > 10_000 and 'omegaconf' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_executor_meets_one_that_listens_late(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    stores: list[dist.TCPStore] = []

    def listen() -> None:
        time.sleep(0.3)
        stores.append(dist.TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False))

    thread = threading.Thread(target=listen)
    thread.start()
    began = time.monotonic()
    peers._await_listener(timedelta(seconds=20))
    assert time.monotonic() - began >= 0.3
    thread.join()
    # Whoever looked has not counted as a worker, and has not disturbed the store.
    client = dist.TCPStore("127.0.0.1", port, 2, is_master=False, wait_for_workers=False)
    client.set("key", "value")
    assert stores[0].get("key") == b"value"


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    began = time.monotonic()
    peers._await_listener(timedelta(seconds=0.2))
    assert 0.2 <= time.monotonic() - began < 10
