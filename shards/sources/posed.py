"""What AGORA and Panoptic share: images with the heads found for them, and the COCO-style JSON that DirectMHP made."""

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from launcher.errors import UserError
from shards import pose
from shards.record import Camera, Head, Image, Record
from shards.sources import files
from shards.write import Sample

NO_HEAD = "image without a head left"
_LEAST_PX = 1.0


class Posed(NamedTuple):
    """One image and its labels. `frame` is the number of a video's frame, where `path` is a video."""

    path: Path
    id: str
    size: tuple[int, int]
    subject: str
    camera: Camera | None
    heads: tuple[Head, ...]
    frame: int | None = None


def read_image(image: Posed) -> tuple[bytes, Literal["jpg", "png"]]:
    """Bytes of the file, once its size is what the labels were made for. Raises UserError."""
    size = files.image_size(image.path)
    if size != image.size:
        there, wanted = ("{}x{}".format(*pixels) for pixels in (size, image.size))
        raise UserError(
            f"{image.path}: {there}, but its labels are for {wanted} pixels; take the images they belong to"
        )
    return files.image_bytes(image.path)


@dataclass
class PosedImages:
    """A source of images whose labels have been read already.

    read: bytes and extension of an image; by default its file as it is.
    """

    name: str
    licence: str
    split: str
    scope: Mapping[str, Any]
    images: list[Posed]
    read: Callable[[Posed], tuple[bytes, Literal["jpg", "png"]]] = field(default=read_image)

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, i: int) -> Sample:
        """Image i. Raises UserError where it has gone or is not the one that was labelled."""
        image = self.images[i]
        data, extension = self.read(image)
        about = Image(*image.size, source=self.name, id=image.id, subject=image.subject, camera=image.camera)
        return Sample(files.key_of(image.id), data, extension, Record(about, list(image.heads)))


def one_of(folder: Path, pattern: str, what: str, option: str) -> Path:
    """The one file in `folder` of this pattern. Raises UserError where there is none or a choice."""
    found = sorted(folder.glob(pattern))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{folder / pattern}: no such file; {what} belongs there, or name it by {option}")
    raise UserError(f"{folder / pattern}: {', '.join(path.name for path in found)}; choose one by {option}")


def read_coco(
    annotations: Path,
    images: Path,
    subject_of: Callable[[Path, dict[str, Any]], str],
    camera_of: Callable[[dict[str, Any]], Camera | None],
    allow_missing: bool,
) -> tuple[list[Posed], Counter[str]]:
    """Images and heads of DirectMHP's JSON, in the order of the file, and what was left out, by reason.

    Raises UserError where the JSON is of another kind, or an image is missing (unless allowed: then it is left out).
    """
    value = files.read_json(annotations, _without_landmarks)
    dropped: Counter[str] = Counter()
    try:
        heads = _heads(value["annotations"], dropped)
        listed = [
            Posed(
                _inside(images, image["file_name"]),
                Path(image["file_name"]).stem,
                (int(image["width"]), int(image["height"])),
                subject_of(annotations, image),
                camera_of(image),
                _clipped(heads.get(image["id"], []), (int(image["width"]), int(image["height"])), dropped),
            )
            for image in value["images"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{annotations}: not DirectMHP's COCO-style JSON ({why}); make it by its scripts") from None
    files.existing(images, "the images that the labels name belong there, or name their folder by --images")
    return keep_present(with_heads(listed, dropped), dropped, allow_missing), +dropped


def from_coco(
    options: argparse.Namespace,
    name: str,
    licence: str,
    pattern: str,
    subject_of: Callable[[Path, dict[str, Any]], str],
    camera_of: Callable[[dict[str, Any]], Camera | None],
) -> PosedImages:
    """All images of a data set's JSON by DirectMHP, named by its options or of this pattern. Raises UserError."""
    annotations = options.annotations or one_of(
        options.folder / "annotations", pattern, "DirectMHP's JSON of this split", "--annotations"
    )
    images = options.images or options.folder / "images" / options.split
    found, dropped = read_coco(annotations, images, subject_of, camera_of, options.allow_missing)
    scope = {"labels": "directmhp", "annotations": annotations.name, "dropped": dict(dropped)}
    return PosedImages(name, licence, options.split, scope, found)


def with_heads(images: Iterable[Posed], dropped: Counter[str]) -> list[Posed]:
    """Those that have a head; the others are counted."""
    listed = list(images)
    kept = [image for image in listed if image.heads]
    dropped[NO_HEAD] += len(listed) - len(kept)
    return kept


def keep_present(images: list[Posed], dropped: Counter[str], allow_missing: bool) -> list[Posed]:
    """Those whose file is there; the others are counted if that is allowed. Raises UserError otherwise."""
    folders = {image.path.parent for image in images}
    present = {path for folder in folders if folder.is_dir() for path in folder.iterdir()}
    missing = [image for image in images if image.path not in present]
    if missing and not allow_missing:
        rest = "complete the download, or leave them out by --allow-missing"
        raise UserError(
            f"{missing[0].path}: not there, nor are {len(missing) - 1} more of {len(images)} images; {rest}"
        )
    dropped["image not there"] += len(missing)
    return [image for image in images if image.path in present]


def _without_landmarks(value: dict[str, Any]) -> dict[str, Any]:
    # Nine tenths of the file, and not needed.
    value.pop("face2d_pts", None)
    return value


def _inside(folder: Path, name: str) -> Path:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"file_name {name!r} leaves the folder of images")
    return folder / name


def _heads(annotations: list[dict[str, Any]], dropped: Counter[str]) -> dict[Any, list[Head]]:
    """By image; boxes are x, y, width, height there, and angles in the order pitch, yaw, roll."""
    boxes = np.array([a.get("bbox") or a["head_bbox"] for a in annotations], dtype=float).reshape(-1, 4)
    pitch_deg, yaw_deg, roll_deg = np.array([a["euler_angles"] for a in annotations], dtype=float).reshape(-1, 3).T
    rotations = pose.rotation_from_pose(yaw_deg, pitch_deg, roll_deg)
    boxes[:, 2:] += boxes[:, :2]
    good = (boxes[:, 2:] > boxes[:, :2]).all(1) & pose.is_rotation(rotations)
    heads: dict[Any, list[Head]] = {}
    for k in np.flatnonzero(good):
        x0, y0, x1, y1 = boxes[k].tolist()
        head = Head((x0, y0, x1, y1), tuple(rotations[k].ravel().tolist()))
        heads.setdefault(annotations[k]["image_id"], []).append(head)
    dropped["box or angles that are none"] += int((~good).sum())
    return heads


def _clipped(heads: list[Head], size: tuple[int, int], dropped: Counter[str]) -> tuple[Head, ...]:
    boxes = [files.clip_box(head.bbox, *size, least_px=_LEAST_PX) for head in heads]
    dropped["outside the image"] += boxes.count(None)
    return tuple(replace(head, bbox=box) for head, box in zip(heads, boxes, strict=True) if box)
