"""One heap for all threads: what a thread has freed serves the next."""

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys, threading
from pathlib import Path
import torch
from lightning_easyscale.runtime.heap import share_heap

torch.set_num_threads(1)
# M_TRIM_THRESHOLD: what is free stays.
getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)(-1, 1 << 30)
shared = share_heap() if sys.argv[1] == "shared" else None

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def work(turn):
    tensors = [torch.zeros(20_000) for _ in range(1000)]  # 80 kB each, below the size that is mapped by itself
    del tensors
    done.set()
    stay.wait()

stay = threading.Event()
grown = []
for turn in range(3):
    done, before = threading.Event(), resident()
    threading.Thread(target=work, args=(turn,)).start()
    done.wait()
    grown.append(resident() - before)
stay.set()
print(shared, *grown)
"""


def test_what_one_thread_frees_serves_the_next():
    def grown(how):
        out = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True).stdout
        able, *numbers = out.split()
        return able, list(map(int, numbers))

    able, shared = grown("shared")
    if able != "True":
        pytest.skip("the C library is not glibc")
    assert sum(shared[1:]) < 20e6
    assert sum(grown("separate")[1][1:]) > 100e6
