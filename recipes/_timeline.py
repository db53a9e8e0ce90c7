"""What happened in a live job, from its folder, and the figure of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from lightning_easyscale.record import Record

from ._figure import loss_difference


@dataclass(frozen=True)
class Span:
    """A stage as it was run.

    Args:
        devices: what it ran on, in words.
        types: device type of each executor.
        first_step: optimizer steps done before it.
        end_step: and after it.
        paused_s: seconds from the notice before it until its first step was done; of the first stage, its start. The
            four that follow add up to it.
        boundary_s: until all ESTs had agreed on the step to stop at; they trained until then.
        saving_s: then, until they had saved.
        forming_s: then, until the executors of this stage were connected.
        stepping_s: then, until the first step was done.
    """

    devices: str
    types: tuple[str, ...]
    first_step: int
    end_step: int
    paused_s: float
    boundary_s: float
    saving_s: float
    forming_s: float
    stepping_s: float


def read_spans(events: Path, end_step: int) -> list[Span]:
    """The stages of a job that has ended.

    Args:
        events: the job's file of events.
        end_step: optimizer steps of the whole job.
    """
    spans: list[dict[str, Any]] = []
    now: dict[str, Any] = {}
    times: dict[str, float] = {}  # when the pause that lasts began, and what has been reached in it
    for event in map(json.loads, events.read_text().splitlines()):
        kind, time = event["event"], event["time"]
        if kind in ("stopping", "notice", "starting", "formed"):  # agents start executors and say nothing
            times.setdefault("began", time)
        if kind in ("agreed", "saved", "formed"):
            times[kind] = time
        if kind in ("starting", "moving"):
            now = {"devices": event["devices"], "types": tuple(event["types"])}
        elif kind == "formed" and len(now.get("types", ())) != (count := len(event["placement"])):  # by an agent
            now = {"devices": f"{count} device" + "s" * (count > 1), "types": ("device",) * count}
        elif kind == "first_step" and times:
            times["first_step"] = time
            parts = _parts(times)
            spans.append({**now, "first_step": event["step"] - 1, "paused_s": sum(parts.values()), **parts})
            times = {}
    ends = [span["first_step"] for span in spans[1:]] + [end_step]
    return [Span(**span, end_step=end) for span, end in zip(spans, ends, strict=True)]


def _parts(times: dict[str, float]) -> dict[str, float]:
    """How long each part of a pause took; one that a crash left out took no time."""
    parts, last = {}, times["began"]
    for mark, name in (("agreed", "boundary"), ("saved", "saving"), ("formed", "forming"), ("first_step", "stepping")):
        at = max(times.get(mark, last), last)
        parts[f"{name}_s"], last = at - last, at
    return parts


def plain(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """For a report."""
    return [{key: round(v, 3) if isinstance(v, float) else v for key, v in asdict(span).items()} for span in spans]


def draw(file: Path, *, spans: Sequence[Span], record: Record, reference: Record, title: str) -> None:
    """Devices and types over steps with the pauses between, the loss, and its difference from the reference.

    Args:
        file: a ``.png``.
        spans: the stages as they were run.
        record: of the job.
        reference: of stock DDP.
        title: of the figure.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, middle, bottom) = plt.subplots(
        3, 1, figsize=(9, 6.5), sharex=True, layout="constrained", height_ratios=(1.2, 1.2, 0.8)
    )
    names = list(dict.fromkeys(name for span in spans for name in span.types))
    for color, name in enumerate(names):
        for span in spans:
            below = sum(Counter(span.types)[other] for other in names[:color])
            top.bar(
                span.first_step,
                Counter(span.types)[name],
                width=span.end_step - span.first_step,
                bottom=below,
                align="edge",
                color=f"C{color}",
                edgecolor="white",
                label=name if span is spans[0] else None,
            )
    tallest = max(len(span.types) for span in spans)
    for span in spans[1:]:
        top.text(span.first_step, tallest + 0.15, f"{span.paused_s:.1f} s", ha="center", va="bottom", size=8)
        for panel in (middle, bottom):
            panel.axvline(span.first_step, color="0.6", linestyle="--", linewidth=0.8)
    top.set_ylim(0, tallest + 0.8)
    top.set_ylabel("devices, pauses")
    top.legend(loc="lower right", fontsize=8, title=None)
    last = record.num_ests - 1
    per_step = _batches_per_step(record)
    for side, style, label in ((reference, {"color": "0.7", "linewidth": 4}, "stock DDP"), (record, {}, "this job")):
        batches, losses = side.ests[last].series()
        middle.plot(np.asarray(batches) / per_step, losses, label=label, **style)
    middle.set_ylabel("loss of the last EST")
    middle.legend(loc="upper right", frameon=False, fontsize=8)
    compared, difference = loss_difference(record, reference, last)
    bottom.plot(compared / per_step, difference, marker=".", markersize=3, linewidth=0.5)
    bottom.set_ylabel("difference")
    bottom.set_xlabel("optimizer step")
    figure.suptitle(title, size=11)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _batches_per_step(record: Record) -> float:
    entries = record.ests[0].steps
    last = entries[max(entries)]
    return (last.batch + 1) / (last.step + 1)
