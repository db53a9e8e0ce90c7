"""The figure of the accuracy-consistency experiment, drawn from run records.

Differences are drawn on an axis that is linear within 1e-8 and logarithmic beyond: exactly zero looks different from a
difference in the last bit, which an ordinary axis would hide below the later, larger ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

from lightning_easyscale.record import Record

from ._config import Stage
from ._report import REFERENCES, reference_of

_LINEAR_WITHIN = 1e-8
_STYLES = {
    "d0": ("#D55E00", "D0"),
    "d1": ("#0072B2", "D1"),
    "d0+d2": ("#D55E00", "D0+D2"),
    "d1+d2": ("#0072B2", "D1+D2"),
}


def loss_difference(record: Record, reference: Record, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Micro-batches and loss minus reference loss of one EST, in float64 of the recorded bits.

    Two losses of equal bits give exactly 0, and a difference of one bit is not rounded away.
    """
    batches, losses = record.ests[rank].series()
    at, expected = reference.ests[rank].series()
    both, i, j = np.intersect1d(np.asarray(batches), np.asarray(at), return_indices=True)
    return both, np.asarray(losses)[i] - np.asarray(expected)[j]


def draw(
    file: Path, *, stages: Sequence[Stage], levels: Sequence[str], records: Mapping[str, Record], title: str
) -> None:
    """Draw one panel for each reference: the loss of the last EST minus that of the last worker of stock DDP.

    Args:
        file: a ``.png``.
        stages: marked by vertical lines and the devices they ran on.
        levels: configurations that were run.
        records: of every level and of the references.
        title: of the figure.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True, layout="constrained")
    largest = 0.0
    for panel, (reference, reference_name) in zip(panels, REFERENCES.items(), strict=True):
        shown = [level for level in levels if reference_of(level) == reference]
        for level in shown:
            color, name = _STYLES[level]
            last = records[level].num_ests - 1
            x, y = loss_difference(records[level], records[reference], last)
            largest = max(largest, float(np.abs(y).max(initial=0.0)))
            order = 2 if level.startswith("d0") else 3
            panel.plot(x, y, color=color, linewidth=0.4, alpha=0.4, zorder=order)
            panel.plot(x, y, color=color, label=name, linestyle="", marker=".", markersize=3.5, zorder=order)
        per_step = _batches_per_step(records[reference]) if shown else 1
        for stage in stages:
            if stage.first_step:
                panel.axvline(stage.first_step * per_step, color="0.6", linestyle="--", linewidth=0.8, zorder=1)
            middle = (stage.first_step + stage.end_step) / 2 * per_step
            panel.text(middle, 0.98, stage.label, transform=panel.get_xaxis_transform(), ha="center", va="top", size=8)
        panel.set_title(f"against {reference_name}" if shown else f"{reference_name}: not run", size=10)
        panel.set_xlabel("mini-batch")
        panel.set_yscale("symlog", linthresh=_LINEAR_WITHIN)
        if shown:
            panel.legend(loc="lower left", frameon=False, fontsize=9)
        else:
            panel.set_xlim(0, stages[-1].end_step)  # or the stages' names would lie outside, and the layout fail
    limit = 30 * max(largest, _LINEAR_WITHIN)
    panels[0].set_ylim(-limit, limit)
    exponents = range(-8, math.ceil(math.log10(limit)), 2)
    panels[0].set_yticks([-(10.0**e) for e in exponents] + [0.0] + [10.0**e for e in exponents])
    panels[0].set_ylabel("loss of the last EST\nminus loss of stock DDP")
    figure.suptitle(title, size=11)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _batches_per_step(reference: Record) -> float:
    entries = reference.ests[0].steps
    last = entries[max(entries)]
    return (last.batch + 1) / (last.step + 1)
