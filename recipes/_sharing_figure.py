"""Fig. 10: memory and time of k workers that share one device, measured here and published, as ratios."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PUBLISHED_MIB = {
    "resnet50": {
        "easyscale": (4857.0,) * 16,
        "packing": (4803.0, 9602.0, 14403.0, 19202.0, 24003.0, 28802.0, 32425.0),
    },
    "shufflenetv2": {"easyscale": (21655.0,) * 16, "packing": (21637.0,)},
}
"""Peak device memory in MiB at k = 1, 2, ... on a V100 with 32 GB: EasyScale (SC'23), Figure 10; the rest ran out."""

PUBLISHED_S = {
    "resnet50": {
        "easyscale": (
            *(0.2106, 0.1967, 0.1952, 0.1928, 0.1923, 0.1920, 0.1934, 0.1921),
            *(0.1964, 0.1954, 0.1964, 0.1948, 0.1969, 0.1982, 0.1977, 0.1944),
        ),
        "packing": (0.1828, 0.1981, 0.1940, 0.1851, 0.1843, 0.1950, 0.1825),
    },
    "shufflenetv2": {
        "easyscale": (
            *(0.6845, 0.6861, 0.6850, 0.6830, 0.6811, 0.6824, 0.6818, 0.6813),
            *(0.6814, 0.6810, 0.6814, 0.6804, 0.6804, 0.6805, 0.6796, 0.6797),
        ),
        "packing": (0.6764,),
    },
}
"""Seconds per mini-batch and worker, likewise."""

LABELS = {
    "easyscale": "EasyScale",
    "easyscale_alone": "EasyScale, no backward beside forward",
    "easyscale_overlap": "EasyScale, all of backward beside forward",
    "easyscale_inputs": "EasyScale, inputs on the host",
    "easyscale_host": "EasyScale, inputs and sums on the host",
    "easyscale_host_alone": "EasyScale, on the host, no backward beside",
    "accumulate": "accumulation over k",
    "packing": "k DDP processes",
}
COLOURS = {
    "easyscale": "#0072B2",
    "easyscale_alone": "#882255",
    "easyscale_overlap": "#CC79A7",
    "easyscale_inputs": "#E69F00",
    "easyscale_host": "#56B4E9",
    "easyscale_host_alone": "#332288",
    "accumulate": "#009E73",
    "packing": "#D55E00",
}


def draw(file: Path, report: dict[str, Any]) -> None:
    """A column per workload: memory above, time below, each over that of EasyScale with the fewest workers."""
    names = list(dict.fromkeys(cell["workload"] for cell in report["cells"]))
    figure, grid = plt.subplots(2, len(names), figsize=(4.4 * len(names), 6.4), layout="constrained", squeeze=False)
    for name, (memory, seconds) in zip(names, grid.T, strict=True):
        cells = [cell for cell in report["cells"] if cell["workload"] == name]
        _panel(memory, cells, "device_mib", PUBLISHED_MIB.get(name, {}))
        _panel(seconds, cells, "median", PUBLISHED_S.get(name, {}))
        first = cells[0]
        memory.set_title(f"{name}, batch {first['batch_size']}, {first['precision']}", size=10)
        seconds.set_xlabel("k, workers on the device")
    grid[0][0].set_ylabel("peak memory of the device\n/ EasyScale's at the least k")
    grid[1][0].set_ylabel("time per mini-batch and worker\n/ EasyScale's at the least k")
    grid[0][0].legend(frameon=False, fontsize=7)
    figure.suptitle(f"{report['device']}, torch {report['torch']}, {report['date'][:10]}; published: V100", size=10)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _panel(axes: Any, cells: list[dict[str, Any]], key: str, published: dict[str, tuple[float, ...]]) -> None:
    own = [cell for cell in cells if cell["kind"] == "easyscale" and not cell["out_of_memory"]]
    base = min(own, key=lambda cell: cell["k"])[key] if own else math.nan
    for kind, values in published.items():
        ratios = [value / published["easyscale"][0] for value in values]
        axes.plot(
            range(1, len(values) + 1),
            ratios,
            color=COLOURS[kind],
            linestyle=":",
            linewidth=1.2,
            label=f"{LABELS[kind]}, published",
        )
    for kind, label in LABELS.items():
        rows = sorted((cell for cell in cells if cell["kind"] == kind), key=lambda cell: cell["k"])
        done = [row for row in rows if not row["out_of_memory"]]
        if rows:
            axes.plot(
                [row["k"] for row in done],
                [row[key] / base for row in done],
                color=COLOURS[kind],
                marker="o",
                markersize=3.5,
                label=label,
            )
        if key == "median":
            for row in done:
                axes.plot([row["k"]] * 2, [row["min"] / base, row["max"] / base], color=COLOURS[kind], linewidth=1)
        for row in rows:
            if row["out_of_memory"]:
                axes.annotate(
                    "out of\nmemory",
                    (row["k"], 1.0),
                    xycoords=("data", "axes fraction"),
                    ha="center",
                    va="top",
                    size=6,
                    color=COLOURS[kind],
                )
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
