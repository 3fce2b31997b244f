"""The images of a table, each with all its lines."""

import sys
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from launcher.errors import UsageError, UserError
from launcher.files import sha256
from shards.record import Head, Image, Record
from shards.sources import files
from shards.sources.files import Part
from shards.sources.table import LEAST_PX, rows
from shards.write import Sample

_NUMBERS = 16  # a head's: box 4, rotation 9 (nan where not known), visible, confidence, weak


@dataclass(slots=True)
class _Picture:
    name: str
    size: tuple[int, int] = (0, 0)
    heads: "array[float]" = field(default_factory=lambda: array("d"))
    subjects: list[str] = field(default_factory=list)
    splits: tuple[str, ...] = ()


class Table:
    """One sample an image, in the order in which the table first names them.

    Every rank keeps all of them: 330 bytes an image and 150 a head, twice that while the images' sizes are read.
    """

    name = "table"

    def __init__(
        self,
        table: Path,
        images: Path,
        box: str = "xyxy",
        convention: str = "hpe-v1",
        split: str = "train",
        shares: str = "train=1",
        seed: int = 0,
        least_px: float = LEAST_PX,
        licence: str = "not stated",
    ) -> None:
        """Reads the table and the images' sizes.

        split: by the column split where a line has one, else by `shares` over the subjects (see files.Part); without a
        column subject each image is its own. Raises UserError that names the line, or UsageError.
        """
        if not least_px > 0:
            raise UsageError(f"--least-px {least_px:g}: it must be more than 0")
        self.licence, self.split = licence, split
        self._table, self._folder = table, images
        part = Part(split, files.shares_of(shares), seed)
        dropped: Counter[str] = Counter()
        pictures, ignored = _read(table, box, convention, part)
        clipped = (_clipped(p, images, least_px, dropped) for p in _of_split(table, pictures, split, dropped))
        self._pictures = [picture for picture in clipped if picture.subjects]
        self._full_names = len({_stem(p.name) for p in self._pictures}) < len(self._pictures)
        self.scope: Mapping[str, Any] = part.scope | {
            "table": table.name,
            "table_sha256": sha256(table),
            "box": box,
            "convention": convention,
            "least_px": least_px,
            "ignored_columns": sorted(ignored),
            "dropped": dict(sorted(dropped.items())),
        }

    def __len__(self) -> int:
        return len(self._pictures)

    def sample(self, i: int) -> Sample:
        """Image i with its heads. Raises UserError where the image has gone."""
        picture = self._pictures[i]
        data, extension = files.image_bytes(self._folder / picture.name)
        heads = [
            _head(numbers, subject)
            for numbers, subject in zip(np.reshape(picture.heads, (-1, _NUMBERS)), picture.subjects, strict=True)
        ]
        subject = picture.subjects[0] if len(set(picture.subjects)) == 1 else picture.name
        image = Image(*picture.size, source=self._table.stem, id=picture.name, subject=subject)
        key = files.key_of(picture.name if self._full_names else _stem(picture.name))
        return Sample(key, data, extension, Record(image, heads))


def _read(table: Path, box: str, convention: str, part: Part) -> tuple[list[_Picture], set[str]]:
    """All images of all splits, and the names of columns that mean nothing here."""
    pictures: dict[str, _Picture] = {}
    ignored: set[str] = set()
    for row in rows.read(table):
        name = row.text("image")
        picture = pictures.setdefault(name, _Picture(name))
        subject = sys.intern(row.text("subject", name))
        picture.heads.extend(row.box(box))
        rotation = row.rotation(convention)
        picture.heads.extend([np.nan] * 9 if rotation is None else rotation.ravel().tolist())
        picture.heads.extend((row.share("visible"), row.share("confidence"), float(row.flag("weak"))))
        picture.subjects.append(subject)
        split = sys.intern(row.text("split", files.split_of(subject, part.shares, part.seed)))
        if split not in picture.splits:
            picture.splits = (*picture.splits, split)
        if "split" in row.values and len(picture.splits) > 1:
            both = " and ".join(sorted(picture.splits))
            raise row.error(f"image {name} is in {both}; all lines of an image belong to one split")
        ignored |= row.values.keys() - rows.COLUMNS
    return list(pictures.values()), ignored


def _of_split(table: Path, pictures: list[_Picture], split: str, dropped: Counter[str]) -> list[_Picture]:
    known = {name for picture in pictures for name in picture.splits}
    if pictures and split not in known:
        names = ", ".join(sorted(known))
        raise UserError(f"{table}: nothing is in split {split!r}, only in {names}; see --split and --shares")
    chosen = [picture for picture in pictures if split in picture.splits]
    mixed = sum(len(picture.splits) > 1 for picture in chosen)
    if mixed:
        dropped["image with subjects of several splits"] = mixed
    return [picture for picture in chosen if len(picture.splits) == 1]


def _clipped(picture: _Picture, folder: Path, least_px: float, dropped: Counter[str]) -> _Picture:
    """The picture with its size, its boxes inside it, and without the heads that are not."""
    size = files.upright_size(folder / picture.name)
    inside = _Picture(picture.name, size)
    for k, subject in enumerate(picture.subjects):
        numbers = picture.heads[k * _NUMBERS : (k + 1) * _NUMBERS]
        x0, y0, x1, y1 = numbers[:4]
        box = files.clip_box((x0, y0, x1, y1), *size, least_px)
        if box is None:
            dropped[f"less than {least_px:g} px of the head in the image"] += 1
            continue
        inside.heads.extend((*box, *numbers[4:]))
        inside.subjects.append(subject)
    if not inside.subjects:
        dropped["image without heads"] += 1
    return inside


def _head(numbers: np.ndarray, subject: str) -> Head:
    x0, y0, x1, y1, *rotation, visible, confidence, weak = numbers.tolist()
    known = None if np.isnan(rotation[0]) else tuple(rotation)
    return Head((x0, y0, x1, y1), known, visible, bool(weak), confidence, subject)


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name
