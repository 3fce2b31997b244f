"""RefCOCO, RefCOCO+ and RefCOCOg: sentences that single out one thing in a COCO photo.

The layout is that of the authors' download and of their reader (lichengunc/refer): `<dataset>/refs(<by>).p`, a pickle
of Python 2, and `<dataset>/instances.json`, COCO annotations, beside COCO's `train2014` images.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from launcher.errors import UsageError, UserError
from shards.sources import files, grounding
from shards.sources.grounding import Named, Picture

if TYPE_CHECKING:
    from shards.write import Source

BY = {"refcoco": ("unc", "google"), "refcoco+": ("unc",), "refcocog": ("umd", "google")}
"""Who split which data set; the first is the default."""

LICENCE = "images: Flickr's terms (COCO); expressions: see the authors' pages"
_IMAGES = ("images/mscoco/images/train2014", "images/train2014", "train2014")
_BELONGS = "FOLDER must hold the authors' refcoco.zip, refcoco+.zip or refcocog.zip, unpacked"
_BELONGS_IMAGES = "unpack COCO's train2014.zip and give its folder as --images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hpe-shards build refcoco`."""
    grounding.add_arguments(parser, "holds refcoco/, refcoco+/ or refcocog/")
    parser.add_argument("--dataset", choices=BY, default="refcoco", help="default: refcoco")
    who = "whose splits: unc (refcoco, refcoco+), umd (refcocog), google (default: unc or umd)"
    parser.add_argument("--by", choices=("unc", "umd", "google"), help=who)
    splits = "train, val, testA (people), testB (things), or test: all tests (default: train)"
    parser.add_argument("--split", default="train", metavar="SPLIT", help=splits)
    where = f"COCO's train2014 images (default: {_IMAGES[0]} in FOLDER)"
    parser.add_argument("--images", type=Path, metavar="DIR", help=where)


def from_args(options: argparse.Namespace) -> "Source":
    """RefCOCO, RefCOCO+, RefCOCOg: sentences for boxes in COCO photos."""
    by = options.by or BY[options.dataset][0]
    if by not in BY[options.dataset]:
        raise UsageError(f"--by {by}: {options.dataset} was split by {' and '.join(BY[options.dataset])} only")
    folder = files.existing(options.folder, _BELONGS) / options.dataset
    refs = _refs(folder / f"refs({by}).p")
    instances = _Instances(folder / "instances.json")
    dropped: Counter = Counter()
    images = options.images or _images(options.folder)
    pictures = _pictures(refs, instances, images, options.split, options.least_px, dropped)
    scope = {"by": by, "least_px": options.least_px}
    return grounding.GroundedSource(options.dataset, LICENCE, options.split, scope, pictures, dropped, _BELONGS_IMAGES)


class _Ref(NamedTuple):
    image: int
    annotation: int
    split: str
    sentences: tuple[str, ...]


def _refs(path: Path) -> list[_Ref]:
    from shards.sources.unpickle import read_plain

    files.existing(path, _BELONGS)
    try:
        return [
            _Ref(
                int(ref["image_id"]), int(ref["ann_id"]), str(ref["split"]), tuple(s["sent"] for s in ref["sentences"])
            )
            for ref in read_plain(path, encoding="latin1")
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no list of RefCOCO's refs ({error!r}); download it again") from None


class _Instances:
    """instances.json but for the outlines, which are nine tenths of it."""

    def __init__(self, path: Path) -> None:
        self._path = files.existing(path, _BELONGS)
        value = files.read_json(path, lambda found: {key: found[key] for key in found if key != "segmentation"})
        try:
            self._images = {
                one["id"]: (str(one["file_name"]), (int(one["width"]), int(one["height"]))) for one in value["images"]
            }
            self._boxes = {
                one["id"]: (_corners(*map(float, one["bbox"])), bool(one.get("iscrowd")))
                for one in value["annotations"]
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: not COCO's instances ({error!r}); download it again") from None

    def image(self, number: int) -> tuple[str, tuple[int, int]]:
        """File name, and (width, height) in pixels. Raises UserError."""
        if number not in self._images:
            raise self._missing("image", number)
        return self._images[number]

    def box(self, number: int) -> tuple[files.Box, bool]:
        """(x0, y0, x1, y1) in pixels, and whether it is a crowd's. Raises UserError."""
        if number not in self._boxes:
            raise self._missing("annotation", number)
        return self._boxes[number]

    def _missing(self, what: str, number: int) -> UserError:
        return UserError(f"{self._path}: no {what} {number}, which the refs name; take both files from one download")


def _corners(x: float, y: float, width: float, height: float) -> files.Box:
    return (x, y, x + width, y + height)


def _images(root: Path) -> Path:
    places = [root / place for place in _IMAGES]
    return next((place for place in places if place.is_dir()), places[0])


def _pictures(
    refs: list[_Ref], instances: _Instances, images: Path, split: str, least_px: float, dropped: Counter
) -> Iterator[Picture]:
    """The images of the split, by number. Google's splits share images: rivals for a name may be in another one."""
    mine: dict[int, list[_Ref]] = {}
    others: dict[int, list[_Ref]] = {}
    for ref in refs:
        here = ref.split == split or (split == "test" and ref.split.startswith("test"))
        (mine if here else others).setdefault(ref.image, []).append(ref)
    if not mine:
        found = ", ".join(sorted({ref.split for ref in refs}))
        raise UsageError(f"--split {split}: the splits of these refs are {found}")
    for number in sorted(mine):
        name, size_px = instances.image(number)
        named, rivals = [], _named(others.get(number, []), instances)
        for ref in mine[number]:
            if instances.box(ref.annotation)[1]:
                dropped["crowd"] += len(ref.sentences)
                rivals += _named([ref], instances)
            else:
                named += _named([ref], instances)
        kept = grounding.one_name_each(named, size_px, least_px, dropped, rivals)
        yield Picture(grounding.place(images, name), Path(name).stem, f"coco-{number}", size_px, kept)


def _named(refs: list[_Ref], instances: _Instances) -> list[Named]:
    return [
        Named(str(ref.annotation), said, instances.box(ref.annotation)[0]) for ref in refs for said in ref.sentences
    ]
