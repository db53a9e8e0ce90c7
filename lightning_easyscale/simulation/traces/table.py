"""Reading tables strictly: every complaint names the line and the column.

Strict is the default. Lenient reading is for public files known to be dirty: it goes on where the meaning is clear,
leaves out rows that cannot be read, and writes one note for each kind of liberty taken.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path


def read_text(path: str | Path) -> str:
    """A file's text, unpacked if its name ends in `.gz`.

    Raises:
        FileNotFoundError: with the path.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`path={path}` does not exist. HINT: give the trace's file.")
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    return path.read_text(encoding="utf-8-sig")


class BadRow(ValueError):
    """A row that cannot be read; the message names file, line and column."""


class Row:
    """One row with typed access by column.

    Args:
        origin: file name.
        line: line number in the file, from 1.
        cells: by column.
    """

    def __init__(self, origin: str, line: int, cells: dict[str, str]) -> None:
        """Keep the cells."""
        self.origin, self.line, self.cells = origin, line, cells

    def bad(self, column: str, wish: str) -> BadRow:
        """The error for one cell."""
        return BadRow(
            f"{self.origin}, line {self.line}: `{column}={self.cells.get(column, '')}` is not {wish}."
            " HINT: correct the row, or read with `lenient=true` to leave it out."
        )

    def text(self, column: str) -> str:
        """A cell that may not be empty."""
        value = self.cells.get(column, "").strip()
        if not value:
            raise self.bad(column, "given")
        return value

    def number(self, column: str, *, least: float | None = None, above: float | None = None) -> float:
        """A finite number within bounds."""
        try:
            value = float(self.text(column))
        except ValueError:
            raise self.bad(column, "a number") from None
        if value != value or abs(value) == float("inf"):
            raise self.bad(column, "a finite number")
        if (least is not None and value < least) or (above is not None and value <= above):
            raise self.bad(column, f"{least} or more" if least is not None else f"above {above}")
        return value

    def whole(self, column: str, *, least: int = 0) -> int:
        """A whole number, at least `least`."""
        value = self.number(column, least=least)
        if value != int(value):
            raise self.bad(column, "a whole number")
        return int(value)

    def seconds(self, column: str) -> float:
        """A time: seconds, or a date and time (read as UTC)."""
        value = self.text(column)
        try:
            return float(value)
        except ValueError:
            pass
        try:
            moment = datetime.fromisoformat(value.replace(" UTC", "").replace(" PST", "").replace(" PDT", ""))
        except ValueError:
            raise self.bad(column, "a time (seconds or YYYY-MM-DD HH:MM:SS)") from None
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def rows(
    text: str,
    origin: str,
    *,
    needed: Sequence[str],
    known: Sequence[str] = (),
    header: Sequence[str] | None = None,
    lenient: bool,
    notes: list[str],
) -> Iterator[Row]:
    """The rows of a CSV text.

    Args:
        text: the file's text.
        origin: its name, for messages.
        needed: columns that must be there.
        known: further columns that may be there and are not read.
        header: column names of a file without a header line.
        lenient: ignore unknown columns instead of refusing them.
        notes: gets one line per liberty taken.

    Raises:
        BadRow: if a column is missing or unknown, or a row has more or fewer cells than the header.
    """
    reader = csv.reader(text.splitlines())
    columns = list(header) if header else [c.strip() for c in next(reader, [])]
    missing = [c for c in needed if c not in columns]
    if missing:
        raise BadRow(
            f"{origin}, line 1: columns {missing} are missing (found {columns})."
            " HINT: choose the reader that fits the file with `format`."
        )
    unknown = [c for c in columns if c not in needed and c not in known]
    if unknown:
        if not lenient:
            raise BadRow(
                f"{origin}, line 1: unknown columns {unknown}. HINT: remove them, or read with `lenient=true`."
            )
        notes.append(f"{origin}: unknown columns {unknown} ignored")
    last_needed = max(columns.index(c) for c in needed)
    for cells in reader:
        if not any(c.strip() for c in cells):
            continue
        if len(cells) != len(columns):
            if not lenient or len(cells) <= last_needed or len(cells) > len(columns):
                raise BadRow(
                    f"{origin}, line {reader.line_num}: {len(cells)} cells, the header has {len(columns)}."
                    " HINT: correct the row; `lenient=true` accepts rows that lack trailing unused cells only."
                )
            notes.append(f"{origin}: line {reader.line_num} is short")
        yield Row(origin, reader.line_num, dict(zip(columns, cells, strict=False)))
