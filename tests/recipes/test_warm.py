"""Stages forked from a warm process: equal to stock DDP, stopped from outside, rebalanced by measured speeds."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("hydra")

from lightning_easyscale.compare import compare
from lightning_easyscale.rebalance import Rebalance
from recipes._config import WorkloadConf
from recipes._runs import RunFailedError
from recipes._stage import RunSpec
from recipes._stage_callbacks import read_report
from recipes.workloads import prepare

from .conftest import POOL

pytestmark = pytest.mark.emulation

STEPS = 18
WORKLOAD = vars(WorkloadConf(name="small", model="small_conv", channels=1, batch_size=4, lr=0.05))


def job(folder, name, **options):
    return RunSpec(
        **{
            "kind": "easyscale",
            "name": name,
            "level": "d1+d2",
            "num_ests": 4,
            "devices": "v100:1,t4:1",
            "ests_per_executor": (2, 2),
            "pool": POOL,
            "emulate": True,
            "threads": 1,
            "seed": 1,
            "first_step": 0,
            "end_step": STEPS,
            "digest_at": (STEPS,),
            "record": str(folder / name),
            "save": str(folder / f"{name}.ckpt"),
            "resume": None,
            "data": str(prepare(WORKLOAD, folder / "data")),
            "workload": WORKLOAD,
            "trainer": {"limit_val_batches": 0},
            **options,
        }
    )


@pytest.fixture(scope="module")
def reference(warm, folder):
    spec = job(folder, "reference", kind="reference", devices="v100:4", ests_per_executor=(1,) * 4)
    warm.start(spec, folder / "reference.log").wait(120)
    return spec.record


def test_rebalancing_moves_ests_to_the_faster_device_and_changes_no_bit(warm, folder, reference):
    arguments = {"dirpath": str(folder / "rebalance"), "every_n_steps": 5, "cost_seconds": 1.0}
    pace = ((0, (0.05, 0.15)),)  # saves 0.15 s in each of 13 steps, more than it costs; nothing after it does
    plan = Rebalance(**arguments)
    splits, number, resume = [(2, 2)], 0, None
    while True:
        spec = job(folder, "moving", ests_per_executor=splits[-1], resume=resume, pace=pace, rebalance=arguments)
        spec = replace(spec, report=str(folder / f"moving.{number}"))
        Path(spec.save).unlink(missing_ok=True)
        warm.start(spec, folder / f"moving{number}.log").wait(120)
        assert len(read_report(spec.report, 1)) > 2
        number += 1
        if plan.checkpoint is None:
            break
        splits.append(plan.ests_per_executor)
        resume = str(folder / "resume.ckpt")
        os.replace(plan.checkpoint, resume)
    assert splits[:2] == [(2, 2), (3, 1)]
    assert compare(reference, spec.record) is None


def test_a_stage_ends_when_told_and_goes_on_elsewhere(warm, folder, reference):
    control = folder / "stop"
    first = job(folder, "stopped", control=str(control), pace=((0, (0.02, 0.02)),), report=str(folder / "stopped.0"))
    run = warm.start(first, folder / "stopped.log")
    while len(read_report(first.report, 0)) < 5:
        assert not run.poll()
    control.touch()
    run.wait(60)
    done = read_report(first.report, 0)[-1][0]
    assert 4 <= done < STEPS
    control.unlink()
    second = replace(first, devices="t4:1", ests_per_executor=(4,), resume=first.save, pace=(), first_step=done)
    second = replace(second, save=str(folder / "second.ckpt"), report=None)
    warm.start(second, folder / "second.log").wait(120)
    assert compare(reference, second.record) is None


def test_a_failing_process_is_named_with_its_log(warm, folder):
    run = warm.start(job(folder, "bad", resume=str(folder / "nothing.ckpt")), folder / "bad.log")
    with pytest.raises(RunFailedError, match=r"bad: process \d failed(.|\n)*nothing.ckpt"):
        run.wait(60)
