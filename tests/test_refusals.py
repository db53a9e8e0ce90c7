"""Every refusal and its message; `test_refused_resume.py` has those of checkpoints. A refusal comes before anything is
written, and nothing is lost by it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.plugins import DeepSpeedPrecision, FSDPPrecision
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_easyscale import EasyScaleAccelerator, EasyScaleStrategy, compatibility
from lightning_easyscale.runtime.clone import CloneError

from .folders import contents
from .launch.job import Classifier, loader, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:.*os.fork.*:DeprecationWarning"),
]


# -- asked for what cannot be ----------------------------------------------------------------------------------------
def trainer(**options: Any) -> Callable[[], Any]:
    strategy = options.pop("of", {"num_ests": 2})
    return lambda: make_trainer("unused", strategy=EasyScaleStrategy(**strategy), **options)


ASKED: dict[str, tuple[Callable[[], Any], type[BaseException], str]] = {
    "no EST": (
        trainer(of={"num_ests": 0}),
        ValueError,
        r"`num_ests=0` is not a number of workers. HINT: give at least 1",
    ),
    "unknown level": (
        trainer(of={"determinism": "D7"}),
        ValueError,
        r"`determinism='D7'` is no .* HINT: use one of 'D0'",
    ),
    "unknown reduction": (
        trainer(of={"reduction": "ring"}),
        ValueError,
        r"`reduction='ring'` is unknown. HINT: choose",
    ),
    "no thread": (
        trainer(of={"threads_per_est": 0}),
        ValueError,
        r"`threads_per_est=0` is not .* HINT: give at least 1",
    ),
    "unknown offload": (trainer(of={"gradient_offload": "disk"}), ValueError, r"`gradient_offload='disk'` is unknown"),
    "unknown overlap": (trainer(of={"overlap_backward": "head"}), ValueError, r"`overlap_backward='head'` is unknown"),
    "unknown place": (trainer(of={"input_offload": "disk"}), ValueError, r"`input_offload='disk'` is unknown"),
    "misspelled argument": (trainer(of={"num_est": 2}), TypeError, r"unexpected keyword argument 'num_est'"),
    "own reduction hook": (
        trainer(of={"ddp_comm_hook": print}),
        TypeError,
        r"unexpected keyword argument 'ddp_comm_hook'",
    ),
    "positional argument": (lambda: EasyScaleStrategy(4), TypeError, r"takes 1 positional argument"),  # type: ignore[misc]
    "fewer ESTs than devices": (
        trainer(devices=3),
        ValueError,
        r"`num_ests=2` cannot run on 3 devices: every device needs at least one EST. HINT: set `devices<=2` or raise",
    ),
    "split for other devices": (
        trainer(of={"ests_per_executor": [1, 1]}, devices=1),
        ValueError,
        r"`ests_per_executor=\[1, 1\]` names 2 devices, but the Trainer runs on 1. HINT: give one count per device",
    ),
    "split of another N": (
        trainer(of={"num_ests": 4, "ests_per_executor": [2, 1]}, devices=2),
        ValueError,
        r"`ests_per_executor=\[2, 1\]` adds up to 3, not to `num_ests=4`. HINT: correct the counts",
    ),
    "executor without EST": (
        trainer(of={"num_ests": 2, "ests_per_executor": [2, 0]}, devices=2),
        ValueError,
        r"`ests_per_executor=\[2, 0\]` leaves an executor without an EST. HINT: ",
    ),
    "benchmark": (trainer(benchmark=True), ValueError, r"`benchmark=True` lets cuDNN .* HINT: leave `benchmark` unset"),
    "not deterministic": (
        trainer(deterministic=False),
        ValueError,
        r"`deterministic=False` contradicts .* HINT: leave",
    ),
    "deterministic warn": (trainer(deterministic="warn"), ValueError, r'`deterministic="warn"` lets .* HINT: leave'),
    "FSDP precision": (
        trainer(plugins=[FSDPPrecision("bf16-true")]),
        ValueError,
        r"`plugins=FSDPPrecision\(...\)` belongs to a strategy that shards the module.* HINT: leave the plugin out",
    ),
    "DeepSpeed precision": (
        trainer(plugins=[DeepSpeedPrecision("32-true")]),
        ValueError,
        r"`plugins=DeepSpeedPrecision\(...\)` belongs to .* HINT: leave the plugin out",
    ),
    "unknown device type": (
        trainer(accelerator="easyscale", devices="a100:1"),
        ValueError,
        r"Device type `a100` is not on this machine, which has: .*cpu",
    ),
    "device type without emulation": (
        trainer(accelerator="easyscale", devices="v100:1"),
        ValueError,
        r"Device type `v100` is not on this machine.* HINT: to emulate it on the CPU, set `EASYSCALE_EMULATE=1`",
    ),
}


@pytest.mark.parametrize("case", ASKED)
def test_what_cannot_be_is_refused_when_the_trainer_is_built(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    attempt, error, message = ASKED[case]
    with pytest.raises(error, match=message):
        attempt()
    assert contents(tmp_path) == {}


@pytest.mark.emulation
def test_a_device_type_outside_the_pool() -> None:
    with pytest.raises(
        ValueError, match=r"device type `v100` is not in `pool=\['t4', 'p100'\]`.* HINT: run on types of"
    ):
        make_trainer(
            "unused",
            strategy=EasyScaleStrategy(num_ests=2, determinism="D2", pool=["t4", "p100"]),
            accelerator=EasyScaleAccelerator(emulate=True),
            devices="v100:1",
        )


@pytest.mark.emulation
def test_fork_cannot_give_executors_other_environments(tmp_path: Path) -> None:
    attempt = make_trainer(
        tmp_path,
        strategy=EasyScaleStrategy(num_ests=2, start_method="fork"),
        accelerator=EasyScaleAccelerator(emulate=True),
        devices="t4:1",
    )
    with pytest.raises(
        RuntimeError, match=r"executor 0 must start with `ATEN.*`start_method='fork'` cannot .* HINT: run"
    ):
        attempt.fit(Classifier(), loader())


def test_agreeing_flags_are_accepted() -> None:
    make_trainer("unused", deterministic=True, benchmark=False)


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_of_the_old_package() -> None:
    old = pytest.importorskip("pytorch_lightning")
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False}
    compatibility.refuse_in_pytorch_lightning(("easyscale",))
    with pytest.raises(
        TypeError, match=r"this Trainer is `pytorch_lightning.Trainer`.* HINT: `import lightning.pytorch"
    ):
        old.Trainer(strategy="easyscale", **options)
    with pytest.raises(ValueError, match=r"<EasyScaleStrategy for `lightning.pytorch.Trainer`"):
        old.Trainer(strategy=EasyScaleStrategy(num_ests=2), **options)


def test_without_the_old_package_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pytorch_lightning.strategies", raising=False)
    compatibility.refuse_in_pytorch_lightning(("easyscale",))
    assert "pytorch_lightning.strategies" not in sys.modules


# -- met when the run begins -----------------------------------------------------------------------------------------
@pytest.fixture
def group_of_one() -> Iterator[None]:
    # Not gloo: a gloo group that is garbage hangs loader workers forked later, which collect it without its threads.
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
def test_a_process_group_of_another_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")  # the other executor would be started by the user
    attempt = make_trainer(tmp_path, devices=2)
    with pytest.raises(
        RuntimeError, match=r"a process group of 1 processes is already there, but .* 2 executors. HINT: "
    ):
        attempt.fit(Classifier(), loader())


@pytest.mark.usefixtures("group_of_one")
def test_a_module_in_shards(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_module

    mesh = init_device_mesh("cpu", (1,))
    whole, placed = Classifier(), Classifier()
    fully_shard(whole.net, mesh=mesh)
    with pytest.raises(ValueError, match=r"`net` is wrapped by `FSDPSequential`.* HINT: pass the module unwrapped"):
        make_trainer(tmp_path).fit(whole, loader())
    distribute_module(placed.net, mesh, lambda _, m, d: None)
    assert Replicate  # placement of the parameters
    with pytest.raises(
        ValueError, match=r"the parameter `net.0.weight` is a `DTensor` .* HINT: pass the module before"
    ):
        make_trainer(tmp_path).fit(placed, loader())


def test_an_operation_without_a_deterministic_kernel(tmp_path: Path) -> None:
    class Puts(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="put_.* does not have a deterministic implementation"):
        make_trainer(tmp_path).fit(Puts(), loader())


def test_sparse_gradients(tmp_path: Path) -> None:
    class Sparse(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(9, 6, sparse=True)

    with pytest.raises(ValueError, match=r"`words.weight` produces sparse gradients.* HINT: .* with `sparse=False`"):
        make_trainer(tmp_path).fit(Sparse(), loader())


class Head(Classifier):
    """Trains what requires a gradient when the optimizer is made."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Late(BaseFinetuning):
    """Trains something that DDP does not know."""

    def __init__(self, new: bool) -> None:
        super().__init__()
        self.new = new

    def freeze_before_training(self, pl_module: Any) -> None:
        if not self.new:
            self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1 and self.new:
            pl_module.more = nn.Linear(6, 6)
            optimizer.add_param_group({"params": list(pl_module.more.parameters())})
        elif epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


@pytest.mark.parametrize(("new", "name"), [(False, "net.0.weight"), (True, "more.weight")])
def test_parameters_that_ddp_does_not_reduce(tmp_path: Path, new: bool, name: str) -> None:
    """Stock DDP trains them without a word, and its replicas drift apart."""
    message = (
        rf"`{name}` was frozen, or not there, .* drift apart. HINT: let it require .* freeze it in `on_train_start`"
    )
    with pytest.raises(RuntimeError, match=message):
        make_trainer(tmp_path, callbacks=[Late(new)]).fit(Head(), loader())
    if not new:
        # With one EST there is nothing to drift from.
        make_trainer(tmp_path, strategy=EasyScaleStrategy(num_ests=1), callbacks=[Late(new)]).fit(Head(), loader())


def test_a_module_that_cannot_be_cloned(tmp_path: Path) -> None:
    module = Classifier()
    module.mine = {"batches": (i for i in range(3))}
    message = r"`model.mine\['batches'\]` \(a `builtins.generator`\) cannot be copied .* HINT: create it in `setup\(\)`"
    with pytest.raises(CloneError, match=message):
        make_trainer(tmp_path).fit(module, loader())
