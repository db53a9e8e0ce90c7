"""Readers of public cluster traces.

- ``philly``: timestamp, duration, num_gpus, gpu_time, cluster (Microsoft Philly as one table; Jeon et al., ATC'19);
- ``philly-json``: the original ``cluster_job_log``;
- ``elasticflow``: submission_time, duration, num_gpu, cluster (microsoft/elasticflow-traces, merged);
- ``helios``: SenseTime's cluster_log.csv (Hu et al., SC'21);
- ``pai2020``: Alibaba PAI's pai_task_table, with or without a header line (Weng et al., NSDI'22);
- ``pai2023``: Alibaba's openb_pod_list (Weng et al., ATC'23).

All of them give raw jobs only (`trace.assign` adds the rest); times are counted from the first submission.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from lightning_easyscale.simulation.traces.table import BadRow, Row, read_text, rows
from lightning_easyscale.simulation.traces.trace import RawJob

Reader = Callable[[str, str, bool, "list[str]"], "list[RawJob]"]
Found = TypeVar("Found")
_BETWEEN = re.compile(r"[\s,]*")
_PAI_TASK = (
    "job_name task_name inst_num status start_time end_time plan_cpu plan_mem plan_gpu gpu_type".split()  # noqa: SIM905
)


def _collect(
    found: Iterable[Found], read: Callable[[Found], RawJob | None], lenient: bool, notes: list[str]
) -> list[RawJob]:
    """Read rows, leaving out bad ones when lenient and those that are no training job (None)."""
    jobs, bad, empty = [], 0, 0
    first = ""
    for row in found:
        try:
            job = read(row)
        except BadRow as error:
            if not lenient:
                raise
            bad += 1
            first = first or str(error)
            continue
        if job is None:
            empty += 1
        else:
            jobs.append(job)
    if bad:
        notes.append(f"{bad} rows left out, the first: {first}")
    if empty:
        notes.append(f"{empty} rows without GPU time left out")
    return jobs


def _philly(text: str, origin: str, lenient: bool, notes: list[str]) -> list[RawJob]:
    needed = ("timestamp", "duration", "num_gpus")
    found = list(rows(text, origin, needed=needed, known=("gpu_time", "cluster"), lenient=lenient, notes=notes))

    def read(row: Row) -> RawJob:
        queue = row.cells.get("cluster") or "default"
        duration, gpus = row.number("duration", above=0), row.whole("num_gpus", least=1)
        return RawJob(f"philly-{row.line}", row.seconds("timestamp"), duration, gpus, queue)

    return _collect(found, read, lenient, notes)


def _elasticflow(text: str, origin: str, lenient: bool, notes: list[str]) -> list[RawJob]:
    needed = ("submission_time", "duration", "num_gpu")
    found = list(rows(text, origin, needed=needed, known=("cluster",), lenient=lenient, notes=notes))

    def read(row: Row) -> RawJob:
        queue = row.cells.get("cluster") or "default"
        duration, gpus = row.number("duration", above=0), row.whole("num_gpu", least=1)
        return RawJob(f"elasticflow-{row.line}", row.seconds("submission_time"), duration, gpus, queue)

    return _collect(found, read, lenient, notes)


def _helios(text: str, origin: str, lenient: bool, notes: list[str]) -> list[RawJob]:
    needed = ("job_id", "gpu_num", "submit_time", "duration")
    known = ("user", "vc", "cpu_num", "node_num", "state", "start_time", "end_time", "queue", "jobname")
    found = list(rows(text, origin, needed=needed, known=known, lenient=lenient, notes=notes))

    def read(row: Row) -> RawJob | None:
        gpus, duration = row.whole("gpu_num"), row.number("duration", least=0)
        if not gpus or not duration:
            return None
        queue = row.cells.get("vc") or "default"
        return RawJob(f"helios-{row.text('job_id')}", row.seconds("submit_time"), duration, gpus, queue)

    return _collect(found, read, lenient, notes)


def _pai2020(text: str, origin: str, lenient: bool, notes: list[str]) -> list[RawJob]:
    header = None if text.startswith("job_name,") else _PAI_TASK
    needed = ("job_name", "inst_num", "start_time", "end_time", "plan_gpu")
    found = list(rows(text, origin, needed=needed, known=_PAI_TASK, header=header, lenient=lenient, notes=notes))
    jobs: dict[str, RawJob] = {}
    wanted: dict[str, float] = {}

    def read(row: Row) -> RawJob | None:
        if not all(row.cells.get(c, "").strip() for c in needed):
            return None
        gpus = row.number("inst_num", least=0) * row.number("plan_gpu", least=0) / 100.0
        start, end = row.seconds("start_time"), row.seconds("end_time")
        if gpus <= 0 or end <= start:
            return None
        name = f"pai-{row.text('job_name')}"
        wanted[name] = wanted.get(name, 0.0) + gpus
        queue = row.cells.get("gpu_type") or "default"
        return RawJob(name, start, end - start, 1, queue)

    for task in _collect(found, read, lenient, notes):  # a job is the union of its tasks
        old = jobs.get(task.name, task)
        begin = min(old.submit_s, task.submit_s)
        end = max(old.submit_s + old.duration_s, task.submit_s + task.duration_s)
        jobs[task.name] = replace(old, submit_s=begin, duration_s=end - begin)
    notes.append("pai2020: a job's tasks are merged, GPU shares rounded up to whole GPUs, submission taken as start")
    return [replace(job, num_gpus=max(1, math.ceil(wanted[name] - 1e-9))) for name, job in jobs.items()]


def _pai2023(text: str, origin: str, lenient: bool, notes: list[str]) -> list[RawJob]:
    needed = ("name", "num_gpu", "creation_time", "deletion_time")
    known = ("cpu_milli", "memory_mib", "gpu_milli", "gpu_spec", "qos", "pod_phase", "scheduled_time")
    shares = 0
    found = list(rows(text, origin, needed=needed, known=known, lenient=lenient, notes=notes))

    def read(row: Row) -> RawJob | None:
        gpus = row.whole("num_gpu")
        begin, end = row.seconds("creation_time"), row.seconds("deletion_time")
        scheduled = row.seconds("scheduled_time") if row.cells.get("scheduled_time", "").strip() else begin
        duration = end - scheduled
        if not gpus or duration <= 0:
            return None
        nonlocal shares
        shares += 0 < row.number("gpu_milli", least=0) < 1000 if row.cells.get("gpu_milli", "").strip() else 0
        return RawJob(f"pai-{row.text('name')}", begin, duration, gpus, row.cells.get("qos") or "default")

    jobs = _collect(found, read, lenient, notes)
    notes += [f"pai2023: {shares} pods that asked for a share of a GPU get a whole one"] if shares else []
    return jobs


def _entries(text: str, origin: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON list, each with the line on which it begins."""
    try:
        log = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"{origin}, line {error.lineno}: not JSON ({error.msg}). HINT: give cluster_job_log.") from error
    if not isinstance(log, list):
        raise BadRow(f"{origin}, line 1: not a list of jobs. HINT: give cluster_job_log.")
    decoder, line, counted, place = json.JSONDecoder(), 1, 0, text.index("[") + 1
    for entry in log:
        place = _BETWEEN.match(text, place).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, place), place
        if not isinstance(entry, dict):
            raise BadRow(f"{origin}, line {line}: `{entry}` is not a job. HINT: give cluster_job_log.")
        yield line, entry
        place = decoder.raw_decode(text, place)[1]


def _philly_json(text: str, origin: str, lenient: bool, notes: list[str]) -> list[RawJob]:
    def read(found: tuple[int, dict[str, Any]]) -> RawJob | None:
        line, entry = found
        where = f"{origin}, job `{entry.get('jobid')}`"  # files with everything on one line are common
        names = ("jobid", "submitted_time", "vc")
        row = Row(where, line, {name: str(entry.get(name) or "") for name in names})
        duration, gpus = 0.0, 0
        for attempt in entry.get("attempts") or ():
            if attempt.get("start_time") and attempt.get("end_time"):
                span = Row(where, line, {name: str(attempt[name]) for name in ("start_time", "end_time")})
                duration += span.seconds("end_time") - span.seconds("start_time")
                gpus = max(gpus, sum(len(node.get("gpus") or ()) for node in attempt.get("detail") or ()))
        if not gpus or duration <= 0:
            return None
        return RawJob(row.text("jobid"), row.seconds("submitted_time"), duration, gpus, row.cells["vc"] or "default")

    return _collect(_entries(text, origin), read, lenient, notes)


READERS: dict[str, Reader] = {
    "philly": _philly,
    "philly-json": _philly_json,
    "elasticflow": _elasticflow,
    "helios": _helios,
    "pai2020": _pai2020,
    "pai2023": _pai2023,
}


def read_public(
    path: str | Path,
    *,
    format: str,  # noqa: A002
    lenient: bool = False,
    limit: int | None = None,
    max_gpus: int | None = None,
) -> tuple[list[RawJob], list[str]]:
    """Read a public trace.

    Args:
        path: the file, possibly packed with gzip.
        format: one of `READERS`.
        lenient: leave out rows that cannot be read instead of refusing the file.
        limit: keep the first jobs only (by submission).
        max_gpus: leave out larger jobs.

    Returns:
        Jobs in order of submission, the first at 0 s, and notes.

    Raises:
        BadRow: naming file, line and column.
        ValueError: if the format is unknown or no job is left.
    """
    if format not in READERS:
        raise ValueError(f"`format={format!r}` is unknown. HINT: one of {', '.join(READERS)}, or `easyscale`.")
    notes: list[str] = []
    jobs = READERS[format](read_text(path), Path(path).name, lenient, notes)
    if max_gpus is not None:
        large = sum(j.num_gpus > max_gpus for j in jobs)
        jobs = [j for j in jobs if j.num_gpus <= max_gpus]
        notes += [f"{large} jobs with more than {max_gpus} GPUs left out"] if large else []
    if not jobs:
        raise ValueError(f"{Path(path).name} has no jobs left. HINT: check `format`, `max_gpus` and the file.")
    jobs.sort(key=lambda j: j.submit_s)
    if limit is not None:
        jobs = jobs[:limit]
    begin = jobs[0].submit_s
    return [replace(j, submit_s=j.submit_s - begin) for j in jobs], notes
