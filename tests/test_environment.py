"""The environment that a process must start with, and the restart that gives it one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_easyscale import emulation, environment
from lightning_easyscale.devices import apply_environment

ROOT = Path(__file__).resolve().parents[1]


def test_an_environment_has_the_whole_say_about_instruction_sets():
    base = {"PATH": "/bin", "MKL_CBWR": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2"}
    assert apply_environment({}, base) == {"PATH": "/bin"}
    assert apply_environment({"MKL_CBWR": "COMPATIBLE"}, base) == {"PATH": "/bin", "MKL_CBWR": "COMPATIBLE"}
    assert base["MKL_CBWR"] == "AVX2"


def test_assigning_a_variable_does_not_put_it_in_force(monkeypatch):
    monkeypatch.setattr(environment, "_START_ENVIRONMENT", {"MKL_CBWR": "AVX2", "PATH": "/bin"})
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert environment.environment_in_force({"MKL_CBWR": "AVX2"})
    assert not environment.environment_in_force({"MKL_CBWR": "COMPATIBLE"})
    assert not environment.environment_in_force({})
    assert not environment.environment_in_force({"MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert environment.isa_environment() == {"MKL_CBWR": "AVX2"}


def test_pytest_is_refused_a_restart(monkeypatch):
    monkeypatch.setattr(environment, "_START_ENVIRONMENT", {})
    environment.ensure_environment({}, why="nothing is needed")
    with pytest.raises(RuntimeError, match=r"`env MKL_CBWR=AVX2`, because a p100 needs it.*runs under pytest.*HINT"):
        environment.ensure_environment({"MKL_CBWR": "AVX2"}, why="a p100 needs it")


# A user's script: torch has worked before the package is asked for anything.
SCRIPT = """
import os, sys
import torch
torch.ones(8, 8) @ torch.ones(8, 8)
print("start", os.getpid(), torch.backends.cpu.get_cpu_capability().lower(), *sys.argv[1:], flush=True)
from lightning_easyscale.environment import ensure_environment, isa_environment
from lightning_easyscale.emulation import instruction_set
os.chdir("/")
for capability in sys.argv[1].split(","):
    wanted = {"ATEN_CPU_CAPABILITY": capability} if capability != "native" else {}
    ensure_environment(wanted, why="this test says so")
    print("in force", os.getpid(), isa_environment(), flush=True)
"""


def run(directory, arguments, stdin=None, **variables):
    environment_ = apply_environment(variables) | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=environment_,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.emulation
@pytest.mark.parametrize("how", ["script", *(pytest.param(h, marks=pytest.mark.matrix) for h in ("module", "command"))])
def test_a_script_that_has_used_torch_restarts_once_with_the_environment(tmp_path, how):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "main.py").write_text("import lightning.pytorch\n" + SCRIPT)
    command = {"script": ["package/main.py"], "module": ["-m", "package.main"], "command": ["-c", SCRIPT]}[how]
    done = run(tmp_path, [*command, "default", "an argument with 'quotes'"])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    pid = lines[0].split()[1]
    assert lines[0].split(maxsplit=4)[4] == "an argument with 'quotes'"
    assert lines[0].split()[2] == emulation.host_cpu().isa
    assert lines[1:] == [
        f"start {pid} default default an argument with 'quotes'",
        f"in force {pid} {{'ATEN_CPU_CAPABILITY': 'default'}}",
    ]


@pytest.mark.emulation
def test_a_process_that_started_right_does_not_restart(tmp_path):
    done = run(tmp_path, ["-c", SCRIPT, "default"], ATEN_CPU_CAPABILITY="default")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["start", "in"]


@pytest.mark.matrix
@pytest.mark.emulation
def test_a_restart_can_also_remove_a_variable(tmp_path):
    done = run(tmp_path, ["-c", SCRIPT, "native"], ATEN_CPU_CAPABILITY="default")
    assert [line.split()[2] for line in done.stdout.splitlines()[:2]] == ["default", emulation.host_cpu().isa]


@pytest.mark.matrix
@pytest.mark.emulation
def test_one_process_cannot_be_two_types_one_after_the_other(tmp_path):
    done = run(tmp_path, ["-c", SCRIPT, "default,native"])
    assert done.returncode != 0
    assert done.stdout.count("start") == 2
    assert "restarted once already" in done.stderr


def test_a_program_from_standard_input_is_refused_with_the_cure(tmp_path):
    done = run(tmp_path, ["-", "default"], stdin=SCRIPT)
    assert done.returncode != 0
    assert done.stdout.count("start") == 1
    assert "has no script to run again" in done.stderr
    assert "env ATEN_CPU_CAPABILITY=default python script.py" in done.stderr


@pytest.fixture
def restarts(monkeypatch):
    """As in a user's process: not pytest, and a restart is only noted."""
    noted = []
    monkeypatch.setattr(environment, "_START_ENVIRONMENT", {})
    monkeypatch.setattr(environment, "_runs_under_pytest", lambda: False)
    monkeypatch.setattr(environment, "_restart", lambda command, variables: noted.append((command, variables)))
    return noted


def test_a_restart_runs_the_same_command(restarts):
    environment.ensure_environment({"MKL_CBWR": "AVX2"}, why="it is so")
    [(command, variables)] = restarts
    assert command == [sys.executable, *sys.orig_argv[1:]]
    assert variables["MKL_CBWR"] == "AVX2"


def test_an_interactive_session_is_refused(restarts, monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(RuntimeError, match="interactive session or a notebook"):
        environment.ensure_environment({"MKL_CBWR": "AVX2"}, why="it is so")
    assert not restarts


def test_a_child_of_multiprocessing_is_refused(restarts, monkeypatch):
    monkeypatch.setattr(environment.multiprocessing, "parent_process", lambda: "someone")
    with pytest.raises(RuntimeError, match="only its parent knows how to start it"):
        environment.ensure_environment({"MKL_CBWR": "AVX2"}, why="it is so")
    assert not restarts


def test_a_member_of_a_process_group_is_refused(restarts):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    with pytest.raises(RuntimeError, match="already belongs to a process group"):
        environment.ensure_environment({"MKL_CBWR": "AVX2"}, why="it is so")
    assert not restarts
