"""What can be asked about a record, and the right answer to each question; the same for training and for judging."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cogvlm_hpe import dialogue
from cogvlm_hpe.config import MIN_VISIBLE
from cogvlm_hpe.dialogue import AnswerFormat, Task
from shards.record import Head, Object, Record


@dataclass(frozen=True)
class Question:
    """One question, its answer as text, and what it is about: head or object `number` of the record."""

    task: Task
    number: int
    about: Head | Object
    query: str
    answer: str


def questions(
    record: Record,
    tasks: Sequence[Task],
    prompts: Mapping[Task, str],
    answer_format: AnswerFormat,
    min_visible: float = MIN_VISIBLE,
) -> list[Question]:
    """Every question of `tasks` that this record can answer, in a fixed order."""
    out: list[Question] = []
    for task in tasks:
        if task in ("pose", "facing"):
            out += _about_heads(record, task, prompts, answer_format, min_visible)
        else:
            out += _about_objects(record, task, prompts)
    return out


def _about_heads(
    record: Record, task: Task, prompts: Mapping[Task, str], answer_format: AnswerFormat, min_visible: float
) -> list[Question]:
    out = []
    for number, head in enumerate(record.heads):
        if head.rotation is None or head.visible < min_visible:
            continue
        if task == "pose":
            yaw_deg, pitch_deg, roll_deg = head.pose_deg
            answer = dialogue.format_pose(yaw_deg, pitch_deg, roll_deg, answer_format)
        else:
            answer = dialogue.facing((-head.matrix[:, 2]).tolist())
        box = dialogue.format_box(head.bbox, record.image.width, record.image.height)
        out.append(Question(task, number, head, dialogue.ask(task, prompts, box=box), answer))
    return out


def _about_objects(record: Record, task: Task, prompts: Mapping[Task, str]) -> list[Question]:
    names = Counter(thing.bbox for thing in record.objects)
    out = []
    for number, thing in enumerate(record.objects):
        if task == "what" and names[thing.bbox] > 1:
            continue  # what is at a box with two names has no one answer
        box = dialogue.format_box(thing.bbox, record.image.width, record.image.height)
        query = dialogue.ask(task, prompts, box=box, expression=thing.expression)
        out.append(Question(task, number, thing, query, box if task == "where" else thing.expression))
    return out
