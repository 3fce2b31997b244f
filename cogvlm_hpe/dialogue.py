"""Prompts and answers: the text grammar, both ways. Pure text: knows no model and no tensor.

Boxes follow CogVLM's grounding checkpoints: `[[x0,y0,x1,y1]]`, each floor(1000 · relative), three digits. Poses are
`{{yyy,ppp,rrr}}`: double braces so that they cannot be taken for a box. The paper's public text (HPE-CogVLM,
arXiv 2406.01914) gives neither its prompts nor its pose format: both are this project's, and config values.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Task = Literal["pose", "where", "what", "facing", "tags"]
TASKS: tuple[Task, ...] = ("pose", "where", "what", "facing", "tags")
AnswerFormat = Literal["offset", "signed"]
Kind = Literal["pose", "box", "blended", "out_of_range", "other"]

DEFAULT_PROMPTS: Mapping[Task, str] = {
    "pose": "What is the pose of the head at {box}?",
    "where": "Where is the {expression}?",
    "what": "What is at {box}?",
    "facing": "Which way does the head at {box} face?",
    "tags": "Tags of {box}?",
}
"""One question per task. `{box}` and `{expression}` are filled in."""

_NUMBER = r"\s*([+-]?\d{1,4})\s*"
_BOX = re.compile(r"\[\[" + ",".join([_NUMBER] * 4) + r"\]\]")
_POSE = re.compile(r"\{\{" + ",".join([_NUMBER] * 3) + r"\}\}")
_CUT_BOX = re.compile(r"(\[\[.*)(?:;|\]\]\s*\[\[?)[\s\d,+-]*\]?", re.DOTALL)
_BOX_MARK = re.compile(r"\[\[|\]\]")
_POSE_MARK = re.compile(r"\{\{|\}\}")

# Eight sectors of heading, named as seen in the image: yaw 0 looks at the viewer, yaw > 0 to the image's left.
SECTORS = ("front", "front left", "left", "back left", "back", "back right", "right", "front right")
TILTS = ("up", "level", "down")
_LEVEL_SLOPE = 0.25  # |y| from which a face looks up or down: about 14 degrees
_EDGE_DEG, _EDGE_SLOPE = 5.0, 0.05  # nearer than this to where the word changes, either word is right


@dataclass(frozen=True)
class Parsed:
    """What a text holds: a pose in degrees, boxes in 0..1, both mixed up (`blended`), or neither.

    `out_of_range`: written as a pose or as boxes are, with numbers that are neither; `other`: anything else.
    """

    kind: Kind
    pose_deg: tuple[float, float, float] | None = None
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)


def format_box(bbox: Sequence[float], width: int, height: int) -> str:
    """Pixels (x0, y0, x1, y1) to `[[x0,y0,x1,y1]]` in thousandths of the image, clamped to 000-999."""
    sides = (width, height, width, height)
    return "[[" + ",".join(f"{_thousandths(v, side):03d}" for v, side in zip(bbox, sides, strict=True)) + "]]"


def _thousandths(value_px: float, side_px: int) -> int:
    return min(999, max(0, int(1000.0 * value_px / side_px)))


def format_pose(yaw_deg: float, pitch_deg: float, roll_deg: float, answer_format: AnswerFormat = "offset") -> str:
    """A pose in degrees to its answer.

    `offset`: (yaw + 180) mod 360, pitch + 90, (roll + 180) mod 360, three digits each: of fixed length and without
    signs. `signed`: whole degrees as they are.
    """
    yaw, pitch, roll = round(yaw_deg), round(pitch_deg), round(roll_deg)
    if answer_format == "signed":
        return f"{{{{{yaw},{pitch},{roll}}}}}"
    return f"{{{{{(yaw + 180) % 360:03d},{pitch + 90:03d},{(roll + 180) % 360:03d}}}}}"


def parse(text: str, answer_format: AnswerFormat = "offset") -> Parsed:
    """Tell a valid pose, valid boxes, a blend of both formats, and anything else. Never raises, on any text.

    The grammar is in docs/answers.md. A text with marks of both formats is blended, however well formed either is.
    """
    has_box_mark, has_pose_mark = bool(_BOX_MARK.search(text)), bool(_POSE_MARK.search(text))
    if has_box_mark and has_pose_mark:
        return Parsed("blended")
    if has_pose_mark:
        return _parse_pose(text, answer_format)
    return _parse_boxes(text) if has_box_mark else Parsed("other")


def _parse_pose(text: str, answer_format: AnswerFormat) -> Parsed:
    match = _POSE.fullmatch(text.strip())
    if not match:
        return Parsed("other")
    yaw, pitch, roll = (int(group) for group in match.groups())
    if answer_format == "offset":
        if not (0 <= yaw <= 360 and 0 <= pitch <= 180 and 0 <= roll <= 360):
            return Parsed("out_of_range")
        yaw, pitch, roll = yaw % 360 - 180, pitch - 90, roll % 360 - 180
    if not (abs(yaw) <= 180 and abs(pitch) <= 90 and abs(roll) <= 180):
        return Parsed("out_of_range")
    return Parsed("pose", (180.0 if yaw == -180 else float(yaw), float(pitch), 180.0 if roll == -180 else float(roll)))


def _parse_boxes(text: str) -> Parsed:
    # CogVLM writes several boxes of one phrase inside one pair of brackets: [[a,b,c,d;e,f,g,h]].
    spread = text.strip().replace(";", "]][[")
    if _BOX.sub("", spread).strip():
        return Parsed("other")
    boxes = []
    for match in _BOX.finditer(spread):
        x0, y0, x1, y1 = (int(group) / 1000.0 for group in match.groups())
        if not (0 <= x0 < x1 < 1 and 0 <= y0 < y1 < 1):
            return Parsed("out_of_range")
        boxes.append((x0, y0, x1, y1))
    return Parsed("box", boxes=boxes)


def whole_boxes(text: str) -> str:
    """An answer of several boxes that was cut off, without the box it was cut in; any other text as it is."""
    match = _CUT_BOX.fullmatch(text.strip())
    return f"{match[1]}]]" if match else text


def facing(direction: Sequence[float]) -> str:
    """The direction of a face in words, never in degrees: one of eight sectors, then up or down where it is tilted.

    `direction` is the unit vector out of the face in camera axes (x right, y down, z away from the viewer).
    """
    sector, tilt = facing_choices(direction)
    return SECTORS[sector] if TILTS[tilt] == "level" else f"{SECTORS[sector]} {TILTS[tilt]}"


def facing_choices(direction: Sequence[float]) -> tuple[int, int]:
    """Which of SECTORS and which of TILTS `direction` is."""
    y = direction[1]
    return round(_heading_deg(direction) / 45.0) % 8, 1 if abs(y) < _LEVEL_SLOPE else 2 if y > 0 else 0


def faces_clearly(direction: Sequence[float]) -> bool:
    """Whether one answer is right and its neighbours are wrong: not near where the word changes."""
    from_middle_deg = abs((_heading_deg(direction) + 22.5) % 45.0 - 22.5)
    return from_middle_deg <= 22.5 - _EDGE_DEG and abs(abs(direction[1]) - _LEVEL_SLOPE) >= _EDGE_SLOPE


def _heading_deg(direction: Sequence[float]) -> float:
    x, _, z = direction
    return math.degrees(math.atan2(-x, -z))


def format_tags(expression: str) -> str:
    """The words of a thing as `{{red,cube}}`: the other use of double braces, as a large model knows some from code.

    `parse` takes it for what it is: neither pose nor box.
    """
    return "{{" + ",".join(expression.split()) + "}}"


def ask(task: Task, prompts: Mapping[Task, str], *, box: str = "", expression: str = "") -> str:
    """The question of a task with its box or expression filled in."""
    return prompts[task].replace("{box}", box).replace("{expression}", expression)
