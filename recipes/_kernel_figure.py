"""The figure of `kernels`: what D2's kernels take beside torch's, and how much of the device they use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"tf32": "#CC79A7", "nondeterministic": "#999999", "d1": "#56B4E9", "d2": "#0072B2"}
LABELS = {"tf32": "TF32", "nondeterministic": "torch, fastest", "d1": "torch, deterministic (D1)", "d2": "D2"}


def draw(file: Path, report: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """A line for each operation: left D2's times over those of other ways, right rates.

    Args:
        file: where to.
        report: device and configuration.
        rows: `kernels.summary` of each operation.
    """
    figure, (ratios, rates) = plt.subplots(
        1, 2, figsize=(13, 1.6 + 0.19 * len(rows)), layout="constrained", sharey=True, width_ratios=(3, 2)
    )
    ways = report["config"]["ways"]
    for way in (way for way in ways if way != "d2"):
        _ratios(ratios, rows, way)
    with_peak = report["peak_tflops"] is not None
    for way in ways:
        _rates(rates, rows, way, "of_peak" if with_peak else "tflops")
    places = range(len(rows))
    ratios.set_yticks(places, [f"{row['name']}, {row['part']}" for row in rows], fontsize=7)
    ratios.set_ylim(len(rows) - 0.5, -0.5)
    ratios.set_xscale("log")
    ratios.axvline(1.0, color="0.3", linewidth=0.8)
    ratios.set_xlabel("time under D2 / time in the other way")
    rates.set_xlabel("share of the fp32 peak" if with_peak else "TFLOP/s")
    rates.set_xlim(left=0)
    for axes in (ratios, rates):
        axes.grid(axis="x", color="0.9", which="both")
        axes.set_axisbelow(True)
        for place in (i for i in places if i and rows[i]["group"] != rows[i - 1]["group"]):
            axes.axhline(place - 0.5, color="0.8", linewidth=0.8)
    peak = f", fp32 peak {report['peak_tflops']:.1f} TFLOP/s" if with_peak else ""
    for axes, place in ((ratios, "outside lower left"), (rates, "outside lower right")):
        figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=7, loc=place, ncols=2)
    figure.suptitle(f"{report['device']}, torch {report['torch']}, size={report['config']['size']}{peak}", size=10)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _ratios(axes: Any, rows: list[dict[str, Any]], way: str) -> None:
    key, places = f"d2_to_{way}_device", range(len(rows))
    ranges = [[row[f"{key}_least"] for row in rows], [row[f"{key}_greatest"] for row in rows]]
    axes.hlines(places, *ranges, color=COLOURS[way], linewidth=1)
    axes.plot([row[key] for row in rows], places, "o", color=COLOURS[way], markersize=4, label=f"{LABELS[way]}: device")
    walls = [row[f"d2_to_{way}_wall"] for row in rows]
    axes.plot(walls, places, "o", mfc="none", color=COLOURS[way], markersize=4, label=f"{LABELS[way]}: with launching")


def _rates(axes: Any, rows: list[dict[str, Any]], way: str, kind: str) -> None:
    there = [(place, row[f"{way}_{kind}"]) for place, row in enumerate(rows) if row[f"{way}_{kind}"] is not None]
    places, values = zip(*there, strict=True) if there else ((), ())
    axes.plot(values, places, "|" if way != "d2" else "o", color=COLOURS[way], markersize=6, label=LABELS[way])
