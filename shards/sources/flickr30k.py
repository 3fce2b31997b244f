"""Flickr30k Entities: phrases of five captions a photo, each with the boxes of what it means.

The layout is that of the authors' repository (BryanPlummer/flickr30k_entities), annotations.zip unpacked: `Sentences/`
with `[/EN#<chain>/<type>… words]` around a phrase, `Annotations/` in the manner of Pascal VOC, pixels counted from 1,
lists of image numbers per split, and UNRELATED_CAPTIONS. A chain is one thing, or one group, through all captions.
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import UserError
from shards.sources import files, grounding
from shards.sources.grounding import Named, Picture

if TYPE_CHECKING:
    from shards.write import Source

LICENCE = "images: Flickr's terms, non-commercial research and education; annotations: see the authors' repository"
SPLITS = ("train", "val", "test")
_BELONGS = "FOLDER must hold the authors' repository with its annotations.zip unpacked"
_BELONGS_IMAGES = "unpack flickr30k-images.tar and give its folder as --images"
_PHRASE = re.compile(r"\[/EN#(\d+)((?:/[^\s/\]]+)*)\s+([^\]]+)\]")
_NOT_VISUAL = "0"
_NO_BOX = (0.0, 0.0, 0.0, 0.0)
# Words that point at something the caption has said before: such a phrase means nothing beside the image alone.
_LEANING = frozenset(
    "he she it they him them his her hers its their theirs this that these those another other".split()
)
_LEANING_ALONE = _LEANING | frozenset("one ones others each who whom which both all some something someone".split())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hpe-shards build flickr30k`."""
    grounding.add_arguments(parser, "holds Sentences/, Annotations/ and the lists of the splits")
    parser.add_argument("--split", choices=SPLITS, default="train", help="default: train")
    where = "the photos (default: flickr30k-images in FOLDER)"
    parser.add_argument("--images", type=Path, metavar="DIR", help=where)
    several = "phrases with several boxes: left out, or given the box around all of them (default: drop)"
    parser.add_argument("--several", choices=("drop", "union"), default="drop", help=several)


def from_args(options: argparse.Namespace) -> "Source":
    """Flickr30k Entities: phrases for boxes in photos of people."""
    root = files.existing(options.folder, _BELONGS)
    numbers = sorted(filter(None, _lines(root / f"{options.split}.txt")))
    dropped: Counter = Counter()
    images = options.images or root / "flickr30k-images"
    pictures = _pictures(root, numbers, images, options, dropped)
    scope = {"several": options.several, "least_px": options.least_px}
    return grounding.GroundedSource("flickr30k", LICENCE, options.split, scope, pictures, dropped, _BELONGS_IMAGES)


@dataclass
class Boxes:
    """What an annotation file knows: size in pixels; boxes by chain; chains that are the whole scene."""

    size_px: tuple[int, int]
    boxes: dict[str, list[files.Box]] = field(default_factory=dict)
    scenes: set[str] = field(default_factory=set)


def read_boxes(path: Path) -> Boxes:
    """Read an annotation file. Raises UserError; files with a document type (entities, bombs) are refused unread."""
    from xml.etree.ElementTree import ParseError

    from defusedxml import DefusedXmlException, ElementTree

    files.existing(path, _BELONGS)
    try:
        tree = ElementTree.parse(path, forbid_dtd=True).getroot()
        found = Boxes((_number(tree, "size/width"), _number(tree, "size/height")))
        for thing in tree.iter("object"):
            _add(found, thing)
    except DefusedXmlException as error:
        raise UserError(f"{path}: refused ({type(error).__name__}): annotations declare no entities") from None
    except (ParseError, ValueError, OSError) as error:
        raise UserError(
            f"{path}: no annotation of Flickr30k Entities ({error}); unpack annotations.zip again"
        ) from None
    return found


def _add(found: Boxes, thing: Any) -> None:
    chains = [(name.text or "").strip() for name in thing.findall("name")]
    if thing.find("bndbox") is not None:
        # Pixels counted from 1, both ends inside the box: edges begin one less, and end at the number itself.
        xmin, ymin, xmax, ymax = (_number(thing, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
        for chain in chains:
            found.boxes.setdefault(chain, []).append((xmin - 1, ymin - 1, xmax, ymax))
    elif thing.find("scene") is not None and _number(thing, "scene"):
        found.scenes.update(chains)


def _number(tree: Any, place: str) -> int:
    text = tree.findtext(place)
    if text is None:
        raise ValueError(f"no {place}")
    return int(text)


def phrases(caption: str) -> Iterator[tuple[str, str]]:
    """(chain, words) of each marked phrase."""
    for match in _PHRASE.finditer(caption):
        yield match[1], match[3]


def _lines(path: Path) -> list[str]:
    """Lines as text: UTF-8, or Latin-1 where they are not. Raises UserError."""
    data = files.existing(path, _BELONGS).read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return [line.strip() for line in text.split("\n")]


def _unrelated(root: Path) -> set[tuple[str, int]]:
    """(image number, caption from 1) of captions that are about something else."""
    path = root / "UNRELATED_CAPTIONS"
    rows = [line.split() for line in _lines(path) if line and not line.startswith("#")] if path.exists() else []
    try:
        return {(number, int(caption)) for number, caption in rows}
    except ValueError:
        raise UserError(f"{path}: expected an image number and a caption number a line; download it again") from None


def _pictures(
    root: Path, numbers: list[str], images: Path, options: argparse.Namespace, dropped: Counter
) -> Iterator[Picture]:
    unrelated = _unrelated(root)
    for number in numbers:
        known = read_boxes(grounding.place(root / "Annotations", f"{number}.xml"))
        named: list[Named] = []
        rivals: list[Named] = []
        for place, caption in enumerate(_lines(root / "Sentences" / f"{number}.txt"), 1):
            for chain, words in phrases(caption):
                box, why = _meant(known, chain, words, options.several == "union")
                why = "unrelated caption" if (number, place) in unrelated else why
                if not why:
                    named.append(Named(chain, words, box))
                    continue
                dropped[why] += 1
                if chain != _NOT_VISUAL:
                    rivals.append(Named(chain, words, box))
        kept = grounding.one_name_each(named, known.size_px, options.least_px, dropped, rivals, strict=True)
        image = grounding.place(images, f"{number}.jpg")
        yield Picture(image, number, f"flickr30k-{number}", known.size_px, kept)


def _meant(known: Boxes, chain: str, words: str, union: bool) -> tuple[files.Box, str]:
    """The box of a phrase, or why it has none that can be asked for."""
    boxes = known.boxes.get(chain, [])
    lowered = grounding.expression_of(words).lower().split()
    if chain == _NOT_VISUAL:
        return _NO_BOX, "not visual"
    if chain in known.scenes:
        return _NO_BOX, "scene"
    if not boxes:
        return _NO_BOX, "no box"
    if len(boxes) > 1 and not union:
        return _NO_BOX, "several boxes"
    if lowered and (lowered[0] in _LEANING or _LEANING_ALONE.issuperset(lowered)):
        return _NO_BOX, "needs its caption"
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return (min(x0), min(y0), max(x1), max(y1)), ""
