"""The figure of the overhead benchmark: ratios with their ranges, and where the aims are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(file: Path, report: dict[str, Any]) -> None:
    """Ratios on the left, microseconds on the right; a dot is the median, a line goes from least to greatest."""
    left = [row for row in report["rows"] if row["unit"] == "x"]
    right = [row for row in report["rows"] if row["unit"] == "us"]
    height = 1.6 + 0.32 * max(len(left), len(right), 1)
    figure, (ratios, times) = plt.subplots(1, 2, figsize=(15, height), layout="constrained")
    _intervals(ratios, left, lambda row: f"{row['comparison']}\n{row['what']}")
    ratios.axvline(1.0, color="0.6", linewidth=0.8)
    ratios.axvline(1.02, color="tab:red", linewidth=0.8, linestyle="--", label="aim 1.02")
    ratios.set_xlabel("time / stock Lightning's")
    _intervals(times, right, lambda row: row["what"])
    times.set_xscale("symlog", linthresh=100)
    times.axvline(150, color="tab:red", linewidth=0.8, linestyle="--", label="aim of a switch, 150 us")
    times.set_xlabel("microseconds")
    for axes in (ratios, times):
        axes.legend(loc="lower right", fontsize=7)
    figure.suptitle(f"{report['device']}, torch {report['torch']}, {report['ests']} ESTs per process", fontsize=10)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _intervals(axes: Any, rows: list[dict[str, Any]], label: Any) -> None:
    places = range(len(rows), 0, -1)
    for place, row in zip(places, rows, strict=True):
        axes.plot([row["min"], row["max"]], [place, place], color="tab:blue", linewidth=1.5)
        axes.plot(row["median"], place, "o", color="tab:blue", markersize=4)
    axes.set_yticks(list(places), [label(row) for row in rows], fontsize=7)
