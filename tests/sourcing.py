"""A source as its users get it: from the words after `hpe-shards build`."""

import argparse
import io
from typing import TYPE_CHECKING

import numpy as np

from shards.sources import SOURCES

if TYPE_CHECKING:
    from shards.record import Record
    from shards.write import Source


def source_of(name: str, *words: object) -> "Source":
    """The source that `hpe-shards build NAME WORDS…` reads."""
    add_arguments, make = SOURCES[name]
    parser = argparse.ArgumentParser(name)
    add_arguments(parser)
    return make(parser.parse_args([str(word) for word in words]))


def records_of(source: "Source") -> "list[Record]":
    """All its records."""
    return [source.sample(i).record for i in range(len(source))]


def named_in(source: "Source") -> dict[str, list[tuple[str, tuple[float, ...]]]]:
    """Image id → its objects' (expression, box)."""
    return {record.image.id: [(o.expression, o.bbox) for o in record.objects] for record in records_of(source)}


def pixels_of(image: bytes) -> np.ndarray:
    """(height, width, 3) uint8."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def fills_its_box(pixels: np.ndarray, box: tuple[float, ...], colour: tuple[int, int, int]) -> bool:
    """Whether the box is of that colour, and what lies two pixels outside its sides (within the image) is not."""
    x0, y0, x1, y1 = map(int, box)
    height, width = pixels.shape[:2]
    is_it = np.abs(pixels.astype(int) - colour).max(2) < 60
    middle_x, middle_y = (x0 + x1) // 2, (y0 + y1) // 2
    around = [(x0 - 2, middle_y), (x1 + 1, middle_y), (middle_x, y0 - 2), (middle_x, y1 + 1)]
    outside = [is_it[y, x] for x, y in around if 0 <= x < width and 0 <= y < height]
    inside = is_it[y0:y1, x0:x1]
    return bool(inside.mean() > 0.95 and not any(outside))
