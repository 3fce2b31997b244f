"""What the sources of named boxes share: expressions that name one thing, and images with the objects so named."""

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import UserError
from shards.sources import files
from shards.sources.files import Box

if TYPE_CHECKING:
    from shards.write import Sample

LEAST_PX = 4.0
_SPACE_BEFORE = re.compile(r"\s+(?=[,.;:!?)]|['’]s\b|n['’]t\b)")
_AROUND = ' .,;:!?"“”'
_ARTICLE = re.compile(r"(?:an?|the)\s+(?=\w)", re.IGNORECASE)


@dataclass(frozen=True)
class Named:
    """A box in pixels and what somebody called it; `thing` tells the things of one image apart."""

    thing: str
    expression: str
    box: Box


@dataclass(frozen=True)
class Picture:
    """An image file and the things in it that have a name."""

    path: Path
    id: str
    subject: str
    size_px: tuple[int, int]
    named: tuple[Named, ...]


class GroundedSource:
    """A shards.write.Source of images with named boxes and no heads; `scope` says what was left out."""

    def __init__(
        self,
        name: str,
        licence: str,
        split: str,
        scope: Mapping[str, Any],
        pictures: Iterable[Picture],
        dropped: Counter,
        belongs: str,
    ) -> None:
        """Pictures without anything named are left out; `belongs` says where their files come from.

        Raises UserError where none remains, or a file is not there: now, not after hours of building.
        """
        self.name, self.licence, self.split = name, licence, split
        self._pictures = []
        for picture in pictures:
            if picture.named:
                self._pictures.append(picture)
            else:
                dropped["image without objects"] += 1
        self.scope: Mapping[str, Any] = {**scope, "dropped": dict(sorted(dropped.items()))}
        if not self._pictures:
            why = ", ".join(f"{reason} {count}" for reason, count in self.scope["dropped"].items()) or "nothing"
            raise UserError(f"{name}, split {split}: no image with an object (left out: {why}); check the options")
        _check_present([picture.path for picture in self._pictures], belongs)

    def __len__(self) -> int:
        return len(self._pictures)

    def sample(self, i: int) -> "Sample":
        """Image i as it is on disk. Raises UserError where it is missing, or of another size than its labels."""
        from shards.record import Image, Object, Record
        from shards.write import Sample

        picture = self._pictures[i]
        data, extension = files.image_bytes(picture.path)
        size_px = files.image_size(picture.path)
        if size_px != picture.size_px:
            here, said = ("x".join(map(str, size)) for size in (size_px, picture.size_px))
            raise UserError(f"{picture.path}: is {here}, its labels are for {said}; use the images as published")
        image = Image(*size_px, self.name, picture.id, picture.subject)
        objects = [Object(one.expression, one.box) for one in picture.named]
        return Sample(files.key_of(picture.id), data, extension, Record(image, [], objects))


def add_arguments(parser: argparse.ArgumentParser, holds: str) -> None:
    """The options that these sources share; `holds` says what is in the folder."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help=holds)
    shortest = f"boxes with a shorter side are left out (default: {LEAST_PX:g})"
    parser.add_argument("--least-px", type=float, default=LEAST_PX, metavar="PX", help=shortest)


def expression_of(text: str) -> str:
    """`text` as a name: one line, no full stop, no article in front, no capital that only starts a sentence.

    Prompts bring their own article ("Where is the {expression}?").
    """
    text = _SPACE_BEFORE.sub("", " ".join(text.split())).strip(_AROUND)
    bare = _ARTICLE.sub("", text, count=1) if _ARTICLE.match(text) else text
    starts_a_sentence = bare == text and bare.split(" ", 1)[0][1:].islower()
    return bare[:1].lower() + bare[1:] if starts_a_sentence else bare


def one_name_each(
    named: Sequence[Named],
    size_px: tuple[int, int],
    least_px: float,
    dropped: Counter,
    rivals: Sequence[Named] = (),
    strict: bool = False,
) -> tuple[Named, ...]:
    """Those of one image's `named` whose expression means one thing, cleaned, with boxes clipped to the image.

    An expression that two things share is dropped for both; `rivals` are further things that may share one. strict:
    dropped is also an expression all of whose words come in one of another thing, as "man" does in "man in a red hat".
    `dropped` counts, by reason.
    """
    expressions = [expression_of(one.expression) for one in (*named, *rivals)]
    texts = [(one.thing, text.lower()) for one, text in zip((*named, *rivals), expressions, strict=True)]
    kept: dict[str, Named] = {}
    for one, expression in zip(named, expressions, strict=False):
        text = expression.lower()
        box = files.clip_box(one.box, *size_px, least_px)
        if not re.search(r"\w", text):
            dropped["expression without words"] += 1
        elif any(_may_mean(text, other, strict) for thing, other in texts if thing != one.thing):
            dropped["expression of two things"] += 1
        elif box is None:
            dropped["box too small or outside"] += 1
        elif text in kept:
            dropped["expression said before"] += 1
        else:
            kept[text] = Named(one.thing, expression, box)
    return tuple(kept.values())


def _may_mean(text: str, other: str, strict: bool) -> bool:
    return set(text.split()) <= set(other.split()) if strict else text == other


def place(folder: Path, name: str) -> Path:
    """The file of that name in the folder. Raises UserError for names that lead out of it."""
    if name in ("", "..") or Path(name).name != name:
        raise UserError(
            f"{folder}: the labels name an image {name!r}, which is no plain file name; download them again"
        )
    return folder / name


def _check_present(paths: Sequence[Path], belongs: str) -> None:
    for folder in sorted({path.parent for path in paths}):
        files.existing(folder, belongs)
        there = {path.name for path in folder.iterdir()}
        missing = sorted(path for path in paths if path.parent == folder and path.name not in there)
        if missing:
            raise UserError(f"{missing[0]}: not there ({len(missing)} images are missing); {belongs}")
