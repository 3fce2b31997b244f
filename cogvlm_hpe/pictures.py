"""Pictures from wherever a user has them: image files, folders of them, and the frames of videos."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from launcher.errors import UserError
from shards.pixels import check_mode

VIDEOS = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"})
IMAGES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"})
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF's orientation. Pillow's exif_transpose writes all tags anew, and fails on one of a wrong type."""


@dataclass(frozen=True)
class Picture:
    """(H, W, 3) uint8 RGB of an image file, or of one frame of a video; frames count from 0."""

    path: Path
    pixels: np.ndarray
    frame: int | None = None


def find(paths: Sequence[Path]) -> list[Path]:
    """Files, with folders replaced by the images and videos right in them, by name. Raises UserError."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES | VIDEOS and p.is_file())
            if not inside:
                raise UserError(f"{path}: no image and no video in this folder; name one that holds some")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file")
    return found


def names(paths: Sequence[Path]) -> dict[Path, str]:
    """For each file a name that no other has: its stem, or as much of its path's end as tells them apart."""
    stems = {path: path.stem for path in paths}
    if len(set(stems.values())) == len(stems):
        return stems
    for depth in range(1, 1 + max(len(path.absolute().parts) for path in paths)):
        ends = {path: "-".join(path.absolute().parts[-depth:]).strip("/-") for path in paths}
        if len(set(ends.values())) == len(ends):
            break
    return ends


def read(path: Path, every: int = 1) -> Iterator[Picture]:
    """The picture of an image file, or every `every`-th frame of a video. Raises UserError."""
    if path.suffix.lower() in VIDEOS:
        yield from _frames(path, every)
    else:
        yield Picture(path, read_image(path))


def count(path: Path, every: int = 1) -> int:
    """How many pictures `read` gives; for a video what its header says. Raises UserError."""
    if path.suffix.lower() not in VIDEOS:
        return 1
    cv2 = _cv2(path)
    return max(1, -(-int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)) // every))


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB. Raises UserError where there is no image."""
    try:
        with Image.open(path) as image:
            check_mode(image.mode)
            # As every viewer shows it and so as boxes are read off it.
            turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
            return np.array((image if turn is None else image.transpose(turn)).convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # noqa: BLE001 - damaged bytes and tags make Pillow raise struct.error and many more
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not an image that can be read ({reason})") from None


def _frames(path: Path, every: int) -> Iterator[Picture]:
    capture = _cv2(path).VideoCapture(str(path))
    number = 0
    try:
        while capture.grab():
            if number % every == 0:
                readable, frame = capture.retrieve()
                if readable:
                    yield Picture(path, np.ascontiguousarray(frame[..., ::-1]), number)
            number += 1
    finally:
        capture.release()
    if not number:
        raise UserError(f"{path}: not a video that can be read")


def _cv2(path: Path):  # type: ignore[no-untyped-def]
    try:
        import cv2
    except ImportError:
        how = '.venv/bin/pip install -c constraints.txt -e ".[video]"'
        raise UserError(f"{path}: videos need OpenCV; {how}") from None
    return cv2
