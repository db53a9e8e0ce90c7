"""Where recipes print, and how they end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


def make_console(*, width: int = 120) -> Console:
    """The terminal as it is; elsewhere, as in a log, lines of `width` columns, which tables need."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


@contextmanager
def errors_as_lines(console: Console, *kinds: type[Exception], resume: str | None = None) -> Iterator[None]:
    """A recipe's work, which its user's mistakes and Ctrl-C end with a line instead of a traceback.

    Args:
        console: for the line.
        kinds: of errors, beside `ValueError` and `ImportError`, that say what is wrong and how to cure it.
        resume: what the command needs beside its other arguments to go on after Ctrl-C, if it can.

    Raises:
        SystemExit: 2 after such an error, 130 after Ctrl-C.
    """
    try:
        yield
    except (ValueError, ImportError, *kinds) as error:
        console.print(f"{type(error).__name__}: {error}", markup=False, style="red")
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        again = f" With {resume} the same command goes on." if resume else ""
        console.print(f"Interrupted.{again}", markup=False, soft_wrap=True)
        raise SystemExit(130) from None
