"""AGORA's own tables: one row an image, lists of people in its cells, 127 SMPL-X joints each."""

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.errors import UsageError, UserError
from shards.record import Camera, Head
from shards.sources import face, files, posed
from shards.sources.agora import scenes
from shards.sources.agora.coco import LICENCE, NAME, subject_of_sequence
from shards.sources.face import Face, Lens
from shards.sources.unpickle import read_frame

Array = NDArray[np.float64]

JOINTS = 127
_RESIZED = "_1280x720"
_PER_PERSON = ("occlusion", "Yaw", "X", "Y", "Z", "gt_path_smplx", "gt_joints_3d", "cam_j3d", "camR", "camT")
_ROW = ("camX", "camY", "camZ", "camYaw")


def from_tables(options: argparse.Namespace) -> posed.PosedImages:
    """Every image of the split's tables. Raises UserError."""
    if not 0 < options.max_occlusion <= 100:
        raise UsageError(f"--max-occlusion {options.max_occlusion:g}: a percentage above 0 and up to 100")
    tables = find_tables(options.cams or options.folder / "Cam", options.split)
    images = _Images(options.images or options.folder / "images")
    reader = _Reader(face.reference(options.reference), options.max_occlusion, images, Counter())
    listed = [image for path in tables for image in reader.read(path)]
    kept = posed.with_heads(listed, reader.dropped)
    missing = [image for image in kept if image.path.name not in images]
    if missing and not options.allow_missing:
        text = f"{len(missing)} of {len(kept)} images of the tables are not there, as {missing[0].id}.png"
        raise UserError(f"{images.folder}: {text}; complete the download, or leave them out by --allow-missing")
    reader.dropped["image not there"] += len(missing)
    scope = {
        "labels": "smplx",
        "tables": [path.name for path in tables],
        "reference": options.reference.name if options.reference else "ours",
        "max_occlusion_percent": options.max_occlusion,
        "dropped": dict(+reader.dropped),
    }
    found = [image for image in kept if image.path.name in images]
    return posed.PosedImages(NAME, LICENCE, options.split, scope, found)


def find_tables(folder: Path, split: str) -> list[Path]:
    """The split's pickles, in the order of their names; of X.pkl and X_withjv.pkl only the latter. Raises UserError."""
    what = "the Camera tables with SMPL-X joints (train_0_withjv.pkl and so on) belong there, or name them by --cams"
    files.existing(folder, what)
    found = {path.stem: path for path in folder.rglob(f"{split}_*.pkl")}
    if not found:
        raise UserError(f"{folder}: no {split}_*.pkl; {what}")
    return [path for stem, path in sorted(found.items()) if f"{stem}_withjv" not in found]


class _Images:
    """Files under a folder by name: train images come in ten archives, some users keep ten folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = files.existing(folder, "AGORA's images of 1280x720 or 3840x2160 belong there; or use --images")
        self._paths = {path.name: path for path in sorted(folder.rglob("*.png"))}
        if not self._paths:
            raise UserError(f"{folder}: no .png in it or below; AGORA's images of 1280x720 or 3840x2160 belong there")
        # AGORA's images are all of one size; a sample of another size is refused when it is read.
        self.size = files.image_size(next(iter(self._paths.values())))

    def __contains__(self, name: str) -> bool:
        return name in self._paths

    def find(self, stem: str) -> Path:
        """The file of the image, small or large; where it is not there, its name."""
        names = (f"{stem}{_RESIZED}.png", f"{stem}.png")
        return next((self._paths[name] for name in names if name in self._paths), self.folder / names[0])


@dataclass
class _Reader:
    reference: Face
    max_occlusion_percent: float
    images: _Images
    dropped: Counter[str]

    def read(self, path: Path) -> Iterator[posed.Posed]:
        """The images of a table, with the heads that are kept."""
        table = read_frame(path)
        if not {"gt_joints_3d", "cam_j3d"} & set(table.names):
            rule = "take the tables with SMPL-X joints, or run agora_evaluation's project_joints with --modeltype SMPLX"
            raise UserError(f"{path}: no joints (column gt_joints_3d or cam_j3d); {rule}")
        columns = {name: table.column(name) for name in ("imgPath", *_PER_PERSON, *_ROW) if name in table.names}
        for i in range(table.rows):
            row = {name: values[i] for name, values in columns.items()}
            try:
                yield self._image(row)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                raise UserError(f"{path}, row {i}: not as AGORA's tables are ({why}); download it again") from None

    def _image(self, row: Mapping[str, Any]) -> posed.Posed:
        name = Path(str(row["imgPath"])).name
        stem = name.removesuffix(".png").removesuffix(_RESIZED)
        camera = scenes.camera_of(stem, self.images.size)
        heads = []
        for person in _people(row):
            head = self._head(stem, row, person, camera)
            if isinstance(head, str):
                self.dropped[head] += 1
            else:
                heads.append(head)
        subject = subject_of_sequence(stem.rpartition("_")[0])
        return posed.Posed(self.images.find(stem), stem, self.images.size, subject, camera, tuple(heads))

    def _head(self, stem: str, row: Mapping[str, Any], person: Mapping[str, Any], camera: Camera) -> Head | str:
        occlusion_percent = float(person["occlusion"])
        if not occlusion_percent < self.max_occlusion_percent:
            return "occluded"
        placed = face.lay(self.reference, _joints(stem, row, person)[list(face.SMPLX)])
        if placed is None:
            return "landmarks without a pose"
        lens = Lens(np.array([[camera.fx, 0, camera.cx], [0, camera.fy, camera.cy], [0, 0, 1]]))
        seen = face.label(placed, np.eye(3), np.zeros(3), lens, self.images.size)
        if isinstance(seen, str):
            return seen
        matrix, box = seen
        scan = str(person.get("gt_path_smplx", "")).removesuffix(".obj")
        visible = 1 - max(0.0, occlusion_percent) / 100
        return Head(box, tuple(matrix.ravel().tolist()), visible, subject=f"agora/{scan}" if scan else "")


def _people(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One dictionary a person. (In an image without people the joints are an empty string, not an empty list.)"""
    names = [name for name in _PER_PERSON if name in row]
    for k in range(len(row["occlusion"])):
        yield {name: row[name][k] for name in names}


def _joints(stem: str, row: Mapping[str, Any], person: Mapping[str, Any]) -> Array:
    """(127, 3) in camera axes, m. DirectMHP's cam_j3d goes there by camR and camT, or by what is known of the scene."""
    points = np.asarray(person["gt_joints_3d" if "gt_joints_3d" in person else "cam_j3d"], dtype=float)
    if points.shape != (JOINTS, 3):
        raise ValueError(f"joints of shape {points.shape}, SMPL-X has ({JOINTS}, 3)")
    if "gt_joints_3d" in person:
        return points
    if "camR" in person and "camT" in person:
        rotation = np.asarray(person["camR"], dtype=float).reshape(3, 3)
        shift = np.asarray(person["camT"], dtype=float).reshape(3)
    else:
        position_cm = (float(person["X"]), float(person["Y"]), float(person["Z"]))
        rotation, shift = scenes.person_to_camera(scenes.scene_of(stem, row), float(person["Yaw"]), position_cm)
    return points @ rotation.T + shift
