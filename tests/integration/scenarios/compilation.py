"""`torch.compile`, activation checkpointing, memory formats."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models import Model, loader, net, train_data, train_val_data
from ..scenario import Script, feature, note

GROUP = "Compilation and memory"


class Configured(Model):
    def __init__(self, compiled: bool) -> None:
        super().__init__()
        self.compiled = compiled
        self.net = None

    def setup(self, stage: str) -> None:
        self.scale = torch.rand(1)

    def configure_model(self) -> None:
        if self.net is None:
            self.net = net()
            if self.compiled:
                self.net = torch.compile(self.net, backend="aot_eager")


@feature("layers made in configure_model", GROUP, compiled=False, worlds=(2, 3))
def configured(config: dict[str, Any], root: Path) -> Script:
    return Script(Configured(config["compiled"]), train_val_data(), {"max_epochs": 1})


class Checkpointed(Model):
    """Recomputes in backward, with the generators as they were: dropout, and a number drawn by `random` outside."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x.requires_grad_(), use_reentrant=self.reentrant) * random.uniform(0.9, 1.1)


@feature("activation checkpointing, preserving generators", GROUP, reentrant=False, worlds=(2, 3))
@feature("activation checkpointing, reentrant", GROUP, reentrant=True, worlds=(2, 4))
def activation_checkpointing(config: dict[str, Any], root: Path) -> Script:
    ddp = {"static_graph": True} if config["reentrant"] else {}
    return Script(Checkpointed(config["reentrant"]), train_data(), {"max_epochs": 1}, ddp)


class ChannelsLast(Model):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.2), nn.Flatten(), nn.Linear(16, 3)]
        self.net = nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.repeat(1, 8).view(-1, 3, 4, 4).to(memory_format=torch.channels_last))

    def on_train_end(self) -> None:
        note(self.global_rank, "strides", [p.stride() for p in self.parameters()])


@feature("channels_last", GROUP, worlds=(2, 3))
def channels_last(config: dict[str, Any], root: Path) -> Script:
    return Script(ChannelsLast(), train_val_data(), {"max_epochs": 1})


COMPILED: list[str] = []


def counting(graph: Any, inputs: Any) -> Any:
    """A backend that counts what it is asked to compile in this process."""
    COMPILED.append("graph")
    return graph.forward


class Body(nn.Module):
    """TorchDynamo does not trace the forward of torch's own containers by itself."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Counts(Model):
    """Every rank of stock DDP compiles in a process of its own; all ESTs of one executor, no more than one rank."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        if where == "submodule":
            self.net = torch.compile(self.net, backend=counting)
        elif where == "in place":
            self.net = Body(self.net)
            self.net.compile(backend=counting)
        elif where == "method":
            self.broken = torch.compile(self._broken, backend=counting)

    def configure_model(self) -> None:
        if self.where == "configure_model" and "_orig_mod" not in self.net._modules:
            self.net = torch.compile(self.net, backend=counting)

    def forward(self, x: Tensor) -> Tensor:
        return self.broken(x) if self.where == "method" else self.net(x)

    def _broken(self, x: Tensor) -> Tensor:
        x = self.net[:2](x)
        torch._dynamo.graph_break()
        return self.net[2:](x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)  # TorchDynamo cannot trace `self.log`

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def on_train_end(self) -> None:
        note(self.global_rank, "compiled", len(COMPILED))
        assert COMPILED

    def on_test_end(self) -> None:
        note(self.global_rank, "compiled", len(COMPILED))


def _fit_test_fit(trainer: Any, script: Script, make_trainer: Any) -> None:
    trainer.fit(script.module, **script.data)
    trainer.test(script.module, loader(24, shuffle=False))
    trainer.fit_loop.max_epochs += 1
    trainer.fit(script.module, **script.data)


@feature("no recompilation: torch.compile of a submodule", GROUP, where="submodule")
@feature("no recompilation: torch.compile in configure_model", GROUP, where="configure_model")
@feature("no recompilation: module.compile()", GROUP, where="in place")
@feature("no recompilation: compiled method with a graph break", GROUP, where="method")
@feature("no recompilation: compiled LightningModule", GROUP, where="whole")
def counted(config: dict[str, Any], root: Path) -> Script:
    data = train_data(n=48, drop_last=True)
    module = Counts(config["where"])
    if config["where"] == "whole":
        module = torch.compile(module, backend=counting)
    return Script(module, data, {"max_epochs": 1}, main=_fit_test_fit)


@feature("torch.compile of a submodule", GROUP, where="submodule", backend="eager")
@feature("torch.compile in configure_model", GROUP, where="configure_model", backend="aot_eager")
@feature("torch.compile under manual optimization", GROUP, where="manual", backend="aot_eager")
def compiled(config: dict[str, Any], root: Path) -> Script:
    from .manual_optimization import ManualAccumulation

    data = train_data(n=48, drop_last=True)
    if config["where"] == "configure_model":
        return Script(Configured(True), data, {"max_epochs": 1})
    module = ManualAccumulation() if config["where"] == "manual" else Model()
    module.net = torch.compile(module.net, backend=config["backend"])
    return Script(module, data, {"max_epochs": 1})
