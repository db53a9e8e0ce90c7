"""Stop signals of one process: the first asks, a second one ends it at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lightning_easyscale.elastic import notice
from lightning_easyscale.elastic.notice import STOPPED, StopNotice

SOURCE = Path(notice.__file__)


def run(body: str) -> subprocess.CompletedProcess[str]:
    """A process that has loaded the module alone, which takes milliseconds."""
    start = f"""
        import ctypes, importlib.util, os, signal, subprocess, sys, time
        spec = importlib.util.spec_from_file_location("notice", {str(SOURCE)!r})
        notice = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(notice)
        notice.SAME_NOTICE_SECONDS = 0.2
        def signal_after(seconds, number="TERM"):
            subprocess.Popen(["sh", "-c", f"sleep {{seconds}}; kill -{{number}} {{os.getpid()}}"])
        def stopping(**options):
            return notice.StopNotice([15, 10], end_children=lambda: print("children", flush=True), **options)
    """
    code = textwrap.dedent(start) + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_the_first_signal_asks() -> None:
    asked: list[int] = []
    with StopNotice([signal.SIGTERM], end_children=lambda: None) as listening:
        listening.ask(lambda: asked.append(1))
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # the same notice
        time.sleep(0.05)
    assert asked == [1]
    assert listening.requested == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_is_heard_while_the_main_thread_hangs() -> None:
    done = run("""
        import threading
        asked = threading.Event()
        with stopping() as listening:
            listening.ask(asked.set)
            def kill():
                # to this thread, as the system may do with a process's signal: the main one sleeps on
                signal.pthread_kill(threading.get_ident(), 15)
            threading.Timer(0.1, kill).start()
            lock = threading.Lock()
            lock.acquire()
            threading.Timer(3, lock.release).start()
            began = time.monotonic()
            threading.Thread(target=lambda: (asked.wait(), print(time.monotonic() - began < 2, flush=True))).start()
            lock.acquire()
    """)
    assert done.stdout == "True\n", done.stdout + done.stderr


@pytest.mark.fault("SIGTERM in start-up, before the executors are connected")
def test_before_there_is_anything_to_ask_it_ends_the_process() -> None:
    """Exit code 75, and what the process has started is ended."""
    done = run("""
        with stopping():
            os.kill(os.getpid(), 15)
            time.sleep(30)
    """)
    assert done.returncode == STOPPED, done.stderr
    assert done.stdout == "children\n"


@pytest.mark.parametrize("number", ["TERM", "USR1"])
@pytest.mark.fault("second SIGTERM or SIGUSR1 while the main thread hangs in native code")
def test_a_second_signal_ends_a_process_whose_main_thread_hangs(number: str) -> None:
    """The process ends at once with 128 + the signal."""
    done = run(f"""
        with stopping() as listening:
            listening.ask(lambda: print("asked", flush=True))
            os.kill(os.getpid(), 15)
            signal_after(0.5, {number!r})
            while True:
                ctypes.CDLL(None).sleep(30)  # a signal interrupts it; Python's handlers do not end the loop
    """)
    assert done.returncode == 128 + int(signal.Signals[f"SIG{number}"]), done.stderr
    assert done.stdout == "asked\nchildren\n"


def test_handlers_of_the_program_are_called_too() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    mine = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        with StopNotice([signal.SIGTERM, signal.SIGUSR1], end_children=lambda: None) as listening:
            listening.ask(lambda: None)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert listening.requested is None, "SIGUSR1 belongs to the program"
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGUSR1, signal.SIGTERM]
    finally:
        signal.signal(signal.SIGUSR1, mine)
