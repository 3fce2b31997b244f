"""The schema of one sample: what an image's JSON says, checked once when it is read."""

import json
import math
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from pydantic_core import from_json as parse_json

from launcher.errors import UserError
from shards import pose

CONVENTION = "hpe-v1"
_POSE_TOLERANCE_DEG = 0.1
_POSE_TOLERANCE = math.sqrt(8.0) * math.sin(math.radians(_POSE_TOLERANCE_DEG) / 2.0)  # as a distance of matrices
_ORTHONORMAL = 1e-4
_SURELY_ROTATION = 0.4 * _ORTHONORMAL
"""So near to a rotation, R + E has (R + E)(R + E)ᵀ - I = REᵀ + ERᵀ + EEᵀ, of which no entry reaches _ORTHONORMAL."""
_LONGEST_SIDE_PX = 1_000_000
_LEAST_SIDE_PX = 1e-3
_LIMITS_DEG = {"yaw": 180.0, "pitch": 90.0, "roll": 180.0}
_SIDE = re.compile(r"\b(left|right)(?=\b|most\b|wards?\b|sides?\b|hand\b)", re.IGNORECASE)


class RecordError(UserError):
    """A record that breaks the schema; the message names the field, the value and the rule."""


@dataclass(frozen=True)
class Camera:
    """Pinhole intrinsics in pixels."""

    fx: float
    fy: float
    cx: float
    cy: float


@dataclass(frozen=True)
class Image:
    """Where an image comes from. `subject` keeps a person or sequence within one split."""

    width: int
    height: int
    source: str
    id: str
    subject: str
    camera: Camera | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Head:
    """One head: box in pixels (x0, y0, x1, y1), and its rotation (9 numbers, row by row) or None where it is not known.

    Heads without a rotation come from data sets of boxes; nobody is asked for their pose until a model has labelled it.
    """

    bbox: tuple[float, float, float, float]
    rotation: tuple[float, ...] | None
    visible: float = 1.0
    weak: bool = False
    confidence: float = 1.0
    subject: str = ""

    @property
    def matrix(self) -> pose.Array:
        """(3, 3) head-to-camera rotation M. Raises ValueError where it is not known."""
        if self.rotation is None:
            raise ValueError("this head has no rotation")
        return np.asarray(self.rotation, dtype=float).reshape(3, 3)

    @property
    def pose_deg(self) -> pose.Array:
        """(3,) yaw, pitch, roll. Raises ValueError where they are not known."""
        return pose.pose_from_rotation(self.matrix)


@dataclass(frozen=True)
class Object:
    """A thing that `expression` names and nothing else in the image does."""

    expression: str
    bbox: tuple[float, float, float, float]


@dataclass(frozen=True)
class Record:
    """One image with what is known of it."""

    image: Image
    heads: list[Head] = field(default_factory=list)
    objects: list[Object] = field(default_factory=list)

    @property
    def poses_deg(self) -> pose.Array:
        """(P, 3) yaw, pitch, roll of the heads whose rotation is known."""
        return np.array([head.pose_deg for head in self.heads if head.rotation is not None]).reshape(-1, 3)

    def to_json(self) -> str:
        """The stored form; keys in a fixed order, numbers rounded, so equal records give equal bytes."""
        value = {
            "convention": CONVENTION,
            "image": asdict(self.image),
            "heads": [_head_dict(head) for head in self.heads],
            "objects": [{"expression": o.expression, "bbox": _rounded(o.bbox, 2)} for o in self.objects],
        }
        return json.dumps(value, separators=(",", ":"))

    def mirrored(self) -> "Record":
        """The record of the image mirrored left to right: boxes, poses, camera and the words left and right."""
        width = self.image.width
        camera = self.image.camera and replace(self.image.camera, cx=width - self.image.camera.cx)
        heads = [replace(head, bbox=_mirror(head.bbox, width), rotation=_flipped(head)) for head in self.heads]
        objects = [Object(mirror_words(o.expression), _mirror(o.bbox, width)) for o in self.objects]
        return Record(replace(self.image, camera=camera), heads, objects)


def mirror_words(text: str) -> str:
    """`text` with left and right exchanged (leftmost, leftward, leftside and lefthand too), capitals kept."""

    def other(match: re.Match[str]) -> str:
        word = match.group(0)
        swapped = "right" if word.lower() == "left" else "left"
        return swapped.upper() if word.isupper() else swapped.title() if word[0].isupper() else swapped

    return _SIDE.sub(other, text)


def from_json(text: str | bytes) -> Record:
    """Read and check a record. Raises RecordError; the caller adds shard and key."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise RecordError(f"not JSON ({error}); rebuild the shard") from None
    try:
        return _record(value)
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise RecordError(f"not a record of convention {CONVENTION} ({type(error).__name__}: {error})") from None


def _record(value: dict[str, Any]) -> Record:
    if value.get("convention") != CONVENTION:
        raise RecordError(f"convention {value.get('convention')!r}: only {CONVENTION!r} is read; convert the set")
    raw = dict(value["image"])
    camera = raw.pop("camera", None)
    image = Image(**raw, camera=Camera(**camera) if camera else None)
    _check_image(image)
    heads = [_head(f"head {i}", head) for i, head in enumerate(value["heads"])]
    objects = [_object(f"object {i}", thing) for i, thing in enumerate(value["objects"])]
    return Record(image, heads, objects)


def _check_image(image: Image) -> None:
    width, height = image.width, image.height
    whole = type(width) is type(height) is int
    if not (whole and 0 < width <= _LONGEST_SIDE_PX and 0 < height <= _LONGEST_SIDE_PX):
        size = f"{width}x{height}"[:80]
        raise RecordError(f"image size {size}: both sides must be positive whole numbers, at most {_LONGEST_SIDE_PX}")
    if not type(image.source) is type(image.id) is type(image.subject) is str:
        odd = next(name for name in (image.source, image.id, image.subject) if type(name) is not str)
        raise RecordError(f"image source, id and subject must be text, one is {odd!r}")
    camera = image.camera
    if camera is not None:
        if not math.isfinite(camera.fx + camera.fy + camera.cx + camera.cy):
            raise RecordError(f"{camera}: its numbers must be finite")
        if not (camera.fx > 0.0 and camera.fy > 0.0):
            raise RecordError(f"{camera}: focal lengths must be positive")


def _rotation(name: str, value: list[Any] | None, triple: dict[str, float] | None) -> tuple[float, ...] | None:
    """The rotation, checked: it is one, the pose is in range, and both are the same.

    Plain floats, written out: for the few heads of one image numpy and scipy would cost ten times as much.
    """
    if value is None or triple is None:
        if value is not None or triple is not None:
            raise RecordError(f"{name}: of rotation and pose one is null; both or none must be")
        return None
    flat = [entry for row in value for entry in row] if len(value) == 3 and isinstance(value[0], list) else value
    if len(flat) != 9:
        raise RecordError(f"{name}: rotation {value} is not a rotation matrix (9 numbers, row by row)")
    rotation = tuple(map(float, flat))
    yaw, pitch, roll = triple["yaw"], triple["pitch"], triple["roll"]
    if not (abs(yaw) <= 180.0 and abs(pitch) <= 90.0 and abs(roll) <= 180.0):
        for angle, limit in _LIMITS_DEG.items():
            if not abs(triple[angle]) <= limit:
                raise RecordError(f"{name}: {angle} {triple[angle]} deg is outside [-{limit:g}, {limit:g}]")
    meant = _rotation_from_pose(math.radians(yaw), math.radians(pitch), math.radians(roll))
    distance = math.dist(meant, rotation)
    if distance <= _SURELY_ROTATION:
        return rotation
    if not _is_rotation(rotation):
        raise RecordError(f"{name}: rotation {value} is not a rotation matrix (orthonormal, det +1)")
    if distance > _POSE_TOLERANCE:
        # As in pose.geodesic_deg: 2·asin(|A - B|_F / (2·√2)).
        gap_deg = math.degrees(2.0 * math.asin(min(distance / math.sqrt(8.0), 1.0)))
        raise RecordError(f"{name}: pose {triple} and rotation differ by {gap_deg:.2f} deg; they must be one pose")
    return rotation


def _is_rotation(m: tuple[float, ...]) -> bool:
    a, b, c, d, e, f, g, h, i = m
    sound = (
        abs(a * a + b * b + c * c - 1.0) <= _ORTHONORMAL
        and abs(d * d + e * e + f * f - 1.0) <= _ORTHONORMAL
        and abs(g * g + h * h + i * i - 1.0) <= _ORTHONORMAL
        and abs(a * d + b * e + c * f) <= _ORTHONORMAL
        and abs(a * g + b * h + c * i) <= _ORTHONORMAL
        and abs(d * g + e * h + f * i) <= _ORTHONORMAL
    )
    return sound and a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g) > 0.0


def _rotation_from_pose(yaw: float, pitch: float, roll: float) -> tuple[float, ...]:
    """Radians to Rx(-pitch) · Ry(yaw) · Rz(roll), row by row, written out."""
    cy, sy, cp, sp = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
    cr, sr = math.cos(roll), math.sin(roll)
    return (
        *(cy * cr, -cy * sr, sy),
        *(cp * sr - sp * sy * cr, cp * cr + sp * sy * sr, sp * cy),
        *(-sp * sr - cp * sy * cr, -sp * cr + cp * sy * sr, cp * cy),
    )


def _head(name: str, value: dict[str, Any]) -> Head:
    return Head(
        bbox=_box(name, value["bbox"]),
        rotation=_rotation(name, value["rotation"], value["pose"]),
        visible=_share(name, "visible", value["visible"]),
        weak=bool(value.get("weak", False)),
        confidence=_share(name, "confidence", value.get("confidence", 1.0)),
        subject=str(value.get("subject", "")),
    )


def _object(name: str, value: dict[str, Any]) -> Object:
    expression = str(value["expression"])
    if not expression.strip():
        raise RecordError(f"{name}: its expression is empty; name the thing, or leave the object out")
    return Object(expression, _box(name, value["bbox"]))


def _share(name: str, what: str, value: Any) -> float:
    if not 0.0 <= float(value) <= 1.0:
        raise RecordError(f"{name}: {what} {float(value)} is outside [0, 1]")
    return float(value)


def _box(name: str, value: Any) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = map(float, value)
    most, least = _LONGEST_SIDE_PX, _LEAST_SIDE_PX
    if -most <= x0 and x0 + least <= x1 <= most and -most <= y0 and y0 + least <= y1 <= most:
        return (x0, y0, x1, y1)
    if not (all(map(math.isfinite, (x0, y0, x1, y1))) and x0 < x1 and y0 < y1):
        raise RecordError(f"{name}: box {list(value)} needs x0 < x1 and y0 < y1, in pixels")
    raise RecordError(f"{name}: box {list(value)} is no box of an image, in pixels")


def _mirror(box: tuple[float, float, float, float], width: int) -> tuple[float, float, float, float]:
    return (width - box[2], box[1], width - box[0], box[3])


def _flipped(head: Head) -> tuple[float, ...] | None:
    return None if head.rotation is None else tuple(pose.flip_rotation(head.matrix).flat)


def _head_dict(head: Head) -> dict[str, Any]:
    rotation = None if head.rotation is None else _rounded(head.rotation, 7)
    return {
        "bbox": _rounded(head.bbox, 2),
        "rotation": rotation,
        "pose": rotation and _pose_dict(rotation),
        "visible": round(float(head.visible), 4),
        "weak": head.weak,
        "confidence": round(float(head.confidence), 4),
        "subject": head.subject,
    }


def _pose_dict(rotation: list[float]) -> dict[str, float]:
    """The pose of the rounded rotation, so that a record read and written again has the same bytes."""
    triple = pose.pose_from_rotation(np.reshape(rotation, (3, 3)))
    return dict(zip(_LIMITS_DEG, _rounded(pose.wrap_deg(np.round(triple, 4)), 4), strict=True))


def _rounded(values: Any, digits: int) -> list[float]:
    return [round(float(v), digits) + 0.0 for v in values]
