"""A generative adversarial network on digits: manual optimization, two optimizers with schedulers, logged samples."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from .digits import Digits
from .options import parse, trainer

LATENT = 16


def generator() -> nn.Module:
    layers = [nn.Linear(LATENT, 64), nn.BatchNorm1d(64, 0.8), nn.LeakyReLU(0.2), nn.Linear(64, 784), nn.Tanh()]
    return nn.Sequential(*layers, nn.Unflatten(1, (1, 28, 28)))


def discriminator() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(64, 1))


class GAN(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = generator(), discriminator()
        self.validation_z = torch.randn(8, LATENT)

    def _adversarial_loss(self, logits: Tensor, real: bool) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images, _ = batch
        optimizer_g, optimizer_d = self.optimizers()  # type: ignore[misc]
        z = torch.randn(images.shape[0], LATENT).type_as(images)

        self.toggle_optimizer(optimizer_g)
        g_loss = self._adversarial_loss(self.discriminator(self.generator(z)), True)
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        optimizer_g.step()
        optimizer_g.zero_grad()
        self.untoggle_optimizer(optimizer_g)

        self.toggle_optimizer(optimizer_d)
        real_loss = self._adversarial_loss(self.discriminator(images * 2 - 1), True)
        fake_loss = self._adversarial_loss(self.discriminator(self.generator(z).detach()), False)
        d_loss = (real_loss + fake_loss) / 2
        self.log("d_loss", d_loss, prog_bar=True)
        self.manual_backward(d_loss)
        optimizer_d.step()
        optimizer_d.zero_grad()
        self.untoggle_optimizer(optimizer_d)

    def on_train_epoch_end(self) -> None:
        for scheduler in self.lr_schedulers():  # type: ignore[union-attr]
            scheduler.step()
        samples = self.generator(self.validation_z.type_as(self.generator[0].weight))  # type: ignore[index]
        self.logger.experiment.add_images("generated", samples, self.current_epoch)  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        optimizers = [
            torch.optim.Adam(self.generator.parameters(), lr=2e-3, betas=(0.5, 0.999)),
            torch.optim.Adam(self.discriminator.parameters(), lr=2e-3, betas=(0.5, 0.999)),
        ]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]


def main() -> None:
    options = parse()
    pl.seed_everything(7)
    fitter = trainer(
        options,
        ModelCheckpoint(options.out / "checkpoints", save_last=True),
        max_epochs=2,
        logger=TensorBoardLogger(options.out),
        log_every_n_steps=3,
    )
    fitter.fit(GAN(), Digits(options.data, batch_size=16, samples=300))


if __name__ == "__main__":
    main()
