"""Question answering by marking a span of a passage, with BERT or ELECTRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.utils.data import default_collate
from torchmetrics.text import SQuAD

from ._common import Loaders
from .passages import Batch, Questions, RandomQuestions, load_tokenizer, read_squad, write_topics

_VOCABULARY = 30522
_LONGEST = 30  # word pieces of an answer


def prepare(directory: Path) -> None:
    """Write the questions about Python's help texts."""
    write_topics(directory)


def build(workload: Mapping[str, Any], directory: Path) -> tuple[Reader, Loaders]:
    """The reader and its data.

    ``net`` holds fields of transformers' `BertConfig` or `ElectraConfig`, ``attention`` (``sdpa`` or ``eager``), and
    ``vocabulary``, a ``vocab.txt`` of the user's own.
    """
    net = dict(workload["net"])
    length, batch_size, vocabulary = workload["length"], workload["batch_size"], net.pop("vocabulary", None)
    pieces = _VOCABULARY
    train: Any
    validation: Any
    if workload["data"] == "synthetic":
        train = RandomQuestions(pieces, length=length, samples=workload["samples"])
        validation = RandomQuestions(pieces, length=length, samples=batch_size)
    else:
        tokenizer = load_tokenizer(vocabulary)
        pieces = len(tokenizer)
        files = [directory / name for name in ("train.json", "dev.json")]
        if workload["data"] == "full":
            files = [Path(workload["path"]) / f"{part}-v1.1.json" for part in ("train", "dev")]
        train = Questions(read_squad(files[0]), tokenizer, length=length, answerable=True)
        validation = Questions(read_squad(files[1]), tokenizer, length=length, answerable=False)
    model = build_net(workload["model"], vocab_size=pieces, **net)
    return Reader(model, lr=workload["lr"]), Loaders(
        train, validation, batch_size=batch_size, validation_batch_size=32, collate=collate
    )


def build_net(model: str, *, attention: str = "sdpa", **net: Any) -> nn.Module:
    """The model of transformers for question answering.

    Args:
        model: ``bert`` or ``electra``.
        attention: ``sdpa`` or ``eager``.
        net: fields of its configuration.

    Raises:
        ImportError: if transformers is missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"{model} comes with transformers. HINT: pip install 'lightning-easyscale[workloads]'."
        ) from error
    name = {"bert": "Bert", "electra": "Electra"}[model]
    config = getattr(transformers, f"{name}Config")(**net)
    made: nn.Module = getattr(transformers, f"{name}ForQuestionAnswering")._from_config(
        config, attn_implementation=attention
    )
    return made


def collate(samples: Sequence[Batch]) -> list[Tensor]:
    """A batch; where no sample is padded its mask has no columns.

    Whether a mask masks anything, transformers asks the mask itself, and a GPU would have to answer for each batch.
    """
    batch: list[Tensor] = default_collate(samples)
    if batch[1].all():
        batch[1] = batch[1][:, :0]
    return batch


class Reader(pl.LightningModule):
    """Cross-entropy of an answer's first and last word piece, AdamW; SQuAD's exact match and F1.

    Args:
        net: gives ``start_logits`` and ``end_logits``.
        lr: the learning rate after a tenth of the run, up to which it grows, and from which it falls, linearly; without
            ``max_steps`` it stays.
    """

    metric = "val_exact_match"
    chance = 0.0

    def __init__(self, net: nn.Module, *, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr
        self.squad = SQuAD()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        return self._loss(*self._logits(batch), batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs loss, and the share of exactly right answers, over all ranks."""
        start, end = self._logits(batch)
        self.log("val_loss", self._loss(start, end, batch), sync_dist=True)
        found, right = [], []
        data = self.trainer.datamodule.validation  # type: ignore[attr-defined]
        for index, (first, last) in zip(batch[5].tolist(), _best_spans(start, end, batch[2]), strict=True):
            answers = data.questions[index].answers
            found.append({"id": str(index), "prediction_text": data.text(index, first, last)})
            right.append({"id": str(index), "answers": {"text": list(answers), "answer_start": [0] * len(answers)}})
        self.squad.update(found, right)

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics, as shares."""
        scores = self.squad.compute()
        self.log("val_exact_match", scores["exact_match"] / 100, sync_dist=True)
        self.log("val_f1", scores["f1"] / 100, sync_dist=True)
        self.squad.reset()

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
        steps = self.trainer.max_steps
        if steps < 1:
            return optimizer
        warmup = max(steps // 10, 1)

        def factor(step: int) -> float:
            return min((step + 1) / warmup, max(steps - step, 0) / max(steps - warmup, 1))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        ids, mask, types = batch[:3]
        out = self.net(input_ids=ids, attention_mask=mask if mask.shape[1] else None, token_type_ids=types)
        return out.start_logits, out.end_logits

    def _loss(self, start: Tensor, end: Tensor, batch: Batch) -> Tensor:
        return (functional.cross_entropy(start, batch[3]) + functional.cross_entropy(end, batch[4])) / 2


def _best_spans(start: Tensor, end: Tensor, types: Tensor) -> list[list[int]]:
    """First and last word piece with the greatest sum of logits, inside the passage, not too long."""
    length = start.shape[1]
    sums = start[:, :, None] + end[:, None, :]
    allowed = torch.ones(length, length, dtype=torch.bool, device=start.device).triu().tril(_LONGEST - 1)
    inside = types.bool()
    sums = sums.masked_fill(~(allowed & inside[:, :, None] & inside[:, None, :]), float("-inf"))
    best = sums.flatten(1).argmax(1)
    return torch.stack([best // length, best % length], 1).tolist()
