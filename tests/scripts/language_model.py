"""Lightning's demonstration transformer as a word-level language model, on the text of Python's own documentation."""

from __future__ import annotations

from collections import Counter
from pydoc_data.topics import topics
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.demos import Transformer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .options import parse, trainer

LENGTH, WORDS = 24, 300


class Text(Dataset):
    """Consecutive pieces of text, and the same one word on."""

    def __init__(self) -> None:
        words = " ".join(topics[name] for name in sorted(topics)[:12]).split()
        known = {word: i + 1 for i, (word, _) in enumerate(Counter(words).most_common(WORDS - 1))}
        self.ids = torch.tensor([known.get(word, 0) for word in words[: 240 * LENGTH + 1]])

    def __len__(self) -> int:
        return (len(self.ids) - 1) // LENGTH

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * LENGTH
        return self.ids[start : start + LENGTH], self.ids[start + 1 : start + LENGTH + 1]


class LanguageModel(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Transformer(vocab_size=WORDS, ninp=32, nhid=64, nlayers=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, target = batch
        loss = F.nll_loss(self.model(inputs, target), target.view(-1))
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, target = batch
        loss = F.nll_loss(self.model(inputs, target), target.view(-1))
        self.log_dict({"val_loss": loss, "perplexity": loss.exp()}, sync_dist=True)

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.parameters() if p.dim() > 1]
        plain = [p for p in self.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=3e-3, foreach=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    options = parse()
    pl.seed_everything(42, workers=True)
    train, val = torch.utils.data.random_split(Text(), [0.8, 0.2])
    fitter = trainer(
        options,
        LearningRateMonitor("step"),
        ModelCheckpoint(options.out / "checkpoints", monitor="val_loss", save_last=True),
        max_epochs=2,
        accumulate_grad_batches=2,
        gradient_clip_val=0.25,
        precision="bf16-mixed",
        val_check_interval=0.5,
        log_every_n_steps=1,
        logger=CSVLogger(options.out),
    )
    fitter.fit(LanguageModel(), DataLoader(train, 8, shuffle=True), DataLoader(val, 8))


if __name__ == "__main__":
    main()
