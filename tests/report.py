"""What is kept of test runs: `python -m tests.report JUNIT... [--features FILE] [--readme FILE] [--faults FILE] ...`.

JUNIT is what ``--junit-xml`` writes; several files are joined, the last one counting where a test is in more than one.
``--features`` lists every feature of stock DDP with how its tests ended. Features that no JUNIT has keep the line they
had, so that a new feature needs the run of its own tests only; features that are no more lose it. ``--readme`` puts the
table of their groups between two marks of a file. ``--faults`` lists the tests that inject a fault. ``--report`` counts
the tests of each file.
"""

from __future__ import annotations

import argparse
import os
import platform
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

BEGIN, END = "<!-- features: written by tests/report.py -->", "<!-- end of features -->"

_HEAD = """# Features of stock DDP under EasyScale

Written by `make keep-reports` from the reports of `make test-all` and `make test-gpu`, never by hand. *equal*: losses,
parameters, buffers, optimizer state, metrics, files and what the scenario notes have the bits of
`Trainer(strategy="ddp", devices=N)` in N processes, on every rank and at every step. *not yet*: fails, for a known
cause. Placements are ESTs per executor.
"""
_FAULTS = """# Faults of elastic jobs

Written by `make keep-reports` from the reports of tests, never by hand. A fault happens at (EST, optimizer steps done,
hook) or where the line says. *the bits of stock DDP*: losses, parameters, buffers, optimizer state, metrics
and files of `Trainer(strategy="ddp", devices=N)` in N processes that nothing has disturbed.
"""
_FAULT_COLUMNS = ["| case | what happens, where | what is asserted | outcome | s | test file |", "|---" * 6 + "|"]
_COLUMNS = "| feature | group | status | N | placements | device |\n|---|---|---|---|---|---|"


@dataclass(frozen=True)
class Case:
    """One test of a run: which file, how it ended, how long it took, and the feature that it stands for, if any."""

    file: str
    name: str
    outcome: str
    seconds: float
    properties: Mapping[str, str]


@dataclass(frozen=True, order=True)
class Line:
    """A line of the table of features, without its status."""

    group: str
    feature: str
    n: int
    placements: tuple[str, ...]
    device: str


def read(files: Iterable[Path]) -> list[Case]:
    """The tests of several JUnit files."""
    found: dict[tuple[str, str], Case] = {}
    for file in files:
        root = ET.parse(file).getroot()
        run = {p.get("name", ""): p.get("value", "") for p in root.iterfind("testsuite/properties/property")}
        for case in root.iter("testcase"):
            ends = {child.tag: child.get("type", "") for child in case}
            outcome = (
                "failed"
                if ends.keys() & {"failure", "error"}
                else ("xfailed" if "xfail" in ends["skipped"] else "skipped")
                if "skipped" in ends
                else "passed"
            )
            properties = run | {p.get("name", ""): p.get("value", "") for p in case.iter("property")}
            where, name = case.get("classname", ""), case.get("name", "")
            if not name:
                continue  # begun when the run was interrupted
            where = where or name  # a file that was skipped as a whole
            found[where, name] = Case(where, name, outcome, float(case.get("time", 0)), properties)
    return list(found.values())


def features(cases: Iterable[Case]) -> dict[Line, str]:
    """The lines of the table and their status, from the tests of features; one line for a feature, N and device."""
    placements: dict[tuple[str, str, int, str], dict[str, str]] = {}
    words = {"passed": "equal", "xfailed": "not yet", "failed": "differs"}
    for case in cases:
        of = case.properties
        if "feature" in of and case.outcome in words:
            n = sum(map(int, of["placement"].split("+")))
            key = of["group"], of["feature"], n, of["device"]
            placements.setdefault(key, {})[of["placement"]] = words[case.outcome]
    lines = {}
    for (group, name, n, device), ends in placements.items():
        outcomes = sorted(set(ends.values()))
        status = outcomes[0] if len(outcomes) == 1 else "; ".join(f"{p}: {end}" for p, end in ends.items())
        lines[Line(group, name, n, _ordered(ends), device)] = status
    return lines


def _ordered(placements: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(placements, key=lambda placement: (placement.count("+"), placement)))


def table(lines: Mapping[Line, str], runs: Mapping[str, str]) -> str:
    """The file of features; `runs` says for each device what it was last run with."""
    rows = [
        f"| {line.feature} | {line.group} | {status} | {line.n} | {', '.join(line.placements)} | {line.device} |"
        for line, status in sorted(lines.items())
    ]
    return "\n".join([_HEAD, *(f"- {device}: {run}" for device, run in sorted(runs.items())), "", _COLUMNS, *rows, ""])


def parse(text: str) -> tuple[dict[Line, str], dict[str, str]]:
    """What `table` was given."""
    lines, runs = {}, {}
    for row in text.splitlines():
        if row.startswith("- "):
            device, _, run = row[2:].partition(": ")
            runs[device] = run
        elif row.startswith("| ") and not row.startswith("| feature |"):
            name, group, status, n, placements, device = (cell.strip() for cell in row[2:-2].split(" | "))
            lines[Line(group, name, int(n), tuple(placements.split(", ")), device)] = status
    return lines, runs


def known_on_cpu() -> set[Line]:
    """The lines that the tests of features on CPU make."""
    from .integration import scenarios
    from .integration.test_features import PLACEMENTS, worlds

    assert scenarios.MODULES  # importing them registers their features
    return {
        Line(item.group, item.name, n, _ordered("+".join(map(str, p)) for p in PLACEMENTS[n]), "CPU")
        for item, n in worlds()
    }


def merged(old: Mapping[Line, str], new: Mapping[Line, str], known: set[Line]) -> dict[Line, str]:
    """New lines over old ones; on CPU only those that tests still make."""
    return {line: status for line, status in {**old, **new}.items() if line in known or line.device != "CPU"}


def summary(lines: Mapping[Line, str]) -> str:
    """The table of groups, for the README."""
    made: dict[str, Counter[str]] = {}
    for line, status in sorted(lines.items()):
        made.setdefault(line.group, Counter())[f"{line.device} {'equal' if status == 'equal' else 'other'}"] += 1
    devices = sorted({line.device for line in lines})
    rows = [f"| group | {' | '.join(f'equal on {device}' for device in devices)} |", "|---" * (len(devices) + 1) + "|"]
    for group, counts in made.items():
        cells = []
        for device in devices:
            equal, other = counts[f"{device} equal"], counts[f"{device} other"]
            cells.append(f"{equal} of {equal + other}" if equal + other else "")
        rows.append(f"| {group} | {' | '.join(cells)} |")
    return "\n".join(rows)


def with_summary(readme: str, lines: Mapping[Line, str]) -> str:
    """A README whose table of groups is that of `lines`."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{summary(lines)}\n{END}{after}"


def runs_of(cases: Iterable[Case]) -> str:
    """When and with what the cases were run."""
    return "; ".join(sorted({case.properties.get("run", "") for case in cases} - {""})) or "An unknown run"


def report(cases: Sequence[Case], run: str) -> str:
    """How many tests of each file ended how, and which failed."""
    ends = ("passed", "failed", "xfailed", "skipped")
    by_file: dict[str, list[Case]] = {}
    for case in cases:
        by_file.setdefault(case.file.replace(".", "/") + ".py", []).append(case)
    rows = ["| file | " + " | ".join(ends) + " | seconds |", "|---" * (len(ends) + 2) + "|"]
    for name, group in [*sorted(by_file.items()), ("all", list(cases))]:
        counts = Counter(case.outcome for case in group)
        cells = [str(counts[end]) for end in ends]
        rows.append(f"| {name} | {' | '.join(cells)} | {sum(case.seconds for case in group):.0f} |")
    failed = [f"- `{case.file}` {case.name}" for case in cases if case.outcome == "failed"]
    head = f"# Report of the tests\n\nWritten by `make keep-reports`, never by hand. {run}.\n"
    return "\n".join([head, *rows, *(["", "Failed:", "", *failed] if failed else []), ""])


def faults(cases: Sequence[Case], run: str) -> str:
    """What happens to elastic jobs in the tests, and what is asserted of them."""
    rows = [
        f"| {of['fault']} | {of['where']} | {of['asserts']} | {case.outcome} | {case.seconds:.0f} | {file} |"
        for case in cases
        if (of := case.properties).get("fault") and (file := case.file.rpartition(".")[2])
    ]
    return "\n".join([_FAULTS, f"{len(rows)} cases. {run}.", "", *_FAULT_COLUMNS, *rows, ""])


def described() -> str:
    """Date, machine and versions of this run."""
    day = datetime.now(timezone.utc).date().isoformat()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    machine = f"{platform.machine()} with {os.cpu_count()} cores" + "".join(f", {gpu}" for gpu in gpus)
    return f"{day}, {machine}, Python {platform.python_version()}, {versions}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.report", description=__doc__)
    parser.add_argument("junit", type=Path, nargs="+")
    for option in ("--features", "--readme", "--report", "--faults"):
        parser.add_argument(option, type=Path)
    options = parser.parse_args(arguments)
    cases = read(options.junit)
    run = runs_of(cases)
    if options.report is not None:
        options.report.write_text(report(cases, run))
    if options.faults is not None:
        options.faults.write_text(faults(cases, run))
    if options.features is not None:
        old, runs = parse(options.features.read_text()) if options.features.exists() else ({}, {})
        new = features(cases)
        lines = merged(old, new, known_on_cpu())
        for device in {line.device for line in new}:
            runs[device] = runs_of(c for c in cases if "feature" in c.properties and c.properties["device"] == device)
        options.features.write_text(table(lines, runs))
        if options.readme is not None:
            options.readme.write_text(with_summary(options.readme.read_text(), lines))


if __name__ == "__main__":
    main()
