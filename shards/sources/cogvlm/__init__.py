"""CogVLM's own form of fine-tuning data: `images/00000001.jpg` beside `labels/00000001.json`.

A label is `{"conversations": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]}`, or
`{"captions": [{"role": "caption", "content": …}]}`, as in CogVLM-SFT-311K (THUDM/CogVLM, dataset.md). Only what names a
box becomes a record.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import UserError
from shards.sources import files, grounding
from shards.sources.cogvlm import talk
from shards.sources.grounding import Named, Picture

if TYPE_CHECKING:
    from shards.write import Source

_BELONGS = "FOLDER must hold the folders images and labels of one set"
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hpe-shards build cogvlm`."""
    grounding.add_arguments(parser, "holds images/ and labels/")
    files.add_split_arguments(parser, "train")
    parser.add_argument("--licence", default="not stated", help="recorded with the set (default: not stated)")


def from_args(options: argparse.Namespace) -> "Source":
    """CogVLM's images/ and labels/ folders: boxes that conversations name."""
    part = files.Part.from_args(options)
    root = files.existing(options.folder, _BELONGS)
    images = _images(files.existing(root / "images", _BELONGS))
    labels = sorted(files.existing(root / "labels", _BELONGS).glob("*.json"))
    unlabelled = len(images.keys() - {label.stem for label in labels})
    dropped: Counter = Counter({"image without label": unlabelled} if unlabelled else {})
    name = root.resolve().name
    pictures = _pictures(name, labels, images, part, options.least_px, dropped)
    scope = {"set": name, **part.scope, "least_px": options.least_px}
    return grounding.GroundedSource("cogvlm", options.licence, part.split, scope, pictures, dropped, _BELONGS)


def _images(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in _ENDINGS}


def _pictures(
    name: str, labels: list[Path], images: dict[str, Path], part: files.Part, least_px: float, dropped: Counter
) -> Iterator[Picture]:
    for label in labels:
        subject = f"{name}/{label.stem}"
        if not part.holds(subject):
            continue
        said = list(talk.named_boxes(_turns(label), dropped))
        if label.stem not in images:
            raise UserError(f"{label}: there is no image {label.stem} in {label.parents[1] / 'images'}; {_BELONGS}")
        path = images[label.stem]
        size_px = files.image_size(path)
        named = [Named(str(one.box), one.expression, _pixels(one.box, *size_px)) for one in said]
        kept = grounding.one_name_each(named, size_px, least_px, dropped)
        yield Picture(path, label.stem, subject, size_px, kept)


def _turns(label: Path) -> list[tuple[str, str]]:
    value = files.read_json(label)
    try:
        found = [turn for kind in ("conversations", "captions") for turn in value.get(kind, [])]
        return [(str(turn["role"]), str(turn["content"])) for turn in found]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{label}: no conversations or captions of CogVLM's ({error!r}); see docs/data.md") from None


def _pixels(box: talk.Thousandths, width_px: int, height_px: int) -> files.Box:
    """The middle of the thousandths: written in thousandths again, it gives the same numbers."""
    x0, y0, x1, y1 = (min(1000.0, value + 0.5) / 1000 for value in box)
    return (x0 * width_px, y0 * height_px, x1 * width_px, y1 * height_px)
