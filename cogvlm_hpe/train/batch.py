"""Records to tensors: which questions are asked, their tokens and their labels.

Shapes: I images, S image side in px, R branches, L tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from cogvlm_hpe import asking
from cogvlm_hpe.asking import Question
from cogvlm_hpe.config import ModelConfig
from cogvlm_hpe.dialogue import Task
from cogvlm_hpe.model.layout import IGNORE
from shards.record import Record
from shards.stream import Item


@dataclass
class Batch:
    """One micro-batch of one rank."""

    images: Tensor  # (I, 3, S, S) uint8, as the stream gave them: page-locked where there is CUDA
    image_index: Tensor  # (R,)
    input_ids: Tensor  # (R, L)
    attention_mask: Tensor  # (R, L) 1 on real tokens
    labels: Tensor  # (R, L)
    boxes: Tensor  # (R, 4) what each question is about: x0, y0, x1, y1 in image sides
    tasks: list[Task]  # R long; empty when there is no answer
    records: list[Record | None]  # I long
    keys: list[str]  # I long

    @property
    def n_answers(self) -> int:
        """Answers that carry loss."""
        return len(self.tasks)

    @property
    def n_text_tokens(self) -> int:
        """Tokens of questions and answers, no padding."""
        return int(self.attention_mask.sum()) if self.tasks else 0


def choose(questions: list[Question], at_most: int, seed: int, position: int) -> list[Question]:
    """A choice that depends only on the seed and the sample's position in the stream."""
    if len(questions) <= at_most:
        return questions
    picked = np.random.default_rng([seed, position]).choice(len(questions), at_most, replace=False)
    return [questions[i] for i in sorted(picked)]


class Collator:
    """Makes batches of items; one tokenizer, one set of rules."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        model: ModelConfig,
        ask: Sequence[Sequence[Task]],
        *,
        at_most: int,
        min_visible: float,
        seed: int,
        image_size: int,
        eos: int,
        pad: int,
    ) -> None:
        self.tokenizer, self.model, self.ask = tokenizer, model, ask
        self.at_most, self.min_visible, self.seed = at_most, min_visible, seed
        self.image_size, self.eos, self.pad = image_size, eos, pad

    def __call__(self, items: Sequence[Item], images: Tensor) -> Batch:
        """Items of one micro-batch and their images (I, 3, S, S); a skipped item, black there, is asked nothing."""
        asked = [(number, question) for number, item in enumerate(items) for question in self._questions(item)]
        return self._batch(images, [item.record for item in items], [item.key for item in items], asked)

    def blank(self) -> Batch:
        """One black image without questions."""
        return self._batch(
            torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8), [None], ["blank"], []
        )

    def _batch(
        self, images: Tensor, records: list[Record | None], keys: list[str], asked: Sequence[tuple[int, Question]]
    ) -> Batch:
        index, rows, labels, boxes = [], [], [], []
        for number, question in asked:
            query, answer = self.encode(question.query), [*self.encode(question.answer), self.eos]
            record = records[number]
            assert record is not None, "a skipped sample is asked nothing"
            index.append(number)
            rows.append(query + answer)
            labels.append([IGNORE] * len(query) + answer)
            boxes.append(np.divide(question.about.bbox, (record.image.width, record.image.height) * 2).tolist())
        if not rows:  # every rank makes the same calls, so a batch without answers still runs one branch
            index, rows, labels, boxes = [0], [[self.eos]], [[IGNORE]], [[0.0] * 4]
        return Batch(
            images=images,
            image_index=torch.tensor(index),
            input_ids=_pad(rows, self.pad),
            attention_mask=_pad([[1] * len(row) for row in rows], 0),
            labels=_pad(labels, IGNORE),
            boxes=torch.tensor(boxes, dtype=torch.float),
            tasks=[question.task for _, question in asked],
            records=records,
            keys=keys,
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, nothing added."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _questions(self, item: Item) -> list[Question]:
        if item.record is None:
            return []
        tasks, model = self.ask[item.slot.set], self.model
        questions = asking.questions(item.record, tasks, model.prompts, model.answer_format, self.min_visible)
        return choose(questions, self.at_most, self.seed, item.slot.position)


def _pad(rows: list[list[int]], value: int) -> Tensor:
    out = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for place, row in zip(out, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(out)
