"""Show that `Rebalance` shortens steps and changes no bit: ``python -m recipes.rebalance DIRECTORY``.

Two cases of four ESTs on two emulated, paced devices: a T4 that is 2.6 times slower than the V100 beside it, from an
even split; and two V100 of which one is throttled to a third of its speed in the middle of the run. Each runs with ESTs
that stay and with `Rebalance`, relaunched whenever it has moved, and is compared with stock DDP on four workers. The
result goes to ``rebalance.json``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from lightning_easyscale import devices
from lightning_easyscale.compare import compare
from lightning_easyscale.rebalance import Rebalance

from ._config import WorkloadConf
from ._stage import RunSpec
from ._stage_callbacks import read_report
from ._warm import WarmProcesses
from .workloads import prepare

POOL = ("v100", "t4")
STEPS = 80
CASES: dict[str, tuple[str, tuple[tuple[int, tuple[float, ...]], ...]]] = {
    "slow type": ("v100:1,t4:1", ((0, (0.10, 0.26)),)),
    "throttled device": ("v100:2", ((0, (0.10, 0.10)), (20, (0.30, 0.10)))),
}
_WORKLOAD = vars(WorkloadConf(name="mnist_conv", model="small_conv", channels=1, batch_size=8))


def run_case(name: str, home: Path, warm: WarmProcesses, data: Path) -> dict[str, Any]:
    """One case: step times with and without moving, and the first difference from the reference."""
    chosen, pace = CASES[name]
    shutil.rmtree(home, ignore_errors=True)  # reports of an earlier run would be taken for this one's
    base = RunSpec(
        kind="easyscale",
        name=name,
        level="d1+d2",
        num_ests=4,
        devices=chosen,
        ests_per_executor=(2, 2),
        pool=POOL,
        emulate=True,
        threads=1,
        seed=1,
        first_step=0,
        end_step=STEPS,
        digest_at=(STEPS,),
        record=str(home / "stays"),
        save=str(home / "stays.ckpt"),
        resume=None,
        data=str(data),
        workload=_WORKLOAD,
        trainer={"limit_val_batches": 0},
        pace=pace,
    )
    reference = replace(base, kind="reference", devices="v100:4", record=str(home / "reference"), pace=())
    warm.start(replace(reference, save=str(home / "reference.ckpt")), home / "log_reference").wait(300)
    stays = replace(base, report=str(home / "stays_steps"))
    warm.start(stays, home / "log_stays").wait(300)
    arguments = {"dirpath": str(home / "plan"), "every_n_steps": 10, "cost_seconds": 1.0}
    plan, stages, resume = Rebalance(**arguments), [], None
    split: tuple[int, ...] = base.ests_per_executor
    while True:
        report = home / f"moves_steps_{len(stages)}"
        stage = replace(base, record=str(home / "moves"), save=str(home / "moves.ckpt"), report=str(report))
        stage = replace(stage, ests_per_executor=split, resume=resume, rebalance=arguments)
        warm.start(stage, home / f"log_moves_{len(stages)}").wait(300)
        lines = read_report(report, 0)
        stages.append({"ests": split, "first_step": lines[0][0], "last_step": lines[-1][0], "step_s": _step(lines)})
        if plan.checkpoint is None:
            break
        assert plan.ests_per_executor is not None
        split, resume = plan.ests_per_executor, str(home / "resume.ckpt")
        os.replace(plan.checkpoint, resume)
    found = {kind: compare(reference.record, str(home / kind)) for kind in ("stays", "moves")}
    return {
        "devices": chosen,
        "pace": pace,
        "stays_step_s": _step(read_report(str(stays.report), 0)[-stages[-1]["last_step"] + stages[-1]["first_step"] :]),
        "stages": stages,
        "difference": {kind: None if d is None else str(d) for kind, d in found.items()},
    }


def _step(lines: list[tuple[int, float, float]]) -> float:
    """Median seconds per step; the first and the last, which begin and end a stage, left out."""
    return median(b[1] - a[1] for a, b in zip(lines[1:], lines[2:-1], strict=False))


def main(directory: Path) -> None:
    """Run both cases."""
    environment = devices.apply_environment(devices.pinned_environment(POOL, emulate=True))
    data = prepare(_WORKLOAD, directory / "data")
    with WarmProcesses(environment) as warm:
        report = {name: run_case(name, directory / name.replace(" ", "_"), warm, data) for name in CASES}
    text = json.dumps(report, indent=1)
    (directory / "rebalance.json").write_text(text)
    print(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
