"""Results with known errors, made without a model."""

import json
from pathlib import Path

import numpy as np

from cogvlm_hpe import dialogue
from cogvlm_hpe.evaluate import reduce
from cogvlm_hpe.evaluate.answer import Answer
from cogvlm_hpe.evaluate.decode import judge, questions
from launcher.comm import single
from shards import pose
from shards.index import open_set
from shards.record import Record

NOTES = {"prompts": dict(dialogue.DEFAULT_PROMPTS), "answer_format": "offset"}


def made_rows(shard_set: Path, error_deg: float, blended: int = 0, missed: int = 0) -> list[dict]:
    """Of a system that errs by `error_deg` about a random axis, blends the first answers and misses the first boxes."""
    generator = np.random.default_rng(0)
    stored, rows = open_set(shard_set), []
    for i in stored.key_order():
        record = stored.record(int(i))
        for row in questions(stored.key(int(i)), record, ["pose", "where", "what"], NOTES):
            rows.append(judge(row, Answer(_answer(row, record, error_deg, generator)), "offset"))
    for number, row in enumerate([row for row in rows if row["task"] == "pose"][:blended]):
        row |= judge({key: row[key] for key in ("task", "truth")}, Answer(f"{{{{{number},1,1}}}} [["), "offset")
    for row in [row for row in rows if row["task"] == "where"][:missed]:
        row |= judge({key: row[key] for key in ("task", "truth", "size")}, Answer("[[000,000,001,001]]"), "offset")
    return rows


def make_result(folder: Path, shard_set: Path, name: str, error_deg: float, **more: int) -> Path:
    """A result folder of `made_rows`."""
    stored, rows = open_set(shard_set), made_rows(shard_set, error_deg, **more)
    header = {
        "system": name,
        "set": {"name": stored.info["name"], "images": len(stored)},
        "decoding": {"dtype": "fp32"},
    }
    facts = reduce.run_facts(single(), 1, 0.0, shards=str(shard_set))
    reduce.write_result(folder, rows, header, facts)
    return folder


def _answer(row: dict, record: Record, error_deg: float, generator: np.random.Generator) -> str:
    if row["task"] == "what":
        return row["truth"]
    if row["task"] == "where":
        return dialogue.format_box(row["truth"], record.image.width, record.image.height)
    truth = pose.rotation_from_pose(*row["truth"].values())
    axis = generator.normal(size=3)
    turn = pose.Rotation.from_rotvec(np.radians(error_deg) * axis / np.linalg.norm(axis)).as_matrix()
    return dialogue.format_pose(*pose.pose_from_rotation(turn @ truth))


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
