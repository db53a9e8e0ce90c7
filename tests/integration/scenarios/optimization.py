"""Optimization: what happens between forward and the next forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, GradientAccumulationScheduler
from torch import Tensor, nn

from ..models import Model, loader, train_data, train_val_data
from ..scenario import Script, feature, note

GROUP = "Optimization"


@feature("automatic optimization, shuffled data, validation", GROUP)
def plain(config: dict[str, Any], root: Path) -> Script:
    return Script(Model(), train_val_data(), {"max_epochs": 2})


@feature("accumulate_grad_batches, last window incomplete", GROUP)
def accumulate(config: dict[str, Any], root: Path) -> Script:
    return Script(Model(), train_val_data(n=44), {"max_epochs": 2, "accumulate_grad_batches": 3})


@feature("GradientAccumulationScheduler", GROUP)
def accumulate_by_epoch(config: dict[str, Any], root: Path) -> Script:
    callbacks = [GradientAccumulationScheduler({0: 3, 1: 1, 2: 2})]
    return Script(Model(), train_data(), {"max_epochs": 3, "callbacks": callbacks})


class OwnClipping(Model):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        norm = torch.stack([p.grad.norm() for p in self.parameters()]).norm()
        note(self.global_rank, "norm", norm)
        for parameter in self.parameters():
            parameter.grad.mul_(0.7)
        self.clip_gradients(optimizer, gradient_clip_val=0.4, gradient_clip_algorithm="value")


@feature("gradient clipping by norm", GROUP, clip="norm")
@feature("gradient clipping by value", GROUP, clip="value")
@feature("overridden configure_gradient_clipping", GROUP, clip="own", worlds=(2, 4))
def clipping(config: dict[str, Any], root: Path) -> Script:
    if config["clip"] == "own":
        return Script(OwnClipping(), train_data(), {"max_epochs": 1, "accumulate_grad_batches": 2})
    options = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": config["clip"], "max_epochs": 2}
    return Script(Model(), train_data(), options)


class ChangesGradients(Callback):
    def on_after_backward(self, trainer: Any, module: Any) -> None:
        note(trainer.global_rank, "callback gradients", [p.grad for p in module.parameters()])
        for parameter in module.parameters():
            parameter.grad.add_(0.01)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        note(trainer.global_rank, "before step", [[p, p.grad] for p in module.parameters()])

    def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
        note(trainer.global_rank, "before zero_grad", list(module.parameters()))


class HookedModel(Model):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        note(self.global_rank, "module gradients", [p.grad for p in self.parameters()])
        for parameter in self.parameters():
            parameter.grad.sign_()

    def on_after_backward(self) -> None:
        self.log("grad", self.net[0].weight.grad.norm(), on_step=True)


@feature("hooks that read and change gradients", GROUP, worlds=(2, 3, 4))
def gradient_hooks(config: dict[str, Any], root: Path) -> Script:
    return Script(HookedModel(lr=0.01), train_data(), {"max_epochs": 1, "callbacks": [ChangesGradients()]})


class TensorHooks(Model):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.net[0].weight.register_hook(lambda g: g * 0.5)
        self.net[0].register_forward_hook(lambda module, inputs, output: output + 0.01)
        self.net[-1].weight.register_post_accumulate_grad_hook(lambda p: self.seen.append(p.grad.detach().clone()))

    def on_train_end(self) -> None:
        note(self.global_rank, "seen", self.seen)


@feature("tensor, module and post-accumulate hooks", GROUP)
def tensor_hooks(config: dict[str, Any], root: Path) -> Script:
    return Script(TensorHooks(), train_data(), {"max_epochs": 1})


class WithLBFGS(Model):
    def __init__(self, manual: bool) -> None:
        super().__init__(dropout=0.0)
        self.automatic_optimization = not manual

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        optimizer = self.optimizers()

        def closure() -> Tensor:
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            note(self.global_rank, "closure", loss)
            return loss

        return {"value": torch.as_tensor(optimizer.step(closure=closure)).detach()}

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4, history_size=5)


@feature("LBFGS, automatic", GROUP, manual=False, worlds=(2, 3))
@feature("LBFGS with a closure of the user's", GROUP, manual=True)
def lbfgs(config: dict[str, Any], root: Path) -> Script:
    return Script(WithLBFGS(config["manual"]), train_data(), {"max_epochs": 1})


class Groups(Model):
    def configure_optimizers(self) -> Any:
        groups = [
            {"params": [p for n, p in self.named_parameters() if "bias" in n], "weight_decay": 0.0, "lr": 0.05},
            {"params": [p for n, p in self.named_parameters() if "bias" not in n], "weight_decay": 0.1},
        ]
        return torch.optim.AdamW(groups, lr=0.01)


@feature("several parameter groups", GROUP)
def groups(config: dict[str, Any], root: Path) -> Script:
    return Script(Groups(), train_data(), {"max_epochs": 2})


class Shared(Model):
    """Tied, frozen and unused parameters, and a branch that only some ranks take."""

    def __init__(self, unused: bool) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 6, bias=False)
        self.decode = nn.Linear(6, 6, bias=False)
        self.decode.weight = self.encode.weight
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        if unused:
            self.unused = nn.Linear(3, 3)
            self.sometimes = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.decode(F.relu(self.encode(x))) + self.frozen(x)
        if hasattr(self, "sometimes") and self.training and (self.global_step + self.global_rank) % 2:
            x = x + self.sometimes(x)
        return self.net(x)


@feature("shared and frozen parameters", GROUP, unused=False)
@feature("find_unused_parameters, a branch that only some ranks take", GROUP, unused=True, worlds=(2, 3))
def shared_frozen(config: dict[str, Any], root: Path) -> Script:
    ddp = {"find_unused_parameters": True} if config["unused"] else {}
    return Script(Shared(config["unused"]), train_data(), {"max_epochs": 1}, ddp)


class Unfreeze(BaseFinetuning):
    """Frozen once DDP has taken note of all parameters, so that it reduces their gradients when they thaw."""

    def freeze_before_training(self, module: Any) -> None:
        """Not here: DDP leaves out what is frozen when it wraps the module."""

    def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 0:
            self.freeze(module.net[0])
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net[0], optimizer, lr=0.01)


class OnlyHead(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[4].parameters(), lr=0.1, momentum=0.9)


@feature("finetuning callback that adds parameters later", GROUP, worlds=(2, 3))
def finetuning(config: dict[str, Any], root: Path) -> Script:
    ddp = {"find_unused_parameters": True}
    return Script(OnlyHead(), train_data(), {"max_epochs": 3, "callbacks": [Unfreeze()]}, ddp)


class Scheduled(Model):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        steps = self.trainer.estimated_stepping_batches
        schedulers: dict[str, Any] = {
            "step": {"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, steps), "interval": "step"},
            "epoch": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)},
            "plateau": {
                "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5),
                "monitor": "val_loss",
            },
            "frequency": {
                "scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
                "interval": "step",
                "frequency": 2,
            },
        }
        return {"optimizer": optimizer, "lr_scheduler": schedulers[self.kind]}


@feature("scheduler by step, from estimated_stepping_batches", GROUP, kind="step")
@feature("scheduler by epoch", GROUP, kind="epoch")
@feature("ReduceLROnPlateau on a validation metric", GROUP, kind="plateau")
@feature("scheduler every second step", GROUP, kind="frequency")
def scheduled(config: dict[str, Any], root: Path) -> Script:
    return Script(Scheduled(config["kind"]), train_val_data(), {"max_epochs": 3})


class Implementation(Model):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, **self.options)


@feature("foreach optimizer", GROUP, options={"foreach": True})
@feature("fused optimizer", GROUP, options={"fused": True})
@feature("amsgrad, maximize", GROUP, options={"amsgrad": True, "maximize": True})
def implementation(config: dict[str, Any], root: Path) -> Script:
    return Script(Implementation(config["options"]), train_data(), {"max_epochs": 2})


class OwnStep(Model):
    """Overridden optimizer_step with warm-up and a weight change after the step; overridden zero_grad and backward."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.param_groups[0]["lr"] = 0.1 * min(1.0, (self.global_step + 1) / 4)
        optimizer.step(closure=optimizer_closure)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.95)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)

    def backward(self, loss: Tensor) -> None:
        (loss * 2).backward()


@feature("overridden optimizer_step, zero_grad and backward", GROUP)
def own_step(config: dict[str, Any], root: Path) -> Script:
    return Script(OwnStep(), train_data(), {"max_epochs": 1})


class SkipsSteps(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


@feature("training_step that returns None is refused by Lightning", GROUP, same_error="RuntimeError")
def skips(config: dict[str, Any], root: Path) -> Script:
    return Script(SkipsSteps(), train_data(), {"max_epochs": 2})


@feature("gradient_as_bucket_view", GROUP, ddp={"gradient_as_bucket_view": True})
@feature("static_graph", GROUP, ddp={"static_graph": True})
@feature("broadcast_buffers=False", GROUP, ddp={"broadcast_buffers": False})
@feature("bucket_cap_mb", GROUP, ddp={"bucket_cap_mb": 1})
def ddp_option(config: dict[str, Any], root: Path) -> Script:
    return Script(Model(), {"train_dataloaders": loader(noise=True)}, {"max_epochs": 2}, config["ddp"])
