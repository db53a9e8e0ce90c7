"""The CSV form of the published EasyScale trace.

Columns: name, time (s), application, max_parallelism, batch_size, epochs, enable_heterogeneous_deterministic (0 or 1),
preferred_gpu. Work is ``epochs * samples per epoch``, spread over ``batch_size * max_parallelism`` samples a step.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lightning_easyscale.planning.profile import Profile
from lightning_easyscale.planning.published import ALIASES
from lightning_easyscale.simulation.job import JobSpec
from lightning_easyscale.simulation.traces.table import BadRow, Row, read_text, rows
from lightning_easyscale.simulation.traces.trace import Trace

COLUMNS = (
    "name",
    "time",
    "application",
    "max_parallelism",
    "batch_size",
    "epochs",
    "enable_heterogeneous_deterministic",
    "preferred_gpu",
)
DUPLICATES = ("error", "rename", "last")


def read_easyscale(path: str | Path, profile: Profile, *, duplicates: str = "error", lenient: bool = False) -> Trace:
    """Read the file.

    Args:
        path: CSV, or CSV packed with gzip.
        profile: knows the samples of an epoch.
        duplicates: of job names: ``"error"``; ``"rename"`` appends ``#2``, ``#3``...; ``"last"`` keeps the first row's
            place and the last row's values, as the published simulation did without saying so.
        lenient: accept unknown columns and flags other than 0 and 1, leave out rows that cannot be read.

    Raises:
        BadRow: naming file, line and column.
        ValueError: if `duplicates` is unknown or no job is left.
    """
    if duplicates not in DUPLICATES:
        raise ValueError(f"`duplicates={duplicates!r}` is unknown. HINT: one of {', '.join(DUPLICATES)}.")
    origin = Path(path).name
    notes: list[str] = []
    jobs: dict[str, JobSpec] = {}
    lines: dict[str, int] = {}
    replaced = 0
    for row in rows(read_text(path), origin, needed=COLUMNS, lenient=lenient, notes=notes):
        try:
            spec = _job(row, profile, lenient, notes)
        except BadRow as error:
            if not lenient:
                raise
            notes.append(f"left out: {error}")
            continue
        if spec.name in jobs:
            if duplicates == "error":
                raise BadRow(
                    f"{origin}, line {row.line}: job name `{spec.name}` was used in line {lines[spec.name]}."
                    " HINT: rename the job, or read with `duplicates=rename`."
                )
            replaced += 1
            if duplicates == "rename":
                number = next(n for n in range(2, len(jobs) + 3) if f"{spec.name}#{n}" not in jobs)
                spec = replace(spec, name=f"{spec.name}#{number}")
        lines[spec.name] = row.line
        jobs[spec.name] = spec
    if not jobs:
        raise ValueError(f"{origin} has no jobs. HINT: give at least one row.")
    if replaced:
        what = "renamed" if duplicates == "rename" else "replaced an earlier job of the same name"
        notes.append(f"{origin}: {replaced} rows with a repeated name {what}; {len(jobs)} jobs")
    return Trace(origin, list(jobs.values()), notes)


def _job(row: Row, profile: Profile, lenient: bool, notes: list[str]) -> JobSpec:
    workload = ALIASES.get(name := row.text("application").lower(), name)
    if workload not in profile.samples_per_epoch:
        raise row.bad("application", f"a workload of profile `{profile.name}` ({', '.join(profile.workloads)})")
    gpu = row.text("preferred_gpu").lower()
    if gpu not in profile.device_types:
        raise row.bad("preferred_gpu", f"a device type of profile `{profile.name}` ({', '.join(profile.device_types)})")
    flag = row.whole("enable_heterogeneous_deterministic")
    if flag > 1:
        if not lenient:
            raise row.bad("enable_heterogeneous_deterministic", "0 or 1")
        notes.append(f"{row.origin}: line {row.line} has the D2 flag {flag}, read as 1")
    batch, size = row.whole("batch_size", least=1), row.whole("max_parallelism", least=1)
    epochs = row.number("epochs", above=0)
    steps = epochs * profile.samples_per_epoch[workload] / (batch * size)
    submit = row.number("time", least=0)
    return JobSpec(row.text("name"), submit, workload, size, steps, batch, bool(flag), gpu, queue=workload)
