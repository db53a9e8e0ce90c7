"""The figure of the overhead benchmark: ratios with their ranges, and where the aims are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(file: Path, report: dict[str, Any]) -> None:
    """Ratios and microseconds; a dot is the median, a line goes from least to greatest, a red mark is the aim."""
    rows = {unit: [row for row in report["rows"] if row["unit"] == unit] for unit in ("x", "us")}
    panels = [unit for unit, there in rows.items() if there] or ["x"]
    height = 1.6 + 0.32 * max(1, *(len(there) for there in rows.values()))
    size = (7.5 * len(panels), height)
    figure, all_axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for unit, axes in zip(panels, all_axes[0], strict=True):
        _intervals(axes, rows[unit], with_comparison=unit == "x")
        if unit == "x":
            axes.axvline(1.0, color="0.6", linewidth=0.8)
            axes.set_xlabel("time / stock Lightning's")
        else:
            axes.set_xscale("symlog", linthresh=100)
            axes.set_xlabel("microseconds")
    figure.suptitle(f"{report['device']}, torch {report['torch']}, {report['ests']} ESTs per process", fontsize=10)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _intervals(axes: Any, rows: list[dict[str, Any]], *, with_comparison: bool) -> None:
    places = range(len(rows), 0, -1)
    for place, row in zip(places, rows, strict=True):
        axes.plot([row["min"], row["max"]], [place, place], color="tab:blue", linewidth=1.5)
        axes.plot(row["median"], place, "o", color="tab:blue", markersize=4)
        if row.get("aim") is not None:
            axes.plot(row["aim"], place, "|", color="tab:red", markersize=12, markeredgewidth=1.5)
    names = [f"{row['comparison']}\n{row['what']}" if with_comparison else row["what"] for row in rows]
    axes.set_yticks(list(places), names, fontsize=7)
