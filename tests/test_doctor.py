"""The doctor finds what breaks a level, and how many ESTs fit."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_easyscale import doctor
from lightning_easyscale.devices import DeviceType
from lightning_easyscale.doctor import (
    SUPPORTED,
    bytes_needed,
    check_devices,
    check_environment,
    check_threads,
    check_versions,
    cpu_quota,
    most_ests,
)

ROOT = Path(__file__).resolve().parents[1]
H100 = DeviceType("h100", "cuda", ("NVIDIA H100", "9.0", "132"))
A100 = DeviceType("a100", "cuda", ("NVIDIA A100", "8.0", "108"))


def test_supported_versions_are_those_of_the_distribution():
    text = (ROOT / "pyproject.toml").read_text()
    for package, (first, end) in SUPPORTED.items():
        low, high = re.search(rf'"{package}>=([\d.]+),<([\d.]+)"', text).groups()
        assert tuple(map(int, low.split(".")))[:2] == first
        assert tuple(map(int, high.split(".")))[:2] == end


@pytest.mark.parametrize("version", ["2.10.1", "2.15.0", "", "nightly"])
def test_a_version_out_of_range_breaks_every_level(version):
    (found,) = check_versions({"torch": version, "lightning": "2.6.6"})
    assert found.levels == ("D0", "D1", "D2")
    assert "torch>=2.11,<2.15" in str(found)


def test_versions_in_range_are_fine():
    assert check_versions({"torch": "2.13.0+cpu", "lightning": "2.5.0"}) == []


def test_a_cublas_workspace_of_another_size_breaks_every_level_on_gpus_only():
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":0:0"}
    (found,) = check_environment(environment, cuda=True)
    assert found.levels == ("D0", "D1", "D2")
    assert check_environment(environment, cuda=False) == []
    assert check_environment({"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, cuda=True) == []


def test_variables_that_change_bits_are_named():
    (found,) = check_environment({"MKL_CBWR": "AVX2", "NVIDIA_TF32_OVERRIDE": "1"}, cuda=False)
    assert "MKL_CBWR=AVX2" in found.what
    assert len(check_environment({"NVIDIA_TF32_OVERRIDE": "1"}, cuda=True)) == 1


def test_threads_are_suggested_and_a_quota_is_seen(tmp_path):
    (default,) = check_threads(4, cpus=16, quota=None)
    assert "`threads_per_est=4`" in default.cure
    assert "`threads_per_est=1`" in check_threads(4, cpus=16, quota=6.0)[1].cure
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path) is None
    assert cpu_quota(tmp_path / "none") is None


def test_gpus_of_two_types_break_d1():
    mixed = check_devices([H100, A100], num_ests=2, built_for_cuda=True)
    assert [one.levels for one in mixed] == [("D1",)]
    assert check_devices([H100, H100], num_ests=2, built_for_cuda=True) == []
    assert "NCCL" in check_devices([H100], num_ests=4, built_for_cuda=True)[0].what


def test_overlap_is_suggested_where_ests_share_gpus():
    (shared,) = check_devices([H100], num_ests=2, built_for_cuda=True)
    assert "2 ESTs share 1 GPU(s)" in shared.what
    assert "`overlap_backward=True`" in shared.cure
    assert not shared.levels


def test_a_torch_for_cuda_without_a_gpu_is_told():
    cpu = DeviceType("cpu", "cpu", ("vendor", "AVX2"))
    assert "sees no GPU" in check_devices([cpu], num_ests=2, built_for_cuda=True)[0].what


def test_memory_grows_by_a_gradient_per_est_or_by_the_tree():
    model = {"parameters": 1e6, "activations": 1e6, "optimizer": "adam"}
    assert bytes_needed(1, **model) == 4e6 * (1 + 2 + 1) + 1e6
    assert bytes_needed(8, **model) - bytes_needed(1, **model) == 7 * 4e6
    assert bytes_needed(8, reduction="tree", **model) - bytes_needed(1, reduction="tree", **model) == 6 * 4e6
    assert bytes_needed(64, reduction="tree", **model) < bytes_needed(64, **model) / 3
    assert most_ests(bytes_needed(5, **model), 16, **model) == 5
    assert most_ests(1e6, 16, **model) == 0
    assert bytes_needed(1, overlap=True, **model) == bytes_needed(1, **model)
    assert bytes_needed(8, overlap=True, **model) - bytes_needed(8, **model) == 1e6
    assert bytes_needed(8, offload=True, each=3.0, **model) == bytes_needed(1, **model) + 8 * 3.0


def test_the_command_says_what_fits(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda num_ests: check_versions({"torch": "1.0", "lightning": "2.6"}))
    room = bytes_needed(2, parameters=25.6e6, activations=3 * 2**30, each=5 + 100 * 2**20)
    monkeypatch.setattr(doctor, "_memory", lambda: ("a device", room, 5))
    model = ["--num-ests", "4", "--parameters", "25.6M", "--activations", "3GiB", "--input", "100MiB"]
    assert doctor.main(model) == 1
    out = capsys.readouterr().out
    assert 'gradient_offload="host": 4 of 4 ESTs fit on a device (4 GiB); the job needs at least 1 device(s)' in out
    # A third one's gradients take the place of a second one's inputs.
    assert 'reduction="tree", input_offload="host": 3 of 4 ESTs fit on a device (4 GiB)' in out
    assert 'reduction="ddp": 2 of 4 ESTs fit on a device (4 GiB); the job needs at least 2 device(s)' in out
    assert "D1: broken by the above" in out
    with pytest.raises(SystemExit):
        doctor.main(["--num-ests", "0"])


def test_the_command_runs_here():
    done = subprocess.run(
        [sys.executable, "-m", "lightning_easyscale.doctor", "--parameters", "1M"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=200,
    )
    assert done.returncode in (0, 1), done.stderr
    assert "nothing found that would break it" in done.stdout
    assert "4 of 4 ESTs fit" in done.stdout
