"""Figures of `cluster`: predicted against real completion times, and both schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from lightning_easyscale.simulation.result import Result  # noqa: E402

from ._simulate_figures import draw_gantt  # noqa: E402
from ._simulate_html import gantt_page  # noqa: E402


def draw(out: Path, report: dict[str, Any], predicted: Result, live: Result) -> None:
    """Write ``jct.png``, ``gantt_live.png``, ``gantt_predicted.png`` and ``gantt.html``."""
    rows = report["jobs"]
    figure, panel = plt.subplots(figsize=(5, 4.6), layout="constrained")
    top = 1.08 * max(max(row["jct_live_s"], row["jct_predicted_s"]) for row in rows)
    panel.fill_between([0, top], [0, 0.85 * top], [0, 1.15 * top], color="#dddddd", lw=0, label="within 15 %")
    panel.plot([0, top], [0, top], color="grey", lw=0.8)
    panel.plot([r["jct_live_s"] for r in rows], [r["jct_predicted_s"] for r in rows], "o", color="#4878a8")
    panel.set_xlim(0, top)
    panel.set_ylim(0, top)
    panel.set_xlabel("JCT of the live job (s)")
    panel.set_ylabel("JCT predicted by the simulator (s)")
    panel.set_title(f"{report['policy']}: median error {report['median_error']:.1%}", fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(loc="upper left", fontsize=8)
    figure.savefig(out / "jct.png", dpi=140)
    plt.close(figure)
    results = {"live": live, "predicted": predicted}
    for name, result in results.items():
        draw_gantt(out / f"gantt_{name}.png", result, len(rows), title=name)
    (out / "gantt.html").write_text(gantt_page(results, len(rows)), encoding="utf-8")
