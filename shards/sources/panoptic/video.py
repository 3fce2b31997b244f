"""Frames of a video, by opencv: an extra, since most users have images."""

from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from launcher.errors import UserError
from shards.sources import files
from shards.sources.posed import Posed

_JPEG_QUALITY = 95


def frames_of(path: Path) -> dict[int, Path]:
    """Number of every frame that the file says it has → the file; none where there is no such file."""
    if not path.exists():
        return {}
    capture = _open(path)
    count = int(capture.get(_cv2().CAP_PROP_FRAME_COUNT))
    capture.release()
    return dict.fromkeys(range(count), path)


class Frames:
    """Reads frames as JPEG. One video is kept open, and read on from where it stands.

    Jumping within a video lands on another frame in some files: every frame is counted from the first one.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._capture: Any = None
        self._next = 0

    def __call__(self, image: Posed) -> tuple[bytes, Literal["jpg"]]:
        """The frame of an image. Raises UserError where the video is damaged or of another size."""
        import simplejpeg

        assert image.frame is not None
        if self._path != image.path or self._next > image.frame:
            self._path, self._capture, self._next = image.path, _open(image.path), 0
        while self._next < image.frame and self._capture.grab():
            self._next += 1
        good: bool
        pixels: Any
        good, pixels = self._capture.read() if self._next == image.frame else (False, None)
        if not good:
            raise UserError(f"{image.path}: frame {image.frame} cannot be read; download the video again")
        self._next += 1
        height, width = pixels.shape[:2]
        if (width, height) != image.size:
            wanted = "{}x{}".format(*image.size)
            raise UserError(f"{image.path}: {width}x{height}, not {wanted} as calibrated; take the official video")
        return simplejpeg.encode_jpeg(pixels, quality=_JPEG_QUALITY, colorspace="BGR", colorsubsampling="420"), "jpg"


def _open(path: Path) -> Any:
    capture = _cv2().VideoCapture(str(files.existing(path, "the HD video of the sequence belongs there")))
    if not capture.isOpened():
        raise UserError(f"{path}: no readable video; download it again")
    return capture


def _cv2() -> ModuleType:
    try:
        import cv2
    except ImportError:
        how = 'install it by .venv/bin/pip install -c constraints.txt -e ".[video]"'
        rest = "or extract hdImgs by the toolbox's hdImgsExtractor.sh"
        raise UserError(f"--video: opencv is not there; {how}, {rest}") from None
    return cv2
