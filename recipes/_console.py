"""Where recipes print."""

from __future__ import annotations

from rich.console import Console


def make_console(*, width: int = 120) -> Console:
    """The terminal as it is; elsewhere, as in a log, lines of `width` columns, which tables need."""
    console = Console()
    return console if console.is_terminal else Console(width=width)
