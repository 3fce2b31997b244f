"""Faces with landmarks and a fitted pose, read from MATLAB files beside their images."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from launcher.errors import UserError
from shards import pose
from shards.record import Head, Image, Record
from shards.sources import files
from shards.sources.files import Box, Part
from shards.sources.w300lp import MAX_ANGLE_DEG, SUBSETS
from shards.write import Sample

_LEAST_BOX_PX = 8.0
_FIELDS = ("Pose_Para", "pt2d", "pt3d_68")
# AFW_134212_1_2: photo 134212, its first face, third view. LFPW names no face.
_PHOTO = re.compile(r"(AFW_\d+|HELEN_\d+|IBUG_image_\d+|LFPW_image_(?:train|test)_\d+)_")


@dataclass(frozen=True)
class Crop:
    """How far a box reaches beyond the landmarks: `k` times a factor of its width or height.

    The factors and their order are those of Hopenet's and 6DRepNet's loaders (`datasets.py`): left and top first, then
    right and bottom by the sides as already enlarged. Neither data set says where the head ends.
    """

    k: float
    side: float
    top: float
    bottom: float

    def box(self, points: np.ndarray) -> Box:
        """(2, n) landmarks in pixels to a box, which may reach outside the image."""
        (x0, y0), (x1, y1) = points.min(axis=1).tolist(), points.max(axis=1).tolist()
        x0 -= self.side * self.k * (x1 - x0)
        y0 -= self.top * self.k * (y1 - y0)
        x1 += self.side * self.k * (x1 - x0)
        y1 += self.bottom * self.k * (y1 - y0)
        return (x0, y0, x1, y1)


# 300W-LP's loader draws k between 0.2 and 0.4 for each training image; here it is the middle.
CROPS = {"300w-lp": Crop(0.3, 0.6, 2.0, 0.6), "aflw2000": Crop(0.2, 2.0, 2.0, 0.6)}


class _Face(NamedTuple):
    name: str
    size: tuple[int, int]
    pose_deg: tuple[float, float, float]
    box: Box


class Faces:
    """Images `name`.jpg below `folder`, one head each."""

    def __init__(
        self, name: str, licence: str, folder: Path, split: str, faces: Sequence[_Face], scope: Mapping[str, Any]
    ) -> None:
        self.name, self.licence, self.split, self.scope = name, licence, split, scope
        self._folder, self._faces = folder, faces

    def __len__(self) -> int:
        return len(self._faces)

    def sample(self, i: int) -> Sample:
        """Face i. Raises UserError where its image has gone."""
        face = self._faces[i]
        data, extension = files.image_bytes(self._folder / f"{face.name}.jpg")
        subject = f"{self.name}/{photo(face.name)}"
        rotation = pose.rotation_from_pose(*face.pose_deg)
        head = Head(face.box, tuple(rotation.flat), subject=subject)
        image = Image(*face.size, source=self.name, id=face.name, subject=subject)
        return Sample(files.key_of(face.name), data, extension, Record(image, [head]))


def w300lp(
    folder: Path,
    part: Part,
    subsets: Sequence[str] = SUBSETS,
    flips: bool = True,
    max_angle_deg: float = MAX_ANGLE_DEG,
    crop: str = "300w-lp",
) -> Faces:
    """300W-LP below `folder` (AFW, AFW_Flip, HELEN, …). Raises UserError where a folder or file is missing or broken.

    A photo, all the views made of it and their mirror images are one subject.
    """
    belongs = "here belongs a folder of 300W_LP.zip; name the folder that holds AFW, or fewer --subsets"
    names: list[str] = []
    for subset in [s + end for s in subsets for end in ("", "_Flip")[: 1 + flips]]:
        files.existing(folder / subset, belongs)
        names += [f"{subset}/{path.stem}" for path in sorted((folder / subset).glob("*.mat"))]
    dropped: Counter[str] = Counter()
    faces = list(_read(folder, names, "300w-lp", part, max_angle_deg, CROPS[crop], dropped))
    scope = part.scope | {"subsets": list(subsets), "flips": flips}
    scope |= {"max_angle_deg": max_angle_deg, "crop": crop, "dropped": dict(sorted(dropped.items()))}
    licence = "300W-LP: for research only; photos belong to their owners"
    return Faces("300w-lp", licence, folder, part.split, faces, scope)


def aflw2000(folder: Path, part: Part, max_angle_deg: float = MAX_ANGLE_DEG, crop: str = "aflw2000") -> Faces:
    """AFLW2000-3D in `folder` (image00002.jpg, image00002.mat, …). Raises UserError as `w300lp` does."""
    names = [path.stem for path in sorted(folder.glob("image*.mat"))]
    if not names:
        raise UserError(f"{folder}: no image*.mat; name the folder AFLW2000 of AFLW2000-3D.zip, which holds them")
    dropped: Counter[str] = Counter()
    faces = list(_read(folder, names, "aflw2000", part, max_angle_deg, CROPS[crop], dropped))
    scope = part.scope | {"max_angle_deg": max_angle_deg, "crop": crop, "dropped": dict(sorted(dropped.items()))}
    licence = "AFLW2000-3D: for research only; photos belong to their owners"
    return Faces("aflw2000", licence, folder, part.split, faces, scope)


def photo(name: str) -> str:
    """The photo that an image was made of, whatever its face, view and mirroring: AFW_Flip/AFW_1_2_3 → AFW_1."""
    stem = name.rpartition("/")[2]
    known = _PHOTO.match(stem)
    return known.group(1) if known else stem


def _read(
    folder: Path,
    names: Iterable[str],
    source: str,
    part: Part,
    max_angle_deg: float,
    crop: Crop,
    dropped: Counter[str],
) -> Iterable[_Face]:
    for name in names:
        if not part.holds(f"{source}/{photo(name)}"):
            continue
        path = folder / f"{name}.mat"
        fields = _load(path)
        pitch, yaw, roll = np.degrees(_numbers(path, fields, "Pose_Para").ravel()[:3]).tolist()
        if not max(abs(yaw), abs(pitch), abs(roll)) <= max_angle_deg:
            dropped[f"an angle beyond {max_angle_deg:g} deg"] += 1
            continue
        width, height = files.image_size(path.with_suffix(".jpg"))
        points = _landmarks(path, fields)
        box = files.clip_box(crop.box(points), width, height, _LEAST_BOX_PX) if points.shape[1] > 1 else None
        if box is None:
            dropped[f"landmarks span less than {_LEAST_BOX_PX:g} px of the image"] += 1
            continue
        yield _Face(name, (width, height), (yaw, pitch, roll), box)


def _load(path: Path) -> dict[str, Any]:
    from scipy.io import loadmat

    try:
        return dict(loadmat(path, variable_names=_FIELDS))
    except Exception as error:  # scipy's reader fails in many ways on broken files
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path}: not a readable MATLAB file ({why}); download it again") from None


def _numbers(path: Path, fields: Mapping[str, Any], field: str) -> np.ndarray:
    values = np.asarray(fields.get(field, np.empty(0)))
    if values.dtype.kind not in "fiu" or values.size < 3 or not np.isfinite(values).all():
        raise UserError(f"{path}: its field {field} does not hold numbers; download the data set again")
    return values.astype(float)


def _landmarks(path: Path, fields: Mapping[str, Any]) -> np.ndarray:
    """(2, n) points in pixels. Points that are not visible are -1 in AFLW2000's pt2d, but are all in its pt3d_68."""
    points = _numbers(path, fields, "pt3d_68" if "pt3d_68" in fields else "pt2d")
    if points.ndim != 2 or len(points) < 2:
        raise UserError(f"{path}: landmarks of shape {points.shape}, not 2 x n or 3 x n; download the data set again")
    points = points[:2]
    return points[:, (points != -1).all(axis=0)]
