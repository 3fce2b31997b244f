"""Records to tensors: which questions are asked, their tokens and their labels.

Shapes: I images, S image side in px, R branches, L tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from cogvlm_hpe import dialogue
from cogvlm_hpe.config import ModelConfig
from cogvlm_hpe.dialogue import Task
from cogvlm_hpe.model.modeling import IGNORE
from shards.record import Head, Record
from shards.stream import Item

# OpenAI CLIP's statistics, which EVA2-CLIP and so CogVLM keep.
_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


@dataclass(frozen=True)
class Question:
    """One question about an image and its answer, as text."""

    task: Task
    query: str
    answer: str


@dataclass
class Batch:
    """One micro-batch of one rank."""

    pixel_values: Tensor  # (I, 3, S, S) float, normalised
    image_index: Tensor  # (R,)
    input_ids: Tensor  # (R, L)
    labels: Tensor  # (R, L)
    tasks: list[Task]  # R long; empty when there is no answer
    records: list[Record | None]  # I long

    @property
    def n_answers(self) -> int:
        """Answers that carry loss."""
        return len(self.tasks)


def normalise(images_u8: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(I, 3, S, S) uint8 to the vision tower's range."""
    return ((images_u8.float() / 255.0 - _MEAN[:, None, None]) / _STD[:, None, None]).to(dtype)


def face_direction(head: Head) -> list[float]:
    """Unit vector out of the face in camera axes."""
    return (-head.matrix[:, 2]).tolist()


def all_questions(record: Record, tasks: Sequence[Task], model: ModelConfig, min_visible: float) -> list[Question]:
    """Every question of `tasks` that this record can answer, in a fixed order."""
    width, height = record.image.width, record.image.height
    heads = [head for head in record.heads if head.visible >= min_visible]
    out: list[Question] = []
    for task in tasks:
        if task in ("pose", "facing"):
            for head in heads:
                box = dialogue.format_box(head.bbox, width, height)
                if task == "pose":
                    answer = dialogue.format_pose(*head.pose_deg, model.answer_format)
                else:
                    answer = dialogue.facing(face_direction(head))
                out.append(Question(task, dialogue.ask(task, model.prompts, box=box), answer))
        else:
            for thing in record.objects:
                box = dialogue.format_box(thing.bbox, width, height)
                query = dialogue.ask(task, model.prompts, box=box, expression=thing.expression)
                out.append(Question(task, query, box if task == "where" else thing.expression))
    return out


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

    def __call__(self, items: Sequence[Item]) -> Batch:
        """Items of one micro-batch; a skipped item stays as a blank image without questions."""
        blank = torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8)
        images = torch.stack([blank if item.image is None else item.image for item in items])
        index, rows, labels, tasks = [], [], [], []
        for number, item in enumerate(items):
            for question in self._questions(item):
                query, answer = self.encode(question.query), [*self.encode(question.answer), self.eos]
                index.append(number)
                rows.append(query + answer)
                labels.append([IGNORE] * len(query) + answer)
                tasks.append(question.task)
        return self._batch(items, images, (index, rows, labels, tasks))

    def blank(self) -> Batch:
        """One black image without questions."""
        images = torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8)
        return self._batch([None], images, ([], [], [], []))

    def _batch(self, items: Sequence[Item | None], images: Tensor, parts: tuple[list, list, list, list]) -> Batch:
        index, rows, labels, tasks = parts
        if not rows:  # every rank makes the same calls, so a batch without answers still runs one branch
            index, rows, labels = [0], [[self.eos]], [[IGNORE]]
        return Batch(
            pixel_values=normalise(images),
            image_index=torch.tensor(index),
            input_ids=_pad(rows, self.pad),
            labels=_pad(labels, IGNORE),
            tasks=tasks,
            records=[item.record if item else None for item in items],
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, nothing added."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _questions(self, item: Item) -> list[Question]:
        if item.record is None:
            return []
        questions = all_questions(item.record, self.ask[item.slot.set], self.model, self.min_visible)
        return choose(questions, self.at_most, self.seed, item.slot.position)


def _pad(rows: list[list[int]], value: int) -> Tensor:
    length = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
