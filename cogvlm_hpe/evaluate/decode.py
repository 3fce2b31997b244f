"""Questions about a batch of images, the model's answers, and what is right or wrong with each.

A row is what becomes one line of predictions.jsonl. A pose is asked of every labelled head that is at least half
visible; boxes are pixels of the stored image.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from cogvlm_hpe import asking, dialogue
from cogvlm_hpe.asking import Question
from cogvlm_hpe.dialogue import Task
from cogvlm_hpe.evaluate import metrics
from cogvlm_hpe.evaluate.answer import Answer, Decoding, answer, encode
from cogvlm_hpe.evaluate.baselines.judged import CropJudged
from cogvlm_hpe.evaluate.live import Totals
from cogvlm_hpe.evaluate.reduce import collect
from cogvlm_hpe.evaluate.summary import ANGLES, Row
from cogvlm_hpe.evaluate.unfinished import Unfinished
from launcher.comm import Comm
from launcher.progress import Progress
from shards.index import ShardSet
from shards.plan import consecutive_batches
from shards.record import Head, Record
from shards.stream import Item, read_all

if TYPE_CHECKING:
    from cogvlm_hpe.evaluate.baselines.crops import CropView
    from cogvlm_hpe.model.load import Loaded

System: TypeAlias = "Loaded | CropJudged"
"""Who can be judged: a language model, or a network on head crops."""

_DIGITS = 4
_MOST_PLACES = 4  # for answers, of all images together, for each question that may be decoded at once


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
    anything but valid boxes (the first one counts). Of boxes that our limit on tokens has cut the whole ones count.
    """
    text, extra = given.text, {} if given.confidence is None else {"confidence": round(given.confidence, _DIGITS)}
    is_cut_box = given.cut and row["task"] == "where"
    parsed = dialogue.parse(dialogue.whole_boxes(text) if is_cut_box else text, answer_format)
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


def decode_batch(loaded: System, items: Sequence[Item], tasks: Sequence[Task], decoding: Decoding) -> list[Row]:
    """All rows of a batch, answered and judged, images in order. A crop network is asked about poses alone."""
    return decode_systems([loaded], items, tasks, decoding)[0]


def decode_systems(
    systems: Sequence[System], items: Sequence[Item], tasks: Sequence[Task], decoding: Decoding
) -> list[list[Row]]:
    """`decode_batch` of each system. Adapters of scope `text` on one base share the work on the images."""
    parts = [_parts(_asked(system, items, tasks), decoding.questions) for system in systems]
    rows: list[list[Row]] = [[] for _ in systems]
    for turn in range(max(map(len, parts))):
        prefixes: dict[int, Any] = {}
        for system, own, done in zip(systems, parts, rows, strict=True):
            if turn >= len(own):
                continue
            part = own[turn]
            if isinstance(system, CropJudged):
                answers = system.answers(items, part)
            else:
                answers = _answers(system, items, part, decoding, prefixes)
            answer_format = system.notes["answer_format"]
            done += [judge(row, given, answer_format) for (_, row), given in zip(part, answers, strict=True)]
    return rows


def _asked(system: System, items: Sequence[Item], tasks: Sequence[Task]) -> list[tuple[int, Row]]:
    return [
        (number, row)
        for number, item in enumerate(items)
        if item.record is not None
        for row in questions(item.key, item.record, _asked_of(system, tasks), system.notes)
    ]


def _parts(asked: Sequence[tuple[int, Row]], questions: int) -> list[list[tuple[int, Row]]]:
    """What is decoded at once, in order: at most so many questions.

    Every image has memory for as many answers as the one with most: a crowd goes apart from many images of one head.
    """
    parts: list[list[tuple[int, Row]]] = []
    counts: Counter[int] = Counter()
    for number, row in asked:
        counts[number] += 1
        too_wide = len(counts) * max(counts.values()) > _MOST_PLACES * questions
        if not parts or len(parts[-1]) == questions or too_wide:
            parts.append([])
            counts = Counter([number])
        parts[-1].append((number, row))
    return parts


def _answers(
    loaded: "Loaded",
    items: Sequence[Item],
    part: Sequence[tuple[int, Row]],
    decoding: Decoding,
    prefixes: dict[int, Any],
) -> list[Answer]:
    """Answers to `part`; `prefixes` keeps, by base, what other systems asked the same can use of it."""
    import torch

    from cogvlm_hpe.model.pixels import normalise

    weight = next(loaded.model.parameters())
    needed = sorted({number for number, _ in part})
    stacked = torch.stack([image for number in needed if (image := items[number].image) is not None])
    pixels = normalise(stacked).to(weight.device, weight.dtype)
    # Models on the same memory of one base see the same image, unless an adapter works on its tokens too.
    prefix = prefixes.get(weight.data_ptr()) if loaded.model.adapter_scope == "text" else None
    if prefix is None:
        prefix = encode(loaded, pixels)
        if loaded.model.adapter_scope == "text":
            prefixes[weight.data_ptr()] = prefix
    return answer(
        loaded,
        pixels,
        [needed.index(number) for number, _ in part],
        [row["task"] for _, row in part],
        [row["question"] for _, row in part],
        decoding,
        prefix=prefix,
    )


def _asked_of(system: System, tasks: Sequence[Task]) -> Sequence[Task]:
    return [task for task in tasks if task == "pose"] if isinstance(system, CropJudged) else tasks


def decode_all(
    systems: Sequence[System],
    shard_set: ShardSet,
    comm: Comm,
    tasks: Sequence[Task],
    decoding: Decoding,
    *,
    batch: int,
    limit: int | None = None,
    workers: int = 0,
    description: str = "evaluate",
    unfinished: Unfinished | None = None,
) -> tuple[list[list[Row]] | None, int]:
    """All ranks. (rows in key order of each system on rank 0, None elsewhere; images judged), in one pass.

    Batches are dealt round-robin, and a batch is the same images on any number of ranks, so its answers are the same
    numbers. Those that `unfinished` holds are taken from it, and those judged now are kept there. No rank waits for
    another before the end; the progress shows the first system's scores.
    """
    n_images = min(len(shard_set), limit or len(shard_set))
    batches = consecutive_batches(n_images, batch)
    done = unfinished.done if unfinished else []
    left = sorted(set(range(len(batches))).difference(done))
    mine = read_all(shard_set, comm.rank, comm.size, batch, _view(systems[0]), workers, limit, only=left)
    parts = [(number, unfinished.read(number)) for number in done] if unfinished and comm.rank == 0 else []
    totals = Totals()
    with Progress(comm).bar(description, n_images) as bar:
        bar.advance(sum(len(batches[number]) for number in done))
        for turn in range(1, -(-len(left) // comm.size) + 1):
            number, items = next(mine, (None, []))
            if number is not None:
                rows = decode_systems(systems, items, tasks, decoding)
                parts.append((number, rows))
                totals.add(rows[0], len(items))
                if unfinished:
                    unfinished.keep(number, rows)
            if unfinished:
                unfinished.arrive(turn)
            bar.advance(totals.reduce(comm))
            bar.update(totals.text())
        bar.advance(totals.finish())
    flat = collect(parts, len(batches), comm)
    if flat is None:
        return None, n_images
    return [[row for rows in flat[i :: len(systems)] for row in rows] for i in range(len(systems))], n_images


def _view(system: System) -> "CropView | int":
    if isinstance(system, CropJudged):
        return system.view
    side_px: int = system.model.config.vision_config["image_size"]
    return side_px


def _rounded(values: Any) -> list[float]:
    return [round(float(value), _DIGITS) + 0.0 for value in values]
