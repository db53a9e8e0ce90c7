from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_easyscale import devices, emulation, environment, probe
from lightning_easyscale.devices import (
    DeviceType,
    available_types,
    cpu_identity,
    d2_policy,
    detect,
    device_type,
    environment_of,
    parse_devices,
    pinned_environment,
    refuse_shared_gpus,
)
from lightning_easyscale.emulation import EMULATED_TYPES, ISA_VARIABLES, HostCPU

ROOT = Path(__file__).resolve().parents[1]


def use_host(monkeypatch, isa, why_not=""):
    host = HostCPU("GenuineIntel", "Test CPU", isa, why_not)
    for module in (emulation, devices, probe):
        monkeypatch.setattr(module, "host_cpu", lambda: host)


def use_gpus(monkeypatch, *gpus):
    """`gpus`: (name, major, minor, multiprocessors)"""
    properties = [SimpleNamespace(name=n, major=a, minor=b, multi_processor_count=c) for n, a, b, c in gpus]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties[i])


V100 = ("Tesla V100-SXM2-16GB", 7, 0, 80)
P100 = ("Tesla P100-PCIE-16GB", 6, 0, 56)
H100 = ("NVIDIA H100 80GB HBM3", 9, 0, 132)
H100_PCIE = ("NVIDIA H100 PCIe", 9, 0, 114)


@pytest.fixture
def no_gpus(monkeypatch):
    use_gpus(monkeypatch)
    use_host(monkeypatch, "avx512")


@pytest.mark.usefixtures("no_gpus")
@pytest.mark.parametrize(
    ("given", "types"),
    [
        ("v100:1,p100:2", ("v100", "p100", "p100")),
        (" V100 , p100:1, v100:1 ", ("v100", "p100", "v100")),
        ({"v100": 1, "p100": 2, "t4": 0}, ("v100", "p100", "p100")),
        ({"t4": "2"}, ("t4", "t4")),
        (["v100", "p100:2"], ("v100", "p100", "p100")),
        (3, ("v100",) * 3),
        ("3", ("v100",) * 3),
        ("cpu:2", ("cpu", "cpu")),
    ],
)
def test_devices_are_read_as_one_type_per_device_in_order(given, types):
    assert parse_devices(given, emulate=True) == types


@pytest.mark.usefixtures("no_gpus")
def test_a_count_without_emulation_means_the_machines_own_devices():
    assert parse_devices(2, emulate=False) == ("cpu", "cpu")


@pytest.mark.usefixtures("no_gpus")
@pytest.mark.parametrize(
    ("given", "emulate", "message"),
    [
        ("v100:1", False, r"`v100` is not on this machine, which has: cpu\. HINT: to emulate.*EASYSCALE_EMULATE=1"),
        ("v10:1", True, r"`v10` is not on this machine, which has: v100, p100, t4, cpu\..*did you mean `v100`"),
        ("h200", True, r"`h200` is not on this machine, which has: v100, p100, t4, cpu\."),
        ("v100:-1", True, r"`devices='v100:-1'` asks for -1 devices"),
        (-2, True, r"`devices=-2` asks for -2 devices"),
        (0, True, r"`devices=0` names no device"),
        ({"v100": 0}, True, r"names no device"),
        ("", True, r"not `type:count`"),
        ("v100:", True, r"has the entry 'v100:', which is not `type:count`"),
        (":2", True, r"has the entry ':2', which is not `type:count`"),
        ("v100:two", True, r"has the count 'two'"),
        ({"v100": 1.5}, True, r"has the count 1\.5"),
        ({"v100": True}, True, r"has the count True"),
        (True, True, r"`devices=True` is not a choice of device types"),
        ([0, 1], True, r"choose single GPUs by CUDA_VISIBLE_DEVICES"),
        (None, True, r"`devices=None` is not a choice of device types"),
    ],
)
def test_bad_devices_are_refused_with_the_value_and_the_cure(given, emulate, message):
    with pytest.raises(ValueError, match=message):
        parse_devices(given, emulate=emulate)


def test_emulation_is_asked_for_by_argument_or_variable(monkeypatch):
    assert not devices.emulation_requested()
    monkeypatch.setenv("EASYSCALE_EMULATE", "1")
    assert devices.emulation_requested()
    assert not devices.emulation_requested(False)
    monkeypatch.setenv("EASYSCALE_EMULATE", "perhaps")
    with pytest.raises(ValueError, match="`EASYSCALE_EMULATE=perhaps` is neither"):
        devices.emulation_requested()


def test_real_gpus_are_recognised_and_handed_out_in_order(monkeypatch):
    use_gpus(monkeypatch, V100, P100, P100)
    assert [t.name for t in detect()] == ["v100", "p100", "p100"]
    assert detect()[0].identity == ("Tesla V100-SXM2-16GB", "7.0", "80")
    assert parse_devices("p100:2,v100", emulate=False) == ("p100", "p100", "v100")
    assert parse_devices(2, emulate=False) == ("v100", "p100")
    assert available_types(emulate=False) == ("v100", "p100", "cpu")
    with pytest.raises(ValueError, match=r"asks for 2 devices of type v100, and this machine has 1"):
        parse_devices("v100:2", emulate=False)
    with pytest.raises(ValueError, match=r"asks for 4 devices, and this machine has 3 GPUs"):
        parse_devices(4, emulate=False)
    assert parse_devices("cpu,v100,cpu", emulate=False) == ("cpu", "v100", "cpu")
    with pytest.raises(ValueError, match=r"asks for 2 devices of type v100, and this machine has 1"):
        parse_devices("v100:2,cpu", emulate=False)


@pytest.mark.parametrize(
    ("device_name", "short"),
    [
        ("Tesla T4", "t4"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "a100"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_short_names(monkeypatch, device_name, short):
    use_gpus(monkeypatch, (device_name, 8, 0, 100))
    assert [t.name for t in detect()] == [short]


def test_a_label_alone_never_makes_two_gpus_one_type(monkeypatch):
    use_gpus(monkeypatch, H100, H100_PCIE, H100)
    first, second, third = detect()
    assert (first.name, second.name) == ("h100-132sm", "h100-114sm")
    assert first.same_as(third)
    assert not first.same_as(second)


def test_types_on_cpu_are_told_apart_by_instruction_set_not_by_name(monkeypatch):
    use_host(monkeypatch, "avx512")
    use_gpus(monkeypatch)
    monkeypatch.setattr(environment, "_START_ENVIRONMENT", {})
    types = {name: device_type(name, emulate=True) for name in (*EMULATED_TYPES, "cpu")}
    assert types["v100"].same_as(types["cpu"])
    assert not types["v100"].same_as(types["p100"])
    assert types["p100"].identity == ("GenuineIntel", "avx2 [ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2]")
    assert str(types["cpu"]) == "cpu (GenuineIntel, avx512)"
    assert cpu_identity(pinned_environment(["v100"], emulate=True)) != types["p100"].identity


def test_the_ladder_moves_down_on_an_avx2_machine_and_the_rungs_stay_different(monkeypatch):
    use_gpus(monkeypatch)
    ladders = {}
    for isa in ("avx512", "avx2"):
        use_host(monkeypatch, isa)
        ladders[isa] = [environment_of(name, emulate=True) for name in EMULATED_TYPES]
        assert len({cpu_identity(rung) for rung in ladders[isa]}) == 3
    assert ladders["avx512"][1] == {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"}
    assert ladders["avx2"][1]["ATEN_CPU_CAPABILITY"] == "default"
    assert ladders["avx512"][0] == ladders["avx2"][0] == {}
    assert ladders["avx512"][2] == ladders["avx2"][2]


def test_other_architectures_cannot_emulate_and_say_why(monkeypatch):
    use_gpus(monkeypatch)
    use_host(monkeypatch, "default", why_not="its CPU is aarch64")
    assert available_types(emulate=True) == ("cpu",)
    with pytest.raises(RuntimeError, match=r"`v100` cannot be emulated on this machine: its CPU is aarch64\. HINT"):
        parse_devices("v100:1", emulate=True)
    assert pinned_environment(["cpu"]) == {}


@pytest.mark.parametrize("isa", ["avx512", "avx2"])
@pytest.mark.parametrize(
    ("pool", "mkl"),
    [
        (("v100",), "AVX2,STRICT"),
        (("p100", "v100", "p100"), "AVX2,STRICT"),
        (("cpu",), "AVX2,STRICT"),
        (("v100", "t4"), "COMPATIBLE"),
    ],
)
def test_pinned_is_the_environment_of_the_slowest_type_on_every_host(monkeypatch, isa, pool, mkl):
    use_gpus(monkeypatch)
    use_host(monkeypatch, isa)
    pinned = pinned_environment(pool, emulate=True)
    assert pinned["MKL_CBWR"] == mkl
    assert set(pinned) == {"ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR"}


@pytest.mark.usefixtures("no_gpus")
@pytest.mark.parametrize(
    ("pool", "emulate", "policy"),
    [
        (["cpu"], False, "pinned"),
        (["v100", "p100"], True, "pinned"),
        (["cpu", "h100"], False, "portable"),
        (["rtx3090", "cpu", "a100-114sm"], False, "portable"),
    ],
)
def test_a_gpu_in_the_pool_makes_d2_portable(pool, emulate, policy):
    assert d2_policy(pool, emulate=emulate) == policy


@pytest.mark.usefixtures("no_gpus")
@pytest.mark.parametrize(("pool", "named"), [(["v100", "p100"], "v100"), (["h100"], "h100"), (["cpu", "gpu"], "gpu")])
def test_a_pool_of_which_nothing_is_here_or_which_names_no_type_is_refused(pool, named):
    with pytest.raises(ValueError, match=f"Device type `{named}` is not on this machine"):
        d2_policy(pool, emulate=False)
    with pytest.raises(ValueError, match=r"`pool=\(\)`"):
        d2_policy([])


def test_pinned_refuses_what_it_cannot_pin(monkeypatch):
    with pytest.raises(ValueError, match=r"`pool=\(\)` names no device type"):
        pinned_environment([])
    use_gpus(monkeypatch, H100)
    with pytest.raises(ValueError, match=r"`pool=\['h100'\]` has CUDA devices \(h100\), and pinning instruction sets"):
        pinned_environment(["h100"], emulate=False)


@pytest.mark.emulation
def test_emulated_types_differ_in_bits_on_this_machine_or_the_probe_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(probe, "_memo", {})
    digests = probe.probe(EMULATED_TYPES, emulate=True)
    assert list(digests) == list(EMULATED_TYPES)
    warning = probe.what_does_not_differ(EMULATED_TYPES, emulate=True)
    assert bool(warning) == (len(set(digests.values())) < 3)
    if emulation.host_cpu().isa == "avx512":
        assert not warning

    monkeypatch.setattr(probe, "_memo", {})
    monkeypatch.setattr(probe, "_start", lambda environment: pytest.fail("the answer was not kept"))
    assert probe.probe(EMULATED_TYPES, emulate=True) == digests


def test_types_that_cannot_be_told_apart_are_named(monkeypatch):
    monkeypatch.setattr(probe, "probe", lambda types, emulate: {"v100": "a", "p100": "b", "t4": "b"})
    assert "same bits: p100 = t4." in probe.what_does_not_differ(["v100", "p100", "t4"], emulate=True)
    assert probe.indistinguishable({"v100": "a", "p100": "b"}) == ()


@pytest.mark.emulation
def test_a_probe_that_fails_is_a_warning_not_an_end(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(probe, "_memo", {})
    monkeypatch.setattr(probe.sys, "executable", "/bin/false")
    assert "could not be probed" in probe.what_does_not_differ(["v100", "p100"], emulate=True)


def test_cuda_types_are_not_probed(monkeypatch):
    use_gpus(monkeypatch, H100)
    with pytest.raises(ValueError, match=r"has the CUDA devices \['h100'\]"):
        probe.probe(["h100"], emulate=False)


def test_device_types_can_be_keys():
    assert len({DeviceType("a", "cpu", ("x", "y"), {"K": "1"}), DeviceType("a", "cpu", ("x", "y"), {"K": "1"})}) == 1
    assert set(ISA_VARIABLES) >= set(environment_of("cpu"))


def test_executors_that_share_a_gpu_are_named():
    refuse_shared_gpus(["GPU-a", "GPU-b", "GPU-c"])
    with pytest.raises(ValueError, match=r"executors 1 and 3 are both on the GPU GPU-b.*CUDA_VISIBLE_DEVICES"):
        refuse_shared_gpus(["GPU-a", "GPU-b", "GPU-c", "GPU-b"])
