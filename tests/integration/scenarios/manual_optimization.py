"""Manual optimization: the module calls backward and steps its optimizers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..models import Model, train_data
from ..scenario import Script, feature, note

GROUP = "Manual optimization"


class GAN(Model):
    """Two networks, two optimizers, each with a scheduler; toggled."""

    def __init__(self, toggle: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggle = toggle
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
        del self.net

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        real, _ = batch
        for_generator, for_critic = self.optimizers()
        noise = torch.randn(len(real), 4)
        if self.toggle:
            self.toggle_optimizer(for_generator)
        g_loss = F.softplus(-self.critic(self.generator(noise))).mean()
        for_generator.zero_grad()
        self.manual_backward(g_loss)
        for_generator.step()
        if self.toggle:
            self.untoggle_optimizer(for_generator)
            self.toggle_optimizer(for_critic)
        fake = self.generator(noise).detach()
        d_loss = F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(fake)).mean()
        for_critic.zero_grad()
        self.manual_backward(d_loss)
        for_critic.step()
        if self.toggle:
            self.untoggle_optimizer(for_critic)
        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.log_dict({"g": g_loss, "d": d_loss}, on_step=True, on_epoch=True)
        note(self.global_rank, "rates", [o.param_groups[0]["lr"] for o in (for_generator, for_critic)])
        return {"g": g_loss.detach(), "d": d_loss.detach()}

    def configure_optimizers(self) -> Any:
        optimizers = [
            torch.optim.Adam(self.generator.parameters(), lr=0.01, betas=(0.5, 0.9)),
            torch.optim.Adam(self.critic.parameters(), lr=0.02),
        ]
        return optimizers, [torch.optim.lr_scheduler.StepLR(o, 2, 0.8) for o in optimizers]


@feature("manual optimization: GAN, two optimizers, toggled, schedulers", GROUP, worlds=(2, 3), toggle=True)
@feature("manual optimization: GAN without toggling", GROUP, toggle=False)
def gan(config: dict[str, Any], root: Path) -> Script:
    return Script(GAN(config["toggle"]), train_data(), {"max_epochs": 2}, {"find_unused_parameters": True})


class Clipped(GAN):
    """WGAN: the critic's weights are clamped and scaled after each of its steps."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        losses = super().training_step(batch, batch_idx)
        for parameter in self.critic.parameters():
            parameter.data.clamp_(-0.3, 0.3)
        with torch.no_grad():
            for parameter in self.critic.parameters():
                parameter.mul_(0.99)
        return losses


@feature("manual optimization: weights clamped and scaled in the step (WGAN)", GROUP)
def wgan(config: dict[str, Any], root: Path) -> Script:
    return Script(Clipped(), train_data(), {"max_epochs": 2}, {"find_unused_parameters": True})


class ManualAccumulation(Model):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        loss = self.loss(batch)
        self.manual_backward(loss / 2)
        if batch_idx % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
        return loss


@feature("manual optimization: accumulation and clip_gradients", GROUP)
def manual_accumulation(config: dict[str, Any], root: Path) -> Script:
    return Script(ManualAccumulation(), train_data(), {"max_epochs": 2})


class SeveralManual(Model):
    """An optimizer of three, used by turns."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.automatic_optimization = False
        self.heads = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        turn = batch_idx % 3
        loss = F.cross_entropy(self.net(x) + self.heads[turn](x), y)
        optimizer = self.optimizers()[turn]
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([*head.parameters(), *self.net.parameters()], lr=0.1) for head in self.heads]


@feature("manual optimization: optimizers used by turns, sharing parameters", GROUP)
def by_turns(config: dict[str, Any], root: Path) -> Script:
    return Script(SeveralManual(), train_data(), {"max_epochs": 2}, {"find_unused_parameters": True})
