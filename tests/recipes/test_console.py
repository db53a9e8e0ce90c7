"""How recipes end when their user has made a mistake or has had enough."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from recipes._console import errors_as_lines


def ended_by(error: BaseException, **options: str) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=80)
    with pytest.raises(SystemExit) as ended, errors_as_lines(console, FileNotFoundError, **options):
        raise error
    return ended.value.code, console.file.getvalue()


def test_a_mistake_is_a_line_and_status_2():
    line = "`ks=[0]` is too few. HINT: at least 1."
    assert ended_by(ValueError(line)) == (2, f"ValueError: {line}\n")
    assert ended_by(FileNotFoundError("no such file"))[0] == 2


def test_an_interruption_says_how_to_go_on():
    assert ended_by(KeyboardInterrupt()) == (130, "Interrupted.\n")
    assert ended_by(KeyboardInterrupt(), resume="hydra.run.dir=/a/folder/with/a/long/name") == (
        130,
        "Interrupted. With hydra.run.dir=/a/folder/with/a/long/name the same command goes on.\n",
    )


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), errors_as_lines(Console(file=io.StringIO())):
        raise ZeroDivisionError
