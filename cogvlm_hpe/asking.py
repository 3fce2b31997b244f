"""What can be asked about a record, and the right answer to each question; the same for training and for judging."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cogvlm_hpe import dialogue
from cogvlm_hpe.config import MIN_VISIBLE
from cogvlm_hpe.dialogue import AnswerFormat, Task
from shards.record import Head, Object, Record

_HEAD = "head"


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
        direction = (-head.matrix[:, 2]).tolist()
        if task == "facing" and not dialogue.faces_clearly(direction):
            continue
        if task == "pose":
            yaw_deg, pitch_deg, roll_deg = head.pose_deg
            answer = dialogue.format_pose(yaw_deg, pitch_deg, roll_deg, answer_format)
        else:
            answer = dialogue.facing(direction)
        box = dialogue.format_box(head.bbox, record.image.width, record.image.height)
        out.append(Question(task, number, head, dialogue.ask(task, prompts, box=box), answer))
    return out


def _about_objects(record: Record, task: Task, prompts: Mapping[Task, str]) -> list[Question]:
    out, told = [], set()
    for number, thing in enumerate(record.objects):
        if not thing.expression.strip():
            continue  # there are no words to ask for it by, or to answer with
        name = _name(thing)
        if task == "tags" and name == _HEAD:
            continue  # one word is no list
        if task != "where":
            if thing.bbox in told:
                continue  # a head with two expressions is still one head
            told.add(thing.bbox)
        box = dialogue.format_box(thing.bbox, record.image.width, record.image.height)
        query = dialogue.ask(task, prompts, box=box, expression=thing.expression)
        answer = {"where": box, "what": name, "tags": dialogue.format_tags(name)}[task]
        out.append(Question(task, number, thing, query, answer))
    return out


def _name(thing: Object) -> str:
    """What a thing is by itself: "left head" and "largest head" are so only beside others, which no box shows."""
    words = thing.expression.split()
    return _HEAD if words[-1] == _HEAD else thing.expression
