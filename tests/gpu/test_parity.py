"""On a GPU: every placement of N ESTs equals stock DDP of N processes, bit for bit.

With one GPU the N processes of the reference share it over gloo, and so do several executors. With two GPUs the
reference for N = 2 runs over NCCL, one process per GPU, and the executors talk over NCCL.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_easyscale.compare import compare
from lightning_easyscale.record import Record

from ..ports import free_port
from ..recipes.test_workloads import NAMES, tiny

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
STEPS = 10  # 256 samples, N = 4, batch 8: eight batches an epoch


def run(folder: Path, name: str, *, processes: int, share: bool = True, **spec: Any) -> Path:
    """Run a job in `processes` processes that share the first GPU, or have one each; returns its record."""
    record = folder / name
    full = {
        "record": str(record),
        "save": str(folder / f"{name}.ckpt"),
        "resume": None,
        "digest_at": [4, 7, STEPS],
        "steps": STEPS,
        "split": None,
        "reduction": "auto",
        "backend": "gloo",
        "accelerator": "cuda" if torch.cuda.is_available() else "cpu",
        "precision": "32-true",
        "model": None,
        "workload": None,
        "metrics": True,
        "overlap": "auto",
        "offload": None,
        "input_offload": None,
        "devices": 1 if share else processes,
        "num_nodes": processes if share else 1,
        **spec,
    }
    file = folder / f"{name}.{full['steps']}.json"
    file.write_text(json.dumps(full))
    base = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    workers = []
    for i in range(processes):
        ranks = {"NODE_RANK": str(i), "LOCAL_RANK": "0"} if share else {"NODE_RANK": "0", "LOCAL_RANK": str(i)}
        workers.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.gpu.job", str(file)],
                cwd=ROOT,
                env={**base, **ranks},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [w.communicate(timeout=200)[0] for w in workers]
    finally:
        for worker in workers:
            worker.kill()
    failed = [o for w, o in zip(workers, outputs, strict=True) if w.returncode]
    assert not failed, failed[0][-4000:]
    return record


def assert_equal(ours: Path, reference: Path) -> None:
    assert len(Record.load(ours).ests) == len(Record.load(reference).ests)
    difference = compare(ours, reference)
    assert difference is None, str(difference)


@pytest.mark.parametrize("model", ["resnet", "transformer"])
@pytest.mark.parametrize("reduction", ["ddp", "tree"])
def test_four_ests_on_one_gpu_equal_four_processes_after_every_move(tmp_path, model, reduction):
    common = {"n": 4, "model": model, "reduction": reduction, "metrics": False}
    reference = run(tmp_path, "reference", processes=4, kind="ddp", **common)
    assert_equal(run(tmp_path, "one", processes=1, kind="easyscale", split=[4], **common), reference)
    for option in ({"overlap": False}, {"overlap": True}, {"offload": "host"}):
        held = {"kind": "easyscale", "split": [4], **option}
        assert_equal(run(tmp_path, f"one {option}", processes=1, **held, **common), reference)
    # 4 -> 3 + 1 -> 1 + 3, handed over in mid-epoch.
    ckpt = str(tmp_path / "moved.ckpt")
    common["kind"] = "easyscale"
    moved = run(tmp_path, "moved", processes=1, split=[4], steps=4, **common)
    run(tmp_path, "moved", processes=2, split=[3, 1], steps=7, resume=ckpt, **common)
    run(tmp_path, "moved", processes=2, split=[1, 3], resume=ckpt, **common)
    assert_equal(moved, reference)


@pytest.mark.parametrize("reduction", ["ddp", "tree"])
def test_gradients_that_wait_in_host_memory_equal_four_processes(tmp_path, reduction):
    common = {"n": 4, "model": "transformer", "reduction": reduction}
    reference = run(tmp_path, "reference", processes=4, kind="ddp", **common)
    for split, options in (
        ([4], {"offload": "host"}),
        ([4], {"offload": "host", "overlap": "tail"}),
        ([3, 1], {"offload": "host"}),
        ([4], {"input_offload": "host"}),
    ):
        held = {"kind": "easyscale", "split": split, **options}
        assert_equal(run(tmp_path, f"ours {split} {options}", processes=len(split), **held, **common), reference)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_equals_stock(tmp_path, precision):
    common = {"n": 2, "model": "transformer", "precision": precision}
    reference = run(tmp_path, "reference", processes=2, kind="ddp", **common)
    for overlap in (False, True, "tail"):
        held = {"kind": "easyscale", "split": [2], "overlap": overlap}
        assert_equal(run(tmp_path, f"ours {overlap}", processes=1, **held, **common), reference)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("model", ["resnet", "transformer"])
@pytest.mark.parametrize("reduction", ["ddp", "tree"])
def test_four_ests_on_two_gpus_equal_four_processes_after_every_move(tmp_path, model, reduction):
    common = {"n": 4, "model": model, "reduction": reduction, "metrics": False}
    reference = run(tmp_path, "reference", processes=4, kind="ddp", **common)
    # 2 + 2 -> 4 on one GPU -> 3 + 1, handed over in mid-epoch; the executors talk over NCCL.
    ckpt = str(tmp_path / "moved.ckpt")
    common |= {"kind": "easyscale", "backend": "nccl"}
    moved = run(tmp_path, "moved", processes=2, share=False, split=[2, 2], steps=4, **common)
    run(tmp_path, "moved", processes=1, share=False, split=[4], steps=7, resume=ckpt, **common)
    run(tmp_path, "moved", processes=2, share=False, split=[3, 1], resume=ckpt, **common)
    assert_equal(moved, reference)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("model", ["resnet", "transformer"])
def test_two_ests_equal_stock_over_nccl(tmp_path, model):
    common = {"n": 2, "model": model, "backend": "nccl"}
    reference = run(tmp_path, "reference", processes=2, share=False, kind="ddp", **common)
    assert_equal(run(tmp_path, "one", processes=1, kind="easyscale", split=[2], **common), reference)
    spread = run(tmp_path, "two", processes=2, share=False, kind="easyscale", split=[1, 1], **common)
    assert_equal(spread, reference)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("name", NAMES)
def test_two_ests_of_a_workload_equal_stock_over_nccl(tmp_path, tmp_path_factory, name):
    from recipes.workloads import prepare

    workload = tiny(name)
    directory = prepare(workload, tmp_path_factory.getbasetemp() / "workloads")
    common = {"n": 2, "workload": workload, "directory": str(directory), "backend": "nccl", "steps": 5}
    reference = run(tmp_path, "reference", processes=2, share=False, kind="ddp", digest_at=[1, 5], **common)
    for overlap in (False, True, "tail"):
        held = {"kind": "easyscale", "split": [2], "digest_at": [1, 5], "overlap": overlap}
        assert_equal(run(tmp_path, f"one {overlap}", processes=1, **held, **common), reference)


def test_executors_on_one_gpu_over_nccl_are_told_what_to_do(tmp_path):
    with pytest.raises(AssertionError, match=r"executors 0 and 1 are both on the GPU .* HINT: agents of torchrun"):
        run(tmp_path, "ours", processes=2, kind="easyscale", n=2, split=[1, 1], model="resnet", backend="nccl")
