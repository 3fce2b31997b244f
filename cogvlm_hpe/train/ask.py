"""What a run asks about a sample, as the model reads it; written by the reader processes while the model works."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from cogvlm_hpe import asking
from cogvlm_hpe.asking import Question
from cogvlm_hpe.config import ModelConfig
from cogvlm_hpe.dialogue import Task
from shards.record import Record
from shards.stream import Item


@dataclass(frozen=True)
class Asked:
    """One question, in token ids."""

    task: Task
    query: list[int]
    answer: list[int]
    """With the end."""
    box: list[float]
    """What it is about: x0, y0, x1, y1 in image sides."""


class Asker:
    """The rules by which a run's samples become questions; can be pickled."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        model: ModelConfig,
        ask: Sequence[Sequence[Task]],
        *,
        at_most: int,
        min_visible: float,
        seed: int,
        eos: int,
    ) -> None:
        self._tokenizer, self._model, self._ask = tokenizer, model, ask
        self._at_most, self._min_visible, self._seed, self._eos = at_most, min_visible, seed, eos

    def __call__(self, item: Item) -> list[Asked]:
        """The questions of one sample; none of a skipped one."""
        record, model = item.record, self._model
        if record is None:
            return []
        tasks = self._ask[item.slot.set]
        known = asking.questions(record, tasks, model.prompts, model.answer_format, self._min_visible)
        chosen = choose(known, self._at_most, self._seed, item.slot.position)
        return [self._asked(question, record) for question in chosen]

    def _asked(self, question: Question, record: Record) -> Asked:
        answer = [*self._encode(question.answer), self._eos]
        box = np.divide(question.about.bbox, (record.image.width, record.image.height) * 2)
        return Asked(question.task, self._encode(question.query), answer, box.tolist())

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def choose(questions: list[Question], at_most: int, seed: int, position: int) -> list[Question]:
    """A choice that depends only on the seed and the sample's position in the stream."""
    if len(questions) <= at_most:
        return questions
    picked = np.random.default_rng([seed, position]).choice(len(questions), at_most, replace=False)
    return [questions[i] for i in sorted(picked)]
