"""CrowdHuman (Shao et al., 2018): crowds with a box for every head, and no angles.

`annotation_train.odgt` and `annotation_val.odgt` hold one JSON a line, `{"ID", "gtboxes": [{"tag", "hbox", "extra",
"head_attr"}]}`, boxes as x, y, width, height; images are `Images/ID.jpg` (format: www.crowdhuman.org/download.html).
Heads are stored without a rotation, which a model can predict later.
"""

import argparse
from array import array
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from launcher.errors import UsageError, UserError
from shards.sources import files

if TYPE_CHECKING:
    from shards.write import Sample, Source

SPLITS = ("train", "val")
LEAST_PX = 8.0
OCCLUDED_VISIBLE = 0.5
"""Visible share of a head that is marked as occluded: ours, since the data set only says yes or no."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hpe-shards build crowdhuman`."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="holds annotation_*.odgt and Images")
    parser.add_argument("--split", choices=SPLITS, default="train", help="the official one (default: train)")
    text = f"drop heads with a shorter side inside the image (default: {LEAST_PX:g})"
    parser.add_argument("--least-px", type=float, default=LEAST_PX, metavar="PX", help=text)


def from_args(options: argparse.Namespace) -> "Source":
    """CrowdHuman: crowds with 23 head boxes an image, angles to be predicted; for weak labels."""
    return CrowdHuman(options.folder, options.split, options.least_px)


class _Crowd(NamedTuple):
    id: str
    size: tuple[int, int]
    heads: "array[float]"  # x0, y0, x1, y1, visible of each


class CrowdHuman:
    """Images of one official split that have a head left, all heads without a rotation."""

    name = "crowdhuman"
    licence = "CrowdHuman: non-commercial research and educational purposes; images must not be distributed"

    def __init__(self, folder: Path, split: str = "train", least_px: float = LEAST_PX) -> None:
        """Reads all boxes. Raises UserError where annotations or an image are missing or broken."""
        if not least_px > 0:
            raise UsageError(f"--least-px {least_px:g}: it must be more than 0")
        self.split = split
        self._images = folder / "Images"
        labels = folder / f"annotation_{split}.odgt"
        files.existing(labels, "CrowdHuman's annotations belong there; name the folder that holds them")
        files.existing(self._images, f"the unpacked CrowdHuman_{split}*.zip belong there")
        dropped: Counter[str] = Counter()
        crowds = (self._crowd(labels, line, value, least_px, dropped) for line, value in files.read_json_lines(labels))
        self._crowds = [crowd for crowd in crowds if crowd.heads]
        self.scope: Mapping[str, Any] = {"least_px": least_px, "dropped": dict(sorted(dropped.items()))}

    def __len__(self) -> int:
        return len(self._crowds)

    def sample(self, i: int) -> "Sample":
        """Image i with its heads. Raises UserError where the image has gone."""
        from shards.record import Head, Image, Record
        from shards.write import Sample

        crowd = self._crowds[i]
        data, extension = files.image_bytes(self._images / f"{crowd.id}.jpg")
        rows = zip(*[iter(crowd.heads)] * 5, strict=True)
        heads = [Head((x0, y0, x1, y1), None, visible=visible) for x0, y0, x1, y1, visible in rows]
        image = Image(*crowd.size, source=self.name, id=crowd.id, subject=f"{self.name}/{crowd.id}")
        return Sample(files.key_of(crowd.id), data, extension, Record(image, heads))

    def _crowd(self, labels: Path, line: int, value: Any, least_px: float, dropped: Counter[str]) -> _Crowd:
        name, boxes = (value.get("ID"), value.get("gtboxes")) if isinstance(value, dict) else (None, None)
        if not (isinstance(name, str) and name and "/" not in name and isinstance(boxes, list)):
            raise UserError(f"{labels}, line {line}: no ID of an image and list of gtboxes; download it again")
        size, heads = files.image_size(self._images / f"{name}.jpg"), array("d")
        try:
            for box in boxes:
                reason = _reason(box)
                x, y, width, height = (0.0, 0.0, 0.0, 0.0) if reason else map(float, box["hbox"])
                clipped = files.clip_box((x, y, x + width, y + height), *size, least_px)
                if clipped is None:
                    dropped[reason or f"less than {least_px:g} px of the head in the image"] += 1
                    continue
                occluded = box.get("head_attr", {}).get("occ", 0)
                heads.extend((*clipped, OCCLUDED_VISIBLE if occluded else 1.0))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
            raise UserError(f"{labels}, line {line}: not CrowdHuman's format ({why}); download it again") from None
        if not heads:
            dropped["image without heads"] += 1
        return _Crowd(name, size, heads)


def _reason(box: dict[str, Any]) -> str:
    """Why this box is no head to be labelled; empty where it is one. Any attribute may be missing."""
    head = box.get("head_attr", {})
    if box["tag"] != "person":
        return "not a person (mask)"
    if box.get("extra", {}).get("ignore", 0):
        return "ignored person"
    if "hbox" not in box:
        return "no head box"
    if head.get("ignore", 0):
        return "ignored head"
    return "unsure head" if head.get("unsure", 0) else ""
