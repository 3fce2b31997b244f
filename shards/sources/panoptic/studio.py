"""Panoptic's own files: cameras, faces in the dome's world (cm), and frames of the HD cameras."""

import argparse
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.errors import UsageError, UserError
from shards import pose
from shards.record import Head
from shards.sources import face, files, posed
from shards.sources.face import OPENPOSE, Face, Lens, Placed
from shards.sources.panoptic import HD_CAMERAS, LONG_FACTOR, LONG_S, SPLITS, video
from shards.sources.panoptic.coco import LICENCE, NAME, subject_of_sequence

Array = NDArray[np.float64]

FRAMES_PER_S = 29.97
LOST = "image with a face that tells no pose"
SMALL = "image file too small (damaged)"
_HD_PANEL = 0
_HD_SIZE_PX = (1920, 1080)
_LEAST_SCORE, _LEAST_POINTS = 0.1, 7
_FACE_FILE = re.compile(r"faceRecon3D_hd(\d{8})\.json")


def from_sequences(options: argparse.Namespace) -> posed.PosedImages:
    """Frames of the split's sequences. Raises UserError."""
    for name, least in (("every", 1), ("least_image_kb", 0)):
        if getattr(options, name) < least:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} {getattr(options, name):g}: it must be {least} or more")
    # Not there where a source is made without a build.
    if options.video and getattr(options, "shuffle", None) is not None:
        raise UsageError(
            "--video with --shuffle: videos are read forwards only, so each image would cost all frames before it; "
            "extract hdImgs first by the toolbox's hdImgsExtractor.sh, or build without --shuffle"
        )
    cameras = sorted(set(options.cameras if options.cameras is not None else range(HD_CAMERAS)))
    if not set(cameras) <= set(range(HD_CAMERAS)):
        raise UsageError(f"--cameras {cameras}: the HD cameras are 0 to {HD_CAMERAS - 1}")
    chosen, left = choose_sequences(options.folder, options.split, options.sequences)
    reader = _Reader(face.reference(options.reference), cameras, options.every, options.least_image_kb, options.video)
    listed = [image for sequence in chosen for image in reader.read(options.folder / sequence)]
    scope = {
        "labels": "hdFace3d",
        "sequences": chosen,
        "sequences_left": left,
        "cameras": cameras,
        "every": options.every,
        "least_image_kb": None if options.video else options.least_image_kb,
        "frames": "hdVideos" if options.video else "hdImgs",
        "reference": options.reference.name if options.reference else "ours",
        "dropped": dict(+reader.dropped),
    }
    read = video.Frames() if options.video else posed.read_image
    return posed.PosedImages(NAME, LICENCE, options.split, scope, listed, read)


def choose_sequences(folder: Path, split: str, named: list[str] | None) -> tuple[list[str], list[str]]:
    """Names of the sequences to read, in order, and of those that are there and left. Raises UserError."""
    what = "the sequences of the Panoptic Toolbox, each a folder with calibration_SEQ.json, belong there"
    there = sorted(path.parent.name for path in files.existing(folder, what).glob("*/calibration_*.json"))
    if not there:
        raise UserError(f"{folder}: no SEQ/calibration_SEQ.json; {what}")
    absent = sorted(set(named or ()) - set(there))
    if absent:
        raise UserError(f"{folder}: no sequence {', '.join(absent)}, only {', '.join(there)}; see --sequences")
    chosen = [name for name in there if name in (named or SPLITS[split])]
    if not chosen:
        rest = f"the split is {', '.join(SPLITS[split])}; get one of them or name others by --sequences"
        raise UserError(f"{folder}: no sequence of {split}, only {', '.join(there)}; {rest}")
    return chosen, [name for name in there if name not in chosen]


@dataclass(frozen=True)
class HdCamera:
    """x_cam = rotation · x_world + shift (cm), then the lens; size: width and height of its images."""

    lens: Lens
    rotation: Array
    shift: Array
    size: tuple[int, int]


def read_calibration(path: Path) -> dict[int, HdCamera]:
    """The HD cameras of calibration_SEQ.json by number. Raises UserError."""
    value = files.read_json(path)
    try:
        return {int(c["node"]): _camera(c) for c in value["cameras"] if int(c["panel"]) == _HD_PANEL}
    except (KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not a calibration of Panoptic ({why}); download it again") from None


def _camera(value: Mapping[str, Any]) -> HdCamera:
    intrinsics, rotation = (np.array(value[name], dtype=float).reshape(3, 3) for name in ("K", "R"))
    if not pose.is_rotation(rotation):
        raise ValueError(f"R of camera {value['node']} is no rotation")
    k1, k2, p1, p2, k3 = (float(v) for v in value["distCoef"])
    width, height = (int(v) for v in value.get("resolution", _HD_SIZE_PX))
    shift = np.array(value["t"], dtype=float).reshape(3)
    return HdCamera(Lens(intrinsics, (k1, k2, p1, p2, k3)), rotation, shift, (width, height))


@dataclass
class _Reader:
    reference: Face
    cameras: list[int]
    every: int
    least_image_kb: float
    video: bool
    dropped: Counter[str] = field(default_factory=Counter)

    def read(self, folder: Path) -> Iterator[posed.Posed]:
        """Images of a sequence that have heads, by camera and frame."""
        calibration = read_calibration(folder / f"calibration_{folder.name}.json")
        frames = self._frames(folder / "hdFace3d")
        for number in (number for number in self.cameras if number in calibration):
            images = self._images(folder, number)
            # By frame, since a video can only be read forwards.
            for frame in sorted(frames.keys() & images.keys()):
                heads = self._heads(frames[frame], calibration[number], folder.name)
                if heads and self._is_whole(images[frame]):
                    name = f"{folder.name}/00_{number:02d}_{frame:08d}"
                    camera = calibration[number]
                    about = (camera.size, subject_of_sequence(folder.name), camera.lens.pinhole, heads)
                    yield posed.Posed(images[frame], name, *about, frame if self.video else None)

    def _frames(self, folder: Path) -> dict[int, list[tuple[str, Placed | None]]]:
        """Frame → its people: name, and where the head is in the world, or None where the landmarks do not tell."""
        files.existing(folder, "hdFace3d of the sequence (its hdFace3d.tar, unpacked) belongs there")
        matches = (_FACE_FILE.fullmatch(path.name) for path in folder.iterdir())
        there = {int(match[1]): folder / match[0] for match in matches if match}
        if not there:
            raise UserError(f"{folder}: no faceRecon3D_hd*.json in it; unpack hdFace3d.tar of the sequence")
        every = self.every * (LONG_FACTOR if max(there) > LONG_S * FRAMES_PER_S else 1)
        return {frame: read_faces(path, self.reference) for frame, path in sorted(there.items()) if frame % every == 0}

    def _images(self, folder: Path, number: int) -> Mapping[int, Path]:
        if self.video:
            videos = files.existing(folder / "hdVideos", "the HD videos of the sequence belong there")
            return video.frames_of(videos / f"hd_{_HD_PANEL:02d}_{number:02d}.mp4")
        rest = "extract them by the toolbox's hdImgsExtractor.sh, or take hdVideos by --video"
        images = files.existing(folder / "hdImgs", f"images of the HD cameras belong there; {rest}")
        camera = images / f"{_HD_PANEL:02d}_{number:02d}"
        pattern = re.compile(rf"{camera.name}_(\d{{8}})\.(jpg|png)")
        matches = (pattern.fullmatch(path.name) for path in camera.iterdir()) if camera.is_dir() else ()
        return {int(match[1]): camera / match[0] for match in matches if match}

    def _heads(self, people: list[tuple[str, Placed | None]], camera: HdCamera, sequence: str) -> tuple[Head, ...]:
        """The heads in view; none where a face is lost, since a head without a label must not be in the image."""
        heads, reasons = [], []
        for name, placed in people:
            seen = (
                face.label(placed, camera.rotation, camera.shift, camera.lens, camera.size) if placed else face.ROLLED
            )
            if isinstance(seen, str):
                reasons.append(seen)
            else:
                matrix, box = seen
                subject = f"{subject_of_sequence(sequence)}/{name}"
                heads.append(Head(box, tuple(matrix.ravel().tolist()), subject=subject))
        if face.ROLLED in reasons:
            self.dropped[LOST] += 1
            return ()
        self.dropped.update(reasons)
        self.dropped[posed.NO_HEAD] += not heads
        return tuple(heads)

    def _is_whole(self, path: Path) -> bool:
        if self.video or path.stat().st_size >= self.least_image_kb * 1024:
            return True
        self.dropped[SMALL] += 1
        return False


def read_faces(path: Path, reference: Face) -> list[tuple[str, Placed | None]]:
    """Number and head of each person in a faceRecon3D file; None for a face that tells no pose. Raises UserError."""
    value = files.read_json(path)
    try:
        return [(str(person["id"]), _placed(person["face70"], reference)) for person in value["people"]]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not a face file of Panoptic ({why}); unpack it again") from None


def _placed(known: Mapping[str, Any], reference: Face) -> Placed | None:
    points = np.array(known["landmarks"], dtype=float).reshape(-1, 3)[list(OPENPOSE)]
    scores = np.array(known["averageScore"], dtype=float)[list(OPENPOSE)]
    used = tuple(np.flatnonzero(scores > _LEAST_SCORE).tolist())
    return face.lay(reference, points[list(used)], used) if len(used) >= _LEAST_POINTS else None
