"""What every source of files on disk needs: images as they are, boxes, splits, JSON; errors that name the file."""

import argparse
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launcher.errors import UsageError, UserError

if TYPE_CHECKING:
    import PIL.Image

Box = tuple[float, float, float, float]

_MAGIC: dict[bytes, Literal["jpg", "png"]] = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png"}
_LONGEST_KEY = 90
_SHARE_SUM_TOLERANCE = 1e-6
_ORIENTATION, _UPRIGHT = 0x0112, 1  # of EXIF


def existing(path: Path, belongs: str) -> Path:
    """`path` itself. Raises UserError where nothing is there; `belongs` says what should be and where it comes from."""
    if not path.exists():
        raise UserError(f"{path}: not there; {belongs}")
    return path


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels from the file's header; nothing is decoded.

    Raises UserError, also for images of more than 8 bits a colour.
    """
    from PIL import Image

    with _readable(path), Image.open(path) as image:
        _check_depth(path, image)
        return image.size


def upright_size(path: Path) -> tuple[int, int]:
    """`image_size` of an image whose boxes may have been read off a viewer. Raises UserError where viewers turn it."""
    from PIL import Image

    with _readable(path), Image.open(path) as image:
        _check_depth(path, image)
        turned = _orientation(image)
        if turned != _UPRIGHT:
            raise UserError(
                f"{path}: EXIF orientation {turned}: viewers turn it, but its pixels are read as they are stored, so "
                "boxes may be of either; turn the pixels (`exiftran -ai`, `mogrify -auto-orient`), or, where the boxes "
                "are of the stored pixels, remove the tag (`exiftool -Orientation=`)"
            )
        return image.size


def _check_depth(path: Path, image: "PIL.Image.Image") -> None:
    from shards.pixels import check_mode

    try:
        check_mode(image.mode)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _orientation(image: "PIL.Image.Image") -> int:
    """What the header says; 1 where it says nothing that can be read, as viewers take it."""
    from PIL import Image

    if image.format == "TIFF":
        return _UPRIGHT  # Pillow turns these itself
    try:
        # Not the image's own: that of PNGs decodes the whole image to look for a tag behind it.
        return int(Image.Image.getexif(image).get(_ORIENTATION, _UPRIGHT))
    except Exception:
        # A damaged tag makes Pillow raise struct.error, SyntaxError, …
        return _UPRIGHT


def image_bytes(path: Path) -> tuple[bytes, Literal["jpg", "png"]]:
    """JPEG and PNG files byte for byte (known by content, not by name); others as an RGB PNG. Raises UserError."""
    from PIL import Image

    with _readable(path):
        data = path.read_bytes()
        for magic, extension in _MAGIC.items():
            if data.startswith(magic):
                return data, extension
        again = io.BytesIO()
        with Image.open(io.BytesIO(data)) as image:
            _check_depth(path, image)
            image.convert("RGB").save(again, "PNG")
    return again.getvalue(), "png"


class _readable:
    """Turns what can go wrong while an image is read into one line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        from PIL import Image

        if isinstance(error, FileNotFoundError):
            raise UserError(f"{self._path}: not there, but the labels name it; complete the download") from None
        if isinstance(error, (OSError, SyntaxError, ValueError, Image.DecompressionBombError)):
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"{self._path}: no readable image ({why}); download it again") from None


def clip_box(box: Box, width: int, height: int, least_px: float) -> Box | None:
    """The part of (x0, y0, x1, y1) inside the image; None where a side of it is below `least_px` or not finite."""
    if not all(map(math.isfinite, box)):
        return None
    x0, y0 = max(0.0, box[0]), max(0.0, box[1])
    x1, y1 = min(float(width), box[2]), min(float(height), box[3])
    sides = (x1 - x0, y1 - y0)
    return (x0, y0, x1, y1) if min(sides) > 0 and min(sides) >= least_px else None


def key_of(text: str) -> str:
    """A sample's key made of an image's name: letters, digits, `_`, `-` and `/` stay, anything else becomes `_`.

    Where the name does not stay as it is, 8 digits of its hash follow, so that different names give different keys.
    """
    key = re.sub(r"[^A-Za-z0-9_/-]", "_", text).strip("/")
    key = re.sub("/{2,}", "/", key)
    if key == text and 0 < len(key) <= _LONGEST_KEY:
        return key
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    return f"{key[-_LONGEST_KEY + 9 :].lstrip('/')}-{digest[:8]}"


def split_of(subject: str, shares: Mapping[str, float], seed: int) -> str:
    """The split of a subject: a pure function of its name, the shares (see `shares_of`) and the seed."""
    digest = hashlib.sha256(f"{seed}/{subject}".encode()).digest()
    place = int.from_bytes(digest[:7], "big") / 2**56
    total = sum(shares.values())
    for name, share in shares.items():
        place -= share / total
        if place < 0:
            return name
    return [name for name, share in shares.items() if share > 0][-1]


def shares_of(text: str) -> dict[str, float]:
    """`train=0.8,val=0.1,test=0.1` to a dictionary. Raises UsageError; the shares must add up to 1."""
    try:
        shares = {name.strip(): float(share) for name, share in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise UsageError(f"shares {text!r}: expected NAME=SHARE,NAME=SHARE, as in train=0.8,val=0.1,test=0.1") from None
    if not all(0 <= share <= 1 for share in shares.values()) or abs(sum(shares.values()) - 1) > _SHARE_SUM_TOLERANCE:
        raise UsageError(f"shares {text!r}: each must lie in [0, 1], and together they must make 1")
    return shares


def add_split_arguments(parser: argparse.ArgumentParser, split: str) -> None:
    """--split, --shares and --seed of a data set without official splits; by default all of it is `split`."""
    parser.add_argument("--split", default=split, help=f"the part to take, a name of --shares (default: {split})")
    shares = f"{split}=1"
    text = f"parts of the subjects by hash, as in train=0.8,val=0.1,test=0.1 (default: {shares}, all)"
    parser.add_argument("--shares", default=shares, metavar="NAME=SHARE,…", help=text)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, other parts (default: 0)")


@dataclass(frozen=True)
class Part:
    """The part of the subjects that a set takes: those that `split_of` puts into `split`."""

    split: str
    shares: Mapping[str, float]
    seed: int = 0

    @staticmethod
    def from_args(options: argparse.Namespace) -> "Part":
        """From the options of `add_split_arguments`. Raises UsageError where the shares do not name the split."""
        shares = shares_of(options.shares)
        if shares.get(options.split, 0) == 0:
            names = ", ".join(name for name, share in shares.items() if share)
            raise UsageError(f"--split {options.split}: --shares {options.shares} only fills {names}; name one of them")
        return Part(options.split, shares, options.seed)

    def holds(self, subject: str) -> bool:
        """Whether this subject belongs to the part."""
        return split_of(subject, self.shares, self.seed) == self.split

    @property
    def scope(self) -> dict[str, Any]:
        """What a shard set records of it."""
        return {"shares": dict(self.shares), "seed": self.seed}


def read_json(path: Path, each: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The value of a JSON file. Raises UserError.

    each: called with every object as it is read; what it returns takes the object's place, so that a file of hundreds
    of MB need not be in memory whole.
    """
    try:
        return json.loads(_text(path), object_hook=each)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); download it again") from None


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) for each line of a .jsonl or .odgt file; empty lines are passed over.

    One line is in memory at a time. Raises UserError with the number of the line.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _value(path, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _value(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: not JSON ({error}); download it again") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError | UnicodeDecodeError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: not there; put the data set's annotation file in this place")
    why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
    return UserError(f"{path}: cannot be read ({why}); check its rights or download it again")
