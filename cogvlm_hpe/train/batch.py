"""Samples and their questions to tensors.

Shapes: I images, S image side in px, R branches, L tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cogvlm_hpe.dialogue import Task
from cogvlm_hpe.model.layout import IGNORE
from cogvlm_hpe.train.ask import Asked
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


class Collator:
    """Makes batches of samples whose questions are written."""

    def __init__(self, image_size: int, eos: int, pad: int) -> None:
        self.image_size, self._eos, self._pad = image_size, eos, pad

    def __call__(self, items: Sequence[Item], images: Tensor) -> Batch:
        """Items of one micro-batch and their images (I, 3, S, S); a skipped item, black there, is asked nothing."""
        asked = [(number, question) for number, item in enumerate(items) for question in item.note]
        return self._batch(images, [item.record for item in items], [item.key for item in items], asked)

    def blank(self) -> Batch:
        """One black image without questions."""
        side = self.image_size
        return self._batch(torch.zeros(1, 3, side, side, dtype=torch.uint8), [None], ["blank"], [])

    def _batch(
        self, images: Tensor, records: list[Record | None], keys: list[str], asked: Sequence[tuple[int, Asked]]
    ) -> Batch:
        index = [number for number, _ in asked]
        rows = [question.query + question.answer for _, question in asked]
        labels = [[IGNORE] * len(question.query) + question.answer for _, question in asked]
        boxes = [question.box for _, question in asked]
        if not rows:  # every rank makes the same calls, so a batch without answers still runs one branch
            index, rows, labels, boxes = [0], [[self._eos]], [[IGNORE]], [[0.0] * 4]
        return Batch(
            images=images,
            image_index=torch.tensor(index),
            input_ids=_pad(rows, self._pad),
            attention_mask=_pad([[1] * len(row) for row in rows], 0),
            labels=_pad(labels, IGNORE),
            boxes=torch.tensor(boxes, dtype=torch.float),
            tasks=[question.task for _, question in asked],
            records=records,
            keys=keys,
        )


def _pad(rows: list[list[int]], value: int) -> Tensor:
    out = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for place, row in zip(out, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(out)
