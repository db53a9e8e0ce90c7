"""Compare the configurations of Fig. 9 with their references and say what was promised.

What is promised (levels of DESIGN: D0, D1, each with or without D2) depends on the stages alone:

- D0 equals the reference as long as every device held one EST and was of the reference's type;
- D1 as long as every device was of the reference's type, whatever the placement;
- with D2 the type no longer matters, if it belongs to the pool.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lightning_easyscale.compare import Difference, compare_covered
from lightning_easyscale.record import Record

from ._config import Stage

REFERENCES = {"ddp-homo": "DDP-homo", "ddp-heter": "DDP-heter"}


def reference_of(level: str) -> str:
    """``ddp-heter`` for levels with D2, else ``ddp-homo``."""
    return "ddp-heter" if level.endswith("d2") else "ddp-homo"


def is_promised(level: str, stages: Sequence[Stage], index: int) -> bool:
    """Whether ``level`` promises equality with its reference up to the end of ``stages[index]``."""
    so_far = stages[: index + 1]
    reference_type = next(iter(stages[0].devices))
    one_type = all(set(stage.devices) == {reference_type} for stage in so_far)
    one_est_each = all(set(stage.ests_per_executor) == {1} for stage in so_far)
    return (level.endswith("d2") or one_type) and (level.startswith("d1") or one_est_each)


def verdict(record: Record, reference: Record, stage: Stage) -> tuple[Difference | None, str]:
    """Compare one stage: losses of all ESTs at every step, and the state at its end.

    Returns:
        The first difference or None, and what was compared.
    """
    for side in (record, reference):
        for rank in range(reference.num_ests):
            states = side.ests[rank].digests.get(stage.end_step, {}) if rank in side.ests else {}
            needed = {"parameters", "buffers", *(["optimizer"] if rank == 0 else [])}
            if missing := needed - set(states):
                what = f"digest of {', '.join(sorted(missing))} in {side.path}"
                return Difference(what, None, None, stage.end_step, rank), "nothing"
    difference, coverage = compare_covered(record, reference, steps=(stage.first_step, stage.end_step))
    return difference, str(coverage)


def build(
    *,
    num_ests: int,
    stages: Sequence[Stage],
    levels: Sequence[str],
    records: Mapping[str, Record],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of ``report.json``.

    Args:
        num_ests: N.
        stages: as run.
        levels: configurations, in order.
        records: of every level and of every reference that they need.
        about: further facts to keep (seed, workload, seconds).
    """
    equal: dict[str, dict[str, bool]] = {}
    promised: dict[str, dict[str, bool]] = {}
    differences: dict[str, dict[str, Any]] = {}
    compared: dict[str, dict[str, str]] = {}
    for level in levels:
        for group in (equal, promised, differences, compared):
            group[level] = {}
        for index, stage in enumerate(stages):
            difference, what = verdict(records[level], records[reference_of(level)], stage)
            equal[level][stage.key] = difference is None
            promised[level][stage.key] = is_promised(level, stages, index)
            compared[level][stage.key] = what
            if difference is not None:
                differences[level][stage.key] = {
                    "step": difference.step,
                    "est": difference.rank,
                    "what": difference.what,
                    "easyscale": difference.a,
                    "reference": difference.b,
                    "easyscale_bits": difference.bits_a,
                    "reference_bits": difference.bits_b,
                }
    kept = all(equal[level][key] for level in levels for key, wanted in promised[level].items() if wanted)
    return {
        "num_ests": num_ests,
        "stages": [
            {
                "devices": stage.devices,
                "steps": stage.end_step - stage.first_step,
                "first_step": stage.first_step,
                "ests_per_executor": list(stage.ests_per_executor),
                "hosts": list(stage.hosts) or None,
            }
            for stage in stages
        ],
        "references": {level: reference_of(level) for level in levels},
        "equal": equal,
        "promised": promised,
        "promises_kept": kept,
        "first_difference": differences,
        "compared": compared,
        **about,
    }


def stages_of(report: Mapping[str, Any]) -> list[Stage]:
    """The stages of a report, as they were run."""
    return [
        Stage(
            index=int(key.partition("_")[2]),
            devices=dict(stage["devices"]),
            ests_per_executor=tuple(stage["ests_per_executor"]),
            first_step=stage["first_step"],
            end_step=stage["first_step"] + stage["steps"],
            hosts=tuple(stage["hosts"] or ()),
        )
        for key, stage in zip(next(iter(report["equal"].values())), report["stages"], strict=True)
    ]


def write(report: Mapping[str, Any], file: Path) -> None:
    """Write ``report.json`` whole or not at all."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    temporary.replace(file)


def table(report: Mapping[str, Any], stages: Sequence[Stage]) -> Table:
    """Configuration x stage: ``equal`` or ``differs at step n``; a broken promise stands out."""
    out = Table(title=f"Losses of all {report['num_ests']} ESTs and state, bit for bit against stock DDP")
    out.add_column("configuration")
    out.add_column("reference")
    for stage in stages:
        out.add_column(f"{stage.key}: {stage.label}\nsteps {stage.first_step}..{stage.end_step - 1}")
    for level, row in report["equal"].items():
        cells = []
        for stage in stages:
            promised = report["promised"][level][stage.key]
            if row[stage.key]:
                cells.append("[green]equal[/]" if promised else "equal")
            else:
                step = report["first_difference"][level][stage.key]["step"]
                text = f"differs at step {step}"
                cells.append(f"[bold red]{text}, promise broken[/]" if promised else f"[yellow]{text}[/]")
        out.add_row(level.upper(), REFERENCES[report["references"][level]], *cells)
    return out
