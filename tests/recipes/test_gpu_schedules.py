"""The main job with GPUs and CPUs in one schedule: who runs where, and D2's `portable` policy from end to end."""

from __future__ import annotations

import io
import json
import threading
from dataclasses import replace

import pytest
import torch

pytest.importorskip("hydra")
from rich.console import Console

from lightning_easyscale.compare import compare
from lightning_easyscale.kernels import FORMAT_VERSION, build
from recipes._config import ConfigError, check, name_gpu
from recipes._runs import _commands, execute
from recipes._stage import _reference_arguments
from recipes.accuracy_consistency import environments_of, plan, run
from recipes.workloads import prepare

from ..test_devices import H100, V100, use_gpus
from .test_accuracy_consistency import configure


@pytest.fixture
def gpu(monkeypatch):
    use_gpus(monkeypatch, H100)


@pytest.mark.usefixtures("gpu")
def test_fig9_with_a_gpu_and_cpus_has_references_that_share_the_gpu(tmp_path):
    conf = configure("experiment=fig9_gpu_cpu")
    name_gpu(conf)
    runs = plan(conf, check(conf), tmp_path, tmp_path)
    assert [(spec.kind, spec.level, spec.devices) for spec in runs] == [
        ("reference", "d1", "h100:4"),
        ("reference", "d1+d2", "h100:4"),
        *(("easyscale", level, on) for level in ("d1", "d1+d2") for on in ("h100:1", "cpu:2", "h100:1,cpu:1")),
    ]
    assert [spec.ests_per_executor for spec in runs[2:5]] == [(4,), (2, 2), (3, 1)]
    assert {(spec.pool, spec.reduction, spec.process_group_backend) for spec in runs} == {
        (("h100", "cpu"), "ddp", "gloo")
    }
    assert {spec.start_method for spec in runs} == {"popen"}
    assert runs[0].hosts == ("h100:1",) * 4
    places = [place for _, place in _commands(runs[0], tmp_path / "spec.json")]
    assert [place["NODE_RANK"] for place in places] == ["0", "1", "2", "3"]
    assert len({place["MASTER_PORT"] for place in places}) == 1
    assert len(environments_of(runs[0])) == 4
    assert _reference_arguments(runs[1])["devices"] == [0]
    assert _reference_arguments(runs[1])["num_nodes"] == 4


def test_four_gpus_are_one_for_each_worker_of_the_reference(monkeypatch, tmp_path):
    use_gpus(monkeypatch, V100, H100, H100, H100, H100)
    conf = configure("schedule.stages=[{devices: {h100: 4}, steps: 2}]", "determinism=d1", "emulate=false")
    reference = plan(conf, check(conf), tmp_path, tmp_path)[0]
    assert reference.hosts == ()
    assert _reference_arguments(reference)["devices"] == [1, 2, 3, 4]


def test_a_gpu_is_named_only_where_there_is_one(monkeypatch):
    use_gpus(monkeypatch)
    with pytest.raises(ConfigError, match="has a `gpu`, and this machine has none"):
        name_gpu(configure("schedule=gpu_cpu"))
    name_gpu(configure("schedule=smoke"))


@pytest.mark.emulation
def test_a_gpu_in_the_pool_leaves_every_process_its_own_instruction_set(monkeypatch, tmp_path):
    use_gpus(monkeypatch)
    conf = configure("schedule=smoke", "pool=[v100,p100,h200]", "determinism=d1_d2", "threads_per_est=1")
    runs = plan(conf, check(conf), tmp_path, tmp_path)
    assert {spec.pool for spec in runs} == {("v100", "p100", "h200")}
    assert [spec.start_method for spec in runs] == ["fork", "fork", "fork", "popen"]
    assert not {"ATEN_CPU_CAPABILITY"} & environments_of(runs[3])[0].keys()


@pytest.mark.usefixtures("gpu")
def test_no_process_of_a_job_that_uses_a_gpu_is_forked(tmp_path):
    conf = configure("schedule.stages=[{devices: {h100: 1}, steps: 1}]", "threads_per_est=1", "emulate=false")
    assert {spec.start_method for spec in plan(conf, check(conf), tmp_path, tmp_path)} == {"popen"}


@pytest.mark.emulation
@pytest.mark.skipif(bool(build.why_unavailable()), reason=build.why_unavailable() or "available")
def test_executors_of_two_cpu_types_equal_stock_ddp_under_the_policy_of_gpus(tmp_path):
    pytest.importorskip("mlxtend")
    stages = "schedule.stages=[{devices: {v100: 1, t4: 1}, steps: 3}]"
    pool = "pool=[v100,t4,h200]"
    conf = configure("schedule=smoke", stages, pool, "determinism=d1_d2", "workload.batch_size=8", "threads_per_est=1")
    console = Console(file=io.StringIO(), width=200)
    assert run(conf, tmp_path, console) == 0, console.file.getvalue()
    assert json.loads((tmp_path / "report.json").read_text())["equal"] == {"d1+d2": {"stage_0": True}}
    saved = torch.load(tmp_path / "checkpoints" / "d1+d2" / "stage_0.ckpt", weights_only=True)
    assert saved["easyscale"]["job"]["kernels"] == f"portable {FORMAT_VERSION}"


@pytest.mark.matrix
def test_workers_that_stand_for_hosts_are_the_same_reference(tmp_path):
    """On a GPU they have to, to share it."""
    pytest.importorskip("mlxtend")
    stages = "schedule.stages=[{devices: {cpu: 2}, steps: 2}]"
    conf = configure("schedule=smoke", stages, "determinism=d1", "emulate=false", "workload.batch_size=8")
    usual = plan(conf, check(conf), tmp_path, prepare(vars(conf.workload), tmp_path / "data"))[0]
    names = {"record": str(tmp_path / "hosts"), "save": str(tmp_path / "checkpoints" / "hosts" / "end.ckpt")}
    hosts = replace(usual, hosts=("cpu:1", "cpu:1"), **names)
    for spec in (usual, hosts):
        execute(
            spec,
            log=tmp_path / f"{len(spec.hosts)}.log",
            environments=environments_of(spec),
            timeout_s=200.0,
            progress=lambda done: None,
            stop=threading.Event(),
        )
    assert compare(hosts.record, usual.record) is None
