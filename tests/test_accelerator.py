import copy
import pickle
import re

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import AcceleratorRegistry, CUDAAccelerator
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DDPStrategy

from lightning_easyscale import EasyScaleStrategy, environment, kernels
from lightning_easyscale import accelerator as module
from lightning_easyscale.accelerator import EasyScaleAccelerator, TypedDevices, device_types_of
from lightning_easyscale.topology import EXECUTOR_VARIABLE
from tests.test_devices import H100, P100, V100, use_gpus, use_host

SMALL = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_steps": 1,
    "limit_val_batches": 0,
}


@pytest.fixture
def machine(monkeypatch):
    """A machine without GPUs on which this process has been started with no variables."""
    use_gpus(monkeypatch)
    use_host(monkeypatch, "avx512")
    monkeypatch.setattr(environment, "_START_ENVIRONMENT", {})
    monkeypatch.setattr(module, "what_does_not_differ", lambda types, emulate: "")


def names(trainer):
    return [found.name for found in device_types_of(trainer.strategy.parallel_devices)]


def trainer(emulate=True, **arguments):
    return pl.Trainer(**SMALL, accelerator=EasyScaleAccelerator(emulate=emulate), **arguments)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("devices", ["v100:1,p100:2", {"v100": 1, "p100": 2}, ["v100", "p100", "p100"]])
def test_trainer_takes_typed_devices(devices):
    made = trainer(devices=devices, strategy="ddp")
    assert names(made) == ["v100", "p100", "p100"]
    assert list(made.strategy.parallel_devices) == [torch.device("cpu")] * 3
    assert made.num_devices == 3


@pytest.mark.usefixtures("machine")
def test_the_registered_name_reads_the_variable(monkeypatch):
    assert AcceleratorRegistry["easyscale"]["accelerator"] is EasyScaleAccelerator
    assert names(pl.Trainer(**SMALL, accelerator="easyscale", devices=3, strategy="ddp")) == ["cpu"] * 3
    monkeypatch.setenv("EASYSCALE_EMULATE", "1")
    assert names(pl.Trainer(**SMALL, accelerator="easyscale", devices=2, strategy="ddp")) == ["v100"] * 2


@pytest.mark.usefixtures("machine")
def test_two_trainers_in_one_process_keep_their_own_types():
    shared = EasyScaleAccelerator(emulate=True)
    first = pl.Trainer(**SMALL, accelerator=shared, devices="v100:2", strategy="ddp")
    second = pl.Trainer(**SMALL, accelerator=shared, devices="t4:1,p100:1", strategy="ddp")
    third = pl.Trainer(**SMALL, accelerator=EasyScaleAccelerator(emulate=False), devices=2, strategy="ddp")
    assert (names(first), names(second), names(third)) == (["v100"] * 2, ["t4", "p100"], ["cpu"] * 2)


@pytest.mark.usefixtures("machine")
def test_a_type_that_is_not_there_is_one_error_that_lists_what_is():
    with pytest.raises(ValueError, match=r"`v100` is not on this machine, which has: cpu\.") as raised:
        trainer(emulate=False, devices="v100:1,p100:1", strategy="ddp")
    assert "emulate" in str(raised.value)


@pytest.mark.usefixtures("machine")
def test_stock_accelerators_have_detected_types():
    assert names(pl.Trainer(**SMALL, accelerator="cpu", devices=2, strategy="ddp")) == ["cpu", "cpu"]


def test_gpus_are_given_to_the_types_asked_for(monkeypatch):
    use_gpus(monkeypatch, V100, P100, H100, P100)
    monkeypatch.setattr(CUDAAccelerator, "is_available", lambda: True)
    monkeypatch.setattr(CUDAAccelerator, "auto_device_count", lambda: 4)
    made = EasyScaleAccelerator(emulate=False)
    # Lightning asks this to decide whether the GPUs of the machine lie idle.
    assert isinstance(made, CUDAAccelerator)
    given = type(made).get_parallel_devices(type(made).parse_devices("p100:2,v100"))
    assert [device.index for device in given] == [1, 3, 0]
    assert [found.name for found in given.types] == ["p100", "p100", "v100"]
    assert made.auto_device_count() == 4
    assert made.name() == "easyscale"
    stock = [torch.device("cuda", 2), torch.device("cuda", 0)]
    assert [found.name for found in device_types_of(stock)] == ["h100", "v100"]


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one GPU, which nothing may touch."""
    use_gpus(monkeypatch, H100)
    monkeypatch.setattr(CUDAAccelerator, "is_available", lambda: True)
    monkeypatch.setattr(CUDAAccelerator, "auto_device_count", lambda: 1)
    monkeypatch.setattr(environment, "_START_ENVIRONMENT", {})


def mixed(executor, monkeypatch, *, devices="h100:1,cpu:1", **arguments):
    """The strategy of an executor of a stage on these devices."""
    monkeypatch.setenv(EXECUTOR_VARIABLE, str(executor))
    strategy = EasyScaleStrategy(num_ests=4, **arguments)
    pl.Trainer(**SMALL, accelerator=EasyScaleAccelerator(), devices=devices, strategy=strategy)
    return strategy


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("level", ["D0", "D1", "D1+D2"])
def test_executors_on_a_gpu_and_on_a_cpu_agree_how_they_meet(level, monkeypatch):
    pool = ["cpu", "h100"] if level == "D1+D2" else None
    gpu, cpu = (mixed(i, monkeypatch, determinism=level, pool=pool) for i in range(2))
    assert (str(gpu.root_device), str(cpu.root_device)) == ("cuda:0", "cpu")
    assert gpu.resolved_reduction == cpu.resolved_reduction == ("native" if level == "D0" else "ddp")
    assert gpu.virtual_backend == cpu.virtual_backend == "gloo"
    assert gpu.identity == cpu.identity
    assert gpu.type_environments == cpu.type_environments == {0: {}, 1: {}}


@pytest.mark.usefixtures("gpu")
def test_a_pool_with_a_cpu_decides_for_stages_of_gpus_too(monkeypatch):
    stages = ("h100:1", "cpu:1", "cpu:1,h100:1")
    both = [mixed(0, monkeypatch, devices=d, determinism="D2", pool=["cpu", "h100"]).identity for d in stages]
    assert both[0] == both[1] == both[2]
    assert (both[0].reduction, both[0].kernels) == ("ddp", f"portable {kernels.FORMAT_VERSION}")
    assert mixed(0, monkeypatch, devices="h100:1", determinism="D2", pool=["h100"]).resolved_reduction == "tree"


@pytest.mark.usefixtures("gpu")
def test_stock_strategies_are_not_given_gpus_and_cpus_together():
    made = trainer(emulate=False, devices="h100:1,cpu:1", strategy="ddp")
    with pytest.raises(RuntimeError, match=r"`devices=\['h100', 'cpu'\]` mixes GPUs and CPUs"):
        made.accelerator.setup(made)


@pytest.mark.usefixtures("machine")
def test_types_survive_copies_and_processes():
    types = EasyScaleAccelerator(emulate=True).get_parallel_devices(("v100", "p100"))
    for same in (copy.deepcopy(types), pickle.loads(pickle.dumps(types))):
        assert isinstance(same, TypedDevices)
        assert (list(same), same.types) == (list(types), types.types)
    for emulate in (True, False):
        made = EasyScaleAccelerator(emulate=emulate)
        assert type(copy.deepcopy(made)) is type(pickle.loads(pickle.dumps(made))) is type(made)


@pytest.mark.usefixtures("machine")
def test_fit_names_each_executors_type_in_the_log(caplog):
    made = trainer(devices="v100:1")
    with caplog.at_level("INFO"):
        made.fit(BoringModel())
    assert "Device types of the executors: 0: v100 (emulated: GenuineIntel, avx512)" in caplog.text
    assert [found.name for found in made.accelerator.device_types] == ["v100"]


@pytest.mark.usefixtures("machine")
def test_a_strategy_that_cannot_give_a_process_its_environment_is_refused():
    with pytest.raises(RuntimeError, match=r"type p100, whose process must start with `ATEN_CPU_CAPABILITY=avx2"):
        trainer(devices="p100:1").fit(BoringModel())


@pytest.mark.usefixtures("machine")
def test_a_stock_strategy_runs_a_type_whose_environment_is_in_force(monkeypatch):
    made = trainer(devices="p100:1")
    [p100] = made.accelerator.get_parallel_devices(["p100"]).types
    monkeypatch.setattr(environment, "_START_ENVIRONMENT", dict(p100.environment))
    made.fit(BoringModel())
    assert made.state.finished


@pytest.mark.usefixtures("machine")
def test_types_that_do_not_differ_here_are_warned_of(monkeypatch):
    monkeypatch.setattr(module, "what_does_not_differ", lambda types, emulate: f"same bits: {' = '.join(types)}")
    monkeypatch.setattr(DDPStrategy, "applies_device_types", True, raising=False)
    made = trainer(devices="v100:1,p100:1", strategy="ddp")
    with pytest.warns(UserWarning, match="same bits: v100 = p100"):
        made.accelerator.setup(made)


class RecordsDtype(BoringModel):
    def training_step(self, batch, batch_idx):
        self.dtype_in_step = self.layer(batch).dtype
        return super().training_step(batch, batch_idx)


@pytest.mark.usefixtures("machine")
def test_bf16_mixed_really_casts_on_cpu_types():
    model = RecordsDtype()
    trainer(devices="v100:1", precision="bf16-mixed").fit(model)
    assert model.dtype_in_step == torch.bfloat16


@pytest.mark.usefixtures("machine")
def test_stock_behaviour_of_a_cpu_device():
    made = EasyScaleAccelerator(emulate=True)
    made.setup_device(torch.device("cpu"))
    made.teardown()
    assert made.auto_device_count() == 1
    assert made.is_available()


def test_a_subclass_cannot_be_told_what_its_class_does_not_know():
    class Own(EasyScaleAccelerator):
        pass

    assert type(Own()) is Own
    with pytest.raises(ValueError, match=re.escape("`emulate=True` cannot be chosen for the subclass `Own`")):
        Own(emulate=True)


@pytest.mark.gpu
def test_a_real_gpu_has_a_type_and_is_used():
    made = pl.Trainer(**SMALL, accelerator="easyscale", devices=1, strategy="ddp")
    [found] = device_types_of(made.strategy.parallel_devices)
    assert found.kind == "cuda"
    assert found.identity[0] == torch.cuda.get_device_name(0)
    by_name = EasyScaleAccelerator.get_parallel_devices(EasyScaleAccelerator.parse_devices(f"{found.name}:1"))
    assert list(by_name) == [torch.device("cuda", 0)]
    with pytest.raises(RuntimeError, match="pass `accelerator=EasyScaleAccelerator"):
        pl.Trainer(**SMALL, accelerator="easyscale", devices=1).fit(BoringModel())
    single = pl.Trainer(**SMALL, accelerator=EasyScaleAccelerator(), devices=1)
    single.fit(BoringModel())
    assert single.strategy.root_device.type == "cuda"
