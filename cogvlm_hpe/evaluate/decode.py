"""Questions about a batch of images, the model's answers, and what is right or wrong with each.

A row is what becomes one line of predictions.jsonl. A pose is asked of every labelled head that is at least half
visible; boxes are pixels of the stored image.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cogvlm_hpe import asking, dialogue
from cogvlm_hpe.asking import Question
from cogvlm_hpe.dialogue import Task
from cogvlm_hpe.evaluate import metrics
from cogvlm_hpe.evaluate.answer import Answer, Decoding, answer
from cogvlm_hpe.evaluate.live import Totals
from cogvlm_hpe.evaluate.reduce import collect
from cogvlm_hpe.evaluate.summary import ANGLES, Row
from launcher.comm import Comm
from launcher.progress import Progress
from shards.index import ShardSet
from shards.plan import consecutive_batches
from shards.record import Head, Record
from shards.stream import Item, read_all

if TYPE_CHECKING:
    from cogvlm_hpe.model.load import Loaded

_DIGITS = 4


def questions(key: str, record: Record, tasks: Sequence[Task], notes: dict[str, Any]) -> list[Row]:
    """One unanswered row per head or expression and task, in a fixed order. `notes` holds prompts and answer format.

    Weak labels are nobody's truth and are not asked about.
    """
    asked = asking.questions(record, tasks, notes["prompts"], notes["answer_format"])
    rows = []
    for question in asked:
        about = question.about
        if isinstance(about, Head):
            if not about.weak:
                rows.append(_row(key, "head", question, record) | {"head_height": _height(about, record)})
        else:
            rows.append(_row(key, "object", question, record) | {"size": [record.image.width, record.image.height]})
    return rows


def _row(key: str, kind: str, question: Question, record: Record) -> Row:
    about = question.about
    truth: Any = question.answer
    if question.task == "pose" and isinstance(about, Head):
        truth = dict(zip(ANGLES, _rounded(about.pose_deg), strict=True))
    elif question.task == "where":
        truth = _rounded(about.bbox)
    return {
        "id": f"{key}/{kind}-{question.number}",
        "task": question.task,
        "key": key,
        "box": _rounded(about.bbox),
        "question": question.query,
        "truth": truth,
    }


def _height(head: Head, record: Record) -> float:
    return round((head.bbox[3] - head.bbox[1]) / record.image.height, _DIGITS)


def judge(row: Row, given: Answer, answer_format: dialogue.AnswerFormat) -> Row:
    """The row with the answer: its text, which format it has, what was read from it, and its errors.

    An expected pose, where the answer has one, counts instead of the text's, and its confidence is kept. Errors are
    null where there is nothing to measure: a pose question answered by anything but a valid pose, a box question by
    anything but valid boxes (the first one counts).
    """
    text, extra = given.text, {} if given.confidence is None else {"confidence": round(given.confidence, _DIGITS)}
    parsed = dialogue.parse(text, answer_format)
    value: Any = None
    errors: dict[str, Any] | None = None
    if row["task"] == "pose" and parsed.pose_deg is not None:
        pose_deg = parsed.pose_deg if given.pose_deg is None else _rounded(given.pose_deg)
        value = dict(zip(ANGLES, pose_deg, strict=True))
        errors = _pose_errors(pose_deg, [row["truth"][angle] for angle in ANGLES])
    elif row["task"] == "where" and parsed.boxes:
        sides = np.array([*row["size"], *row["size"]], dtype=float)
        value = [_rounded(np.array(box) * sides) for box in parsed.boxes]
        errors = {"iou": round(float(metrics.iou(np.array(value[0]), np.array(row["truth"]))), _DIGITS)}
    elif row["task"] in ("what", "facing", "tags"):
        value = " ".join(text.split())
        errors = {"exact": value == row["truth"]}
    return row | {"text": text, "kind": parsed.kind, "parsed": value, "errors": errors} | extra


def _pose_errors(predicted: Sequence[float], truth: Sequence[float]) -> dict[str, float]:
    pair = np.array([predicted], dtype=float), np.array([truth], dtype=float)
    angles = _rounded(metrics.angle_errors_deg(*pair)[0])
    return {
        "geodesic": round(float(metrics.geodesic_errors_deg(*pair)[0]), _DIGITS),
        **dict(zip(ANGLES, angles, strict=True)),
    }


def decode_batch(loaded: "Loaded", items: Sequence[Item], tasks: Sequence[Task], decoding: Decoding) -> list[Row]:
    """All rows of a batch, answered and judged, images in order."""
    import torch

    from cogvlm_hpe.train.batch import normalise

    asked = [
        (number, row)
        for number, item in enumerate(items)
        if item.record is not None
        for row in questions(item.key, item.record, tasks, loaded.notes)
    ]
    weight = next(loaded.model.parameters())
    rows: list[Row] = []
    for start in range(0, len(asked), decoding.questions):
        part = asked[start : start + decoding.questions]
        needed = sorted({number for number, _ in part})
        pixels = torch.stack([image for number in needed if (image := items[number].image) is not None])
        answers = answer(
            loaded,
            normalise(pixels).to(weight.device, weight.dtype),
            [needed.index(number) for number, _ in part],
            [row["task"] for _, row in part],
            [row["question"] for _, row in part],
            decoding,
        )
        rows += [
            judge(row, given, loaded.notes["answer_format"]) for (_, row), given in zip(part, answers, strict=True)
        ]
    return rows


def decode_set(
    loaded: "Loaded",
    shard_set: ShardSet,
    comm: Comm,
    tasks: Sequence[Task],
    decoding: Decoding,
    *,
    batch: int,
    limit: int | None = None,
    workers: int = 0,
    description: str = "evaluate",
) -> tuple[list[Row] | None, int]:
    """All ranks. (rows in key order on rank 0, None elsewhere; images judged). Batches are dealt round-robin.

    A batch is the same images on any number of ranks, so its answers are the same numbers.
    """
    n_images = min(len(shard_set), limit or len(shard_set))
    n_batches = len(consecutive_batches(n_images, batch))
    mine = read_all(
        shard_set, comm.rank, comm.size, batch, loaded.model.config.vision_config["image_size"], workers, limit
    )
    parts, totals = [], Totals()
    with Progress(comm).bar(description, n_images) as bar:
        for _ in range(-(-n_batches // comm.size)):
            number, items = next(mine, (None, []))
            if number is not None:
                rows = decode_batch(loaded, items, tasks, decoding)
                parts.append((number, rows))
                totals.add(rows, len(items))
            bar.advance(totals.reduce(comm))
            bar.update(totals.text())
    return collect(parts, n_batches, comm), n_images


def _rounded(values: Any) -> list[float]:
    return [round(float(value), _DIGITS) + 0.0 for value in values]
