"""Visual7W's pointing questions: "Which … ?" with four boxes in the photo, one of them right.

`dataset_v7w_pointing.json` holds the boxes (x, y, width, height; -1 where a corner left the photo) and for each image
its split and its questions, whose `answer` is the number of the right box; the photos are `images/v7w_<number>.jpg`.
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import UserError
from shards.sources import files, grounding
from shards.sources.grounding import Named, Picture

if TYPE_CHECKING:
    from shards.write import Source

LICENCE = "images: Flickr's terms (COCO); questions: see the authors' page"
SPLITS = ("train", "val", "test")
ANNOTATIONS = "dataset_v7w_pointing.json"
_BELONGS = f"FOLDER must hold {ANNOTATIONS} of the authors' dataset_v7w_pointing.zip"
_BELONGS_IMAGES = "unpack visual7w_images.zip and give its folder as --images"

_QUESTION = re.compile(r"which\s+(.+?)[\s?.]*", re.IGNORECASE)
_VERBS = frozenset(
    "is are was were has have had wears holds contains belongs appears says sits hangs goes comes makes reads lies"
    " shows".split()
)
_RELATIVES = frozenset("that who which whom whose where".split())
# "is the boy kicking": what the question asks for is the object, and "ball that is the boy kicking" would be no name.
_TURNED = re.compile(r"\w+ (?:(?:he|she|it|they|you|we)\b|(?:the|an?|his|her|its|their) (?!one\b).*\b\w+ing\b)", re.I)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hpe-shards build visual7w`."""
    grounding.add_arguments(parser, f"holds {ANNOTATIONS}")
    parser.add_argument("--split", choices=SPLITS, default="train", help="default: train")
    parser.add_argument("--images", type=Path, metavar="DIR", help="the photos (default: images in FOLDER)")


def from_args(options: argparse.Namespace) -> "Source":
    """Visual7W pointing: "Which …?" questions made names, with their right boxes, on COCO photos."""
    path = files.existing(options.folder, _BELONGS) / ANNOTATIONS
    files.existing(path, _BELONGS)
    dropped: Counter = Counter()
    images = files.existing(options.images or options.folder / "images", _BELONGS_IMAGES)
    try:
        value = files.read_json(path, _slim)
        boxes = dict(value["boxes"])
        wanted = [image for image in value["images"] if image["split"] == options.split]
        pictures = list(_pictures(wanted, boxes, images, options.least_px, dropped))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not Visual7W's pointing questions ({error!r}); download it again") from None
    scope = {"least_px": options.least_px}
    return grounding.GroundedSource("visual7w", LICENCE, options.split, scope, pictures, dropped, _BELONGS_IMAGES)


def _slim(found: dict[str, Any]) -> Any:
    """Half a million boxes as tuples; questions without their wrong answers."""
    if "box_id" in found:
        x, y, width, height = (float(found[side]) for side in ("x", "y", "width", "height"))
        return found["box_id"], (x, y, x + width, y + height)
    if "qa_id" in found:
        return found["question"], found["answer"]
    return found


def _pictures(
    wanted: list[dict[str, Any]], boxes: dict[int, files.Box], images: Path, least_px: float, dropped: Counter
) -> Iterator[Picture]:
    for image in sorted(wanted, key=lambda one: int(one["image_id"])):
        named = []
        for question, answer in image["qa_pairs"]:
            name = name_in(question)
            if name is None:
                dropped["question that makes no name"] += 1
            else:
                named.append(Named(str(answer), name, boxes[answer]))
        path = grounding.place(images, str(image["filename"]))
        size_px = files.image_size(path)
        kept = grounding.one_name_each(named, size_px, least_px, dropped)
        yield Picture(path, path.stem, f"visual-genome-{image['image_id']}", size_px, kept)


def name_in(question: str) -> str | None:
    """The thing a question asks for, as a name: "Which pillow is on the bed?" gives "pillow that is on the bed".

    None where its words do not make one by themselves; questions that begin otherwise, or go "is the boy kicking".
    """
    match = _QUESTION.fullmatch(" ".join(question.split()))
    words = match[1].split() if match else []
    at = next((i for i, word in enumerate(words) if word.lower() in _VERBS), None)
    if at is None or _RELATIVES.intersection(word.lower() for word in words[:at]):
        return None
    thing, rest = " ".join(words[:at]), " ".join(words[at:])
    if not thing:
        name = " ".join(words[1:])
        return name if re.match(r"(?:the|an?) ", name, re.IGNORECASE) else None
    if _TURNED.match(rest):
        return None
    return f"{'one ' if thing.lower().startswith('of ') else ''}{thing} that {rest}"
