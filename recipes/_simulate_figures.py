"""Figs. 14 and 15 and a static Gantt view, with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from lightning_easyscale.simulation.result import Result  # noqa: E402

PUBLISHED = {  # EasyScale, SC'23, Fig. 14: average JCT and makespan, seconds
    "fifo-serial": (8904.97, 16560.0),
    "easyscale-homo": (1070.50, 6720.0),
    "easyscale-heter": (676.75, 6000.0),
}
PUBLISHED_USE = {  # Fig. 15, every 360 s from 300 s on: devices in use
    "easyscale-homo": (4, 27, 34, 42, 48, 32, 32, 32, 32, 32, 32, 40, 32, 48, 32, 32, 32, 32),
    "easyscale-heter": (4, 24, 52, 63, 61, 64, 64, 63, 51, 62, 58, 60, 39, 33, 45, 6, 0, 0),
}
_USE_DRAWN = ("easyscale-homo", "easyscale-heter", "easyscale-best", "fifo", "fifo-backfill", "fifo-serial")
_COLOURS = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]


def draw_figures(
    out: Path,
    summaries: Mapping[str, Mapping[str, Any]],
    results: Mapping[str, Result],
    *,
    compat: bool,
    gantt_jobs: int,
) -> None:
    """Write ``fig14.png``, ``fig15.png`` and one ``gantt_<policy>.png`` per policy."""
    _fig14(out / "fig14.png", summaries, compat=compat)
    _fig15(out / "fig15.png", results, compat=compat)
    for name, result in results.items():
        draw_gantt(out / f"gantt_{name}.png", result, gantt_jobs)


def _fig14(path: Path, summaries: Mapping[str, Mapping[str, Any]], *, compat: bool) -> None:
    names = list(summaries)
    figure, panels = plt.subplots(1, 2, figsize=(11, 0.9 + 0.36 * len(names)), sharey=True, layout="constrained")
    for panel, key, title, column in zip(
        panels, ("avg_jct_s", "makespan_s"), ("average JCT (s)", "makespan (s)"), (0, 1), strict=True
    ):
        values = [summaries[n][key] for n in names]
        errors = [summaries[n].get(f"{key}_ci95", 0.0) for n in names]
        places = range(len(names))
        panel.barh(places, values, height=0.6, xerr=errors if any(errors) else None, color="#4878a8", label="simulated")
        for place, name, value, error in zip(places, names, values, errors, strict=True):
            right = max(value + error, PUBLISHED[name][column] if compat and name in PUBLISHED else 0.0)
            panel.text(right, place, f"  {value:.0f}", va="center", fontsize=8)
        if compat:
            shown = [(i, PUBLISHED[n][column]) for i, n in enumerate(names) if n in PUBLISHED]
            panel.plot([v for _, v in shown], [i for i, _ in shown], "D", color="#c44e52", label="published", zorder=3)
            panel.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
        panel.set_xlabel(title)
        panel.margins(x=0.14)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names, fontsize=9)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _fig15(path: Path, results: Mapping[str, Result], *, compat: bool) -> None:
    chosen = [n for n in _USE_DRAWN if n in results][:5] or list(results)[:5]
    figure, panel = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for i, name in enumerate(chosen):
        times, levels = results[name].usage()
        panel.step(times, [sum(c) for c in levels], where="post", label=name, lw=1.1, color=_COLOURS[2 * i])
        if compat and name in PUBLISHED_USE:
            use = PUBLISHED_USE[name]
            marks = [300 + 360 * k for k in range(len(use))]
            panel.plot(marks, use, "o", ms=4, color=_COLOURS[2 * i], label=f"{name}, published")
    serving = next(iter(results.values())).serving
    if serving:
        panel.step([t for t, _ in serving], [sum(c) for _, c in serving], where="post", color="grey", label="serving")
    panel.set_xlabel("time (s)")
    panel.set_ylabel("devices in use")
    panel.set_ylim(bottom=0)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def draw_gantt(path: Path, result: Result, limit: int, *, title: str | None = None) -> None:
    """One schedule: a bar per job and span of constant devices."""
    records = sorted(result.records, key=lambda r: r.submit_s)[:limit]
    workloads = sorted({r.workload for r in records})
    figure, panel = plt.subplots(figsize=(10, min(1.2 + 0.1 * len(records), 24)), layout="constrained")
    for row, record in enumerate(records):
        panel.plot([record.submit_s, record.start_s], [row, row], color="#bbbbbb", lw=0.8)
        colour = _COLOURS[workloads.index(record.workload) % len(_COLOURS)]
        for (time, counts), (after, _) in _spans(record.segments):
            if counts is None:
                panel.plot([time, after], [row, row], color="#bbbbbb", lw=0.8)
            else:
                share = min(1.0, sum(counts) / record.max_ests)
                panel.barh(row, after - time, left=time, height=0.25 + 0.65 * share, color=colour)
    for i, workload in enumerate(workloads):
        panel.barh([0], [0], color=_COLOURS[i % len(_COLOURS)], label=workload)
    text = f"{title or result.policy}: bar height = devices held / maxP, grey = waiting"
    panel.set_title(text, fontsize=9, loc="right")
    panel.set_xlabel("time (s)")
    panel.set_ylabel("job, in order of submission")
    panel.invert_yaxis()
    panel.legend(fontsize=7, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.02), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _spans(segments: Sequence[tuple[float, Any]]) -> zip[tuple[tuple[float, Any], tuple[float, Any]]]:
    return zip(segments, segments[1:], strict=False)
