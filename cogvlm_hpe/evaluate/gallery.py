"""Heads worth looking at, each with its true and its predicted axes drawn: the data of the report's gallery."""

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from cogvlm_hpe.evaluate.plots import head_pixels, read_images
from cogvlm_hpe.evaluate.results import Result, by_set
from cogvlm_hpe.evaluate.summary import ANGLES, Row

_SIDE_PX, _QUALITY = 128, 80
_EACH, _EACH_OF_MANY, _MANY = 6, 3, 12  # of best, median, worst, spread and each kind that is no pose; of many results
_MOST_TEXT = 80


def heads(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One entry for each picked head and system: what the page filters by, and its picture as a data URI.

    Picked are, for each system, the best, the median and the worst heads, some of each kind of answer that is no pose,
    and some spread evenly over the set. A set whose images cannot be read any more is left out.
    """
    entries, posed = [], [result for result in results if "pose" in result.tasks]
    each = _EACH if len(posed) <= _MANY else _EACH_OF_MANY  # the page holds every picture
    for group in by_set(posed).values():
        picked = [(result, row, why) for result in group for row, why in pick(result.pose_rows, each)]
        images = read_images(group[0].run.get("shards"), {row["key"] for _, row, _ in picked})
        if images is not None:
            entries += [_entry(result, row, why, images[row["key"]]) for result, row, why in picked]
    return entries


def pick(rows: Sequence[Row], each: int = _EACH) -> list[tuple[Row, str]]:
    """(row, why it was picked), each row once."""
    valid = sorted((row for row in rows if row["errors"]), key=lambda row: (row["errors"]["geodesic"], row["id"]))
    middle = max(0, len(valid) // 2 - each // 2)
    groups = [(valid[::-1][:each], "worst"), (valid[:each], "best"), (valid[middle : middle + each], "median")]
    for kind in dict.fromkeys(row["kind"] for row in rows if not row["errors"]):
        groups.append(([row for row in rows if row["kind"] == kind and not row["errors"]][:each], "no pose"))
    spread = np.unique(np.linspace(0, len(rows) - 1, each).astype(int)).tolist() if rows else []
    groups.append(([rows[i] for i in spread], "spread"))
    picked: dict[str, tuple[Row, str]] = {}
    for group, why in groups:
        for row in group:
            picked.setdefault(row["id"], (row, why))
    return list(picked.values())


def _entry(result: Result, row: Row, why: str, image: np.ndarray) -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(head_pixels(image, row, row, _SIDE_PX)).save(file, "JPEG", quality=_QUALITY)
    truth = [row["truth"][angle] for angle in ANGLES]
    return {
        "set": result.set_name,
        "system": result.system,
        "id": row["id"],
        "kind": row["kind"],
        "why": why,
        "facing": "front" if abs(truth[0]) <= 90 else "back",
        "error": row["errors"]["geodesic"] if row["errors"] else None,
        "truth": truth,
        "height": row["head_height"],
        "text": row["text"][:_MOST_TEXT],
        "image": "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode(),
    }


def as_script(entries: Sequence[dict[str, Any]]) -> str:
    """JSON that no text in it can end early inside a page."""
    return json.dumps(entries, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
