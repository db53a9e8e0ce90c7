"""Every way to start a job gives the same bits, and every executor ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_easyscale import EasyScaleStrategy
from lightning_easyscale import checkpoint as ckpt

from ..ports import free_port
from .job import make_trainer

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, "-m", "tests.launch.script"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
pytestmark = pytest.mark.timeout(150)


def environment(**variables: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "EASYSCALE_", "PYTEST_"))}
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK"):
        kept.pop(name, None)
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", **variables}


def start(command: list[str], *, cwd: Path = ROOT, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=cwd, env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*processes: subprocess.Popen[str], seconds: float = 100) -> list[str]:
    """Their output; fails if one fails, and ends all in any case."""
    try:
        outputs = [p.communicate(timeout=seconds)[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text())


def bits(expected: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in expected.items() if key != "checkpoint"}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One executor, no second process."""
    out = tmp_path_factory.mktemp("expected")
    finish(start([*SCRIPT, "--out", str(out), "--devices", "1"]))
    return {**result(out), "checkpoint": str(out / "after.ckpt")}


@pytest.mark.matrix
def test_python_m(expected: Mapping[str, Any], tmp_path: Path) -> None:
    (output,) = finish(start([*SCRIPT, "--out", str(tmp_path)]))
    assert "3 ESTs as 2 + 1 on 2 executors" in output
    assert result(tmp_path) == bits(expected)
    saved = ckpt.load(tmp_path / "after.ckpt")[ckpt.KEY]
    assert sorted(saved["ests"]) == [0, 1, 2]
    assert saved["placement"] == [2, 1]


@pytest.mark.matrix
def test_a_script_with_a_relative_path(expected: Mapping[str, Any], tmp_path: Path) -> None:
    finish(start([sys.executable, "plain_script.py", "--out", str(tmp_path)], cwd=ROOT / "tests" / "launch"))
    assert result(tmp_path) == bits(expected)


@pytest.mark.matrix
def test_a_hydra_application_that_changes_directory(expected: Mapping[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("hydra")
    app = [sys.executable, "hydra_app.py", f"+out={tmp_path}", f"hydra.run.dir={tmp_path}/run", "hydra.job.chdir=true"]
    finish(start(app, cwd=ROOT / "tests" / "launch"))
    assert result(tmp_path) == bits(expected)
    assert (tmp_path / "run" / "where").is_dir()


@pytest.mark.parametrize("method", ["spawn", pytest.param("fork", marks=pytest.mark.matrix)])
def test_start_methods(expected: Mapping[str, Any], tmp_path: Path, method: str) -> None:
    finish(start([*SCRIPT, "--out", str(tmp_path), "--start-method", method]))
    again = ckpt.load(tmp_path / "after.ckpt")["state_dict"]  # the calling process has the lead's parameters
    parameters = [value.tolist() for name, value in again.items() if name.endswith(("weight", "bias"))]
    assert result(tmp_path)["parameters"] == parameters
    one = ckpt.load(expected["checkpoint"])["state_dict"]
    assert all(torch.equal(again[name], one[name]) for name in one)


@pytest.mark.matrix
def test_torchrun_with_one_agent_ignores_devices(expected: Mapping[str, Any], tmp_path: Path) -> None:
    agent = [*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "tests.launch.script"]
    (output,) = finish(start([*agent, "--out", str(tmp_path), "--devices", "7"]))
    assert output.count("torchrun has started 2 processes; `devices` (7) and `num_nodes` (1) of the Trainer") == 1
    assert result(tmp_path) == bits(expected)


def two_agents(out: Path, *options: str, **variables: str) -> list[str]:
    port = free_port()
    agent = [*TORCHRUN, "--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=x"]
    script = ["-m", "tests.launch.script", "--out", str(out), "--devices", "1", *options]
    return finish(
        start([*agent, "--nproc-per-node=1", *script], **variables),
        start([*agent, "--nproc-per-node=2", *script], **variables),
    )


def test_torchrun_with_two_agents_of_different_size(expected: Mapping[str, Any], tmp_path: Path) -> None:
    two_agents(tmp_path)
    assert result(tmp_path) == bits(expected)
    assert ckpt.load(tmp_path / "after.ckpt")[ckpt.KEY]["placement"] == [1, 1, 1]


@pytest.mark.matrix
@pytest.mark.emulation
def test_torchrun_workers_restart_for_their_device_types(tmp_path: Path) -> None:
    options = ["--accelerator", "easyscale", "--determinism", "D0"]
    agent = [*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "tests.launch.script", "--num-ests", "2", *options]
    (output,) = finish(start([*agent, "--out", str(tmp_path / "a"), "--devices", "t4:1,v100:1"], EASYSCALE_EMULATE="1"))
    assert "0: t4 (emulated" in output
    assert output.count("Restarting") == 1, "only the worker that needs another environment restarts"
    script = [*SCRIPT, "--num-ests", "2", *options, "--out", str(tmp_path / "b"), "--devices", "t4:1,v100:1"]
    finish(start(script, EASYSCALE_EMULATE="1"))
    assert result(tmp_path / "a") == result(tmp_path / "b")


@pytest.mark.matrix
def test_processes_that_the_user_starts(expected: Mapping[str, Any], tmp_path: Path) -> None:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    finish(*(start([*SCRIPT, "--out", str(tmp_path)], LOCAL_RANK=rank, **meeting) for rank in "01"))
    assert result(tmp_path) == bits(expected)


@pytest.mark.matrix
def test_hosts_that_the_user_starts(expected: Mapping[str, Any], tmp_path: Path) -> None:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    script = [*SCRIPT, "--out", str(tmp_path), "--devices", "1", "--num-nodes", "2"]
    finish(*(start(script, NODE_RANK=rank, **meeting) for rank in "01"))
    assert result(tmp_path) == bits(expected)


@pytest.mark.matrix
def test_a_drawn_seed_is_shared_and_recorded(tmp_path: Path) -> None:
    (output,) = finish(start([*SCRIPT, "--out", str(tmp_path), "--no-seed"]))
    drawn = result(tmp_path)["seed"]
    assert output.count(f"No seed is set; drew {drawn}") == 1
    assert ckpt.load(tmp_path / "after.ckpt")[ckpt.KEY]["seed"] == drawn
    again = tmp_path / "again"
    finish(start([*SCRIPT, "--out", str(again), "--no-seed", "--devices", "1"], PL_GLOBAL_SEED=str(drawn)))
    assert result(again) == result(tmp_path)


def test_an_error_on_one_executor_ends_all_with_its_cause(tmp_path: Path) -> None:
    process = start([*SCRIPT, "--out", str(tmp_path), "--fail", "2"])
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "ZeroDivisionError: on purpose" in output
    assert not (tmp_path / "after.ckpt").exists()


def test_torchrun_needs_num_ests(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    for name, value in {**variables, "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"`num_ests` must be given under torchrun.* HINT: .*EASYSCALE_NUM_ESTS"):
        make_trainer("unused", strategy=EasyScaleStrategy())
    monkeypatch.setenv("EASYSCALE_NUM_ESTS", "5")
    assert make_trainer("unused", strategy=EasyScaleStrategy()).strategy.placement.ests_per_executor == (3, 2)


def test_two_network_namespaces(expected: Mapping[str, Any], tmp_path: Path) -> None:
    ip = shutil.which("ip")
    if ip is None or os.geteuid() != 0:
        pytest.skip("needs the `ip` command and root to make network namespaces")
    names = (f"easyscale-{os.getpid()}-a", f"easyscale-{os.getpid()}-b")
    try:
        for command in (
            *(f"netns add {name}" for name in names),
            f"link add esa netns {names[0]} type veth peer name esb netns {names[1]}",
            *(f"-n {n} addr add 10.99.0.{i + 1}/24 dev es{'ab'[i]}" for i, n in enumerate(names)),
            *(f"-n {n} link set {d} up" for n, d in zip(names * 2, ("esa", "esb", "lo", "lo"), strict=True)),
        ):
            done = subprocess.run([ip, *command.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"cannot make network namespaces: `ip {command}`: {done.stderr.strip()}")
        script = [*SCRIPT, "--out", str(tmp_path), "--devices", "1", "--num-nodes", "2"]
        meeting = {"MASTER_ADDR": "10.99.0.1", "MASTER_PORT": "29400"}
        finish(
            *(
                start(
                    [ip, "netns", "exec", name, *script],
                    NODE_RANK=str(i),
                    GLOO_SOCKET_IFNAME=f"es{'ab'[i]}",
                    **meeting,
                )
                for i, name in enumerate(names)
            )
        )
        assert result(tmp_path) == bits(expected)
    finally:
        for name in names:
            subprocess.run([ip, "netns", "delete", name], capture_output=True)
