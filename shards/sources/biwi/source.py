"""BIWI's frames: the file's matrix is our rotation already; the box is a sphere seen by the RGB camera."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from launcher.errors import UsageError, UserError
from shards import pose
from shards.record import Camera, Head, Image, Record
from shards.sources import files
from shards.sources.biwi import HEAD_RADIUS_MM
from shards.sources.files import Box
from shards.write import Sample

# Person of each sequence, as the data set's card on Hugging Face gives it: four people were recorded twice.
PEOPLE = {
    **{f"{k:02d}": f"F{k:02d}" for k in range(1, 7)},
    **{f"{k:02d}": f"M{k - 6:02d}" for k in range(7, 15)},
    **{"15": "F03", "16": "M09", "17": "M10", "18": "F05", "19": "M11"},
    **{"20": "M12", "21": "F02", "22": "M01", "23": "M13", "24": "M14"},
}
_TRAIN_SEQUENCES = 16
_LEAST_BOX_PX = 8.0


@dataclass(frozen=True)
class RgbCamera:
    """rgb.cal: intrinsics K (3, 3) in pixels, and where the depth camera's axes lie: x_rgb = rotation · x + offset_mm.

    Its distortion is left out: all zeros in the data set.
    """

    intrinsics: np.ndarray
    rotation: np.ndarray
    offset_mm: np.ndarray
    size: tuple[int, int]

    def box_of_sphere(self, centre_mm: np.ndarray, radius_mm: float) -> Box | None:
        """Bounds of the picture of a sphere (centre in depth axes), exact; None where it reaches behind the camera."""
        centre = self.rotation @ centre_mm + self.offset_mm
        bounds = []
        for axis in (0, 1):
            # In the plane of this axis and depth, two rays touch the circle.
            distance = math.hypot(centre[axis], centre[2])
            if centre[2] <= radius_mm or distance <= radius_mm:
                return None
            middle, half = math.atan2(centre[axis], centre[2]), math.asin(radius_mm / distance)
            if abs(middle) + half >= math.pi / 2:
                return None
            focal, offset = self.intrinsics[axis, axis], self.intrinsics[axis, 2]
            bounds.append([float(focal * math.tan(middle + side * half) + offset) for side in (-1, 1)])
        (x0, x1), (y0, y1) = bounds
        return (x0, y0, x1, y1)

    @property
    def pinhole(self) -> Camera:
        """The record's camera."""
        k = self.intrinsics.tolist()
        return Camera(k[0][0], k[1][1], k[0][2], k[1][2])


class _Frame(NamedTuple):
    path: Path
    rotation: tuple[float, ...]
    box: Box


class Biwi:
    """Frames of the sequences that a protocol puts into a split, one head each."""

    name = "biwi"
    licence = "BIWI Kinect: non-commercial use such as university research and education"

    def __init__(
        self,
        folder: Path,
        protocol: str = "all",
        split: str = "test",
        seed: int = 0,
        rgb_axes: bool = False,
        head_radius_mm: float = HEAD_RADIUS_MM,
    ) -> None:
        """Reads all poses. Raises UserError where a sequence, camera, pose or image is missing or broken."""
        if not head_radius_mm > 0:
            raise UsageError(f"--head-radius-mm {head_radius_mm:g}: it must be more than 0")
        found = sorted(path.name for path in folder.glob("[0-9][0-9]") if path.is_dir())
        if not found:
            raise UserError(f"{folder}: no folders 01, 02, …; name hpdb of kinect_head_pose_db.tgz, which holds them")
        self.split = split
        self._rgb_axes, self._radius_mm = rgb_axes, head_radius_mm
        self._cameras: dict[str, RgbCamera] = {}
        dropped: Counter[str] = Counter()
        sequences = [
            name for name in found if protocol == "all" or (name in train_sequences(seed)) == (split == "train")
        ]
        self._frames = [frame for name in sequences for frame in self._read(folder / name, dropped)]
        self.scope: Mapping[str, Any] = {
            "protocol": protocol,
            "seed": seed,
            "sequences": sequences,
            "axes": "rgb" if rgb_axes else "depth",
            "head_radius_mm": head_radius_mm,
            "dropped": dict(dropped),
        }

    def __len__(self) -> int:
        return len(self._frames)

    def sample(self, i: int) -> Sample:
        """Frame i. Raises UserError where its image has gone."""
        frame = self._frames[i]
        sequence = frame.path.parent.name
        data, extension = files.image_bytes(frame.path)
        name = f"{sequence}/{frame.path.stem.removesuffix('_rgb')}"
        camera, subject = self._cameras[sequence], f"biwi/{PEOPLE.get(sequence, sequence)}"
        head = Head(frame.box, frame.rotation, subject=subject)
        image = Image(*camera.size, source=self.name, id=name, subject=subject, camera=camera.pinhole)
        return Sample(files.key_of(name), data, extension, Record(image, [head]))

    def _read(self, folder: Path, dropped: Counter[str]) -> Iterator[_Frame]:
        camera = self._cameras[folder.name] = read_camera(folder / "rgb.cal")
        for path in sorted(folder.glob("frame_*_pose.txt")):
            rotation, centre_mm = read_pose(path)
            image = path.with_name(path.name.replace("_pose.txt", "_rgb.png"))
            if not image.exists() and image.with_suffix(".jpg").exists():
                image = image.with_suffix(".jpg")  # some public copies are JPEG
            if files.image_size(image) != camera.size:
                size = "{}x{}".format(*camera.size)
                raise UserError(f"{image}: not {size} as rgb.cal says; use the images of the official archive")
            bounds = camera.box_of_sphere(centre_mm, self._radius_mm)
            box = bounds and files.clip_box(bounds, *camera.size, _LEAST_BOX_PX)
            if box is None:
                dropped["head outside the image"] += 1
                continue
            matrix = camera.rotation @ rotation if self._rgb_axes else rotation
            yield _Frame(image, tuple(matrix.ravel().tolist()), box)


def train_sequences(seed: int) -> set[str]:
    """The 16 of the 24 sequences that the 70-30 protocol trains on; both sequences of a person or none.

    Published work drew its splits by chance and by sequence, and did not keep them.
    """
    people = sorted(set(PEOPLE.values()), key=lambda person: hashlib.sha256(f"{seed}/{person}".encode()).digest())
    chosen: set[str] = set()
    for person in people:
        own = {sequence for sequence, who in PEOPLE.items() if who == person}
        if len(chosen) + len(own) <= _TRAIN_SEQUENCES:
            chosen |= own
    return chosen


def read_pose(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(3, 3) our M, in the depth camera's axes, and (3,) head centre in mm, from a pose.txt. Raises UserError."""
    numbers = _numbers(path, least=12)
    rotation = numbers[:9].reshape(3, 3)
    if not pose.is_rotation(rotation):
        raise UserError(f"{path}: its first 9 numbers are no rotation matrix; extract the file again")
    return rotation, numbers[9:12]


def read_camera(path: Path) -> RgbCamera:
    """A .cal file: intrinsics, distortion, rotation, translation and image size. Raises UserError."""
    numbers = _numbers(path, least=23)
    rotation = numbers[-14:-5].reshape(3, 3)
    if not pose.is_rotation(rotation):
        raise UserError(f"{path}: its last rows do not start with a rotation matrix; extract the file again")
    width, height = numbers[-2:].astype(int).tolist()
    return RgbCamera(numbers[:9].reshape(3, 3), rotation, numbers[-5:-2], (width, height))


def _numbers(path: Path, least: int) -> np.ndarray:
    files.existing(path, "this file of kinect_head_pose_db.tgz belongs there")
    try:
        numbers = np.array(path.read_text(encoding="utf-8").split(), dtype=float)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: does not hold numbers ({error}); extract the file again") from None
    if len(numbers) < least or not np.isfinite(numbers).all():
        raise UserError(f"{path}: {len(numbers)} numbers, at least {least} are needed; extract the file again")
    return numbers
