"""Poses, boxes and words on images, with Pillow."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from launcher.errors import UsageError
from shards.index import ShardSet
from shards.record import Record

Pixels = np.ndarray
Colour = tuple[int, int, int]

RED, GREEN, BLUE = (230, 40, 40), (40, 190, 60), (60, 110, 255)
_HEAD_BOX, _OBJECT_BOX, _TEXT = (255, 214, 0), (0, 220, 220), (255, 255, 255)
_LEAST_TILE_PX = 320


def draw_axes(image: Pixels, rotation: np.ndarray, centre: tuple[float, float], length: float) -> Pixels:
    """(H, W, 3) uint8 with a head's axes, orthographic: red M[:,0], green M[:,1], blue -M[:,2] (out of the face).

    centre: x, y in pixels; length: of an axis that lies in the image plane, in pixels.
    """
    picture = Image.fromarray(image)
    _axes(ImageDraw.Draw(picture), rotation, centre, length)
    return np.array(picture)


def draw_box(image: Pixels, bbox: Sequence[float], colour: Colour = _HEAD_BOX, text: str = "") -> Pixels:
    """(H, W, 3) uint8 with a box (x0, y0, x1, y1 in pixels) and words above it."""
    picture = Image.fromarray(image)
    _box(ImageDraw.Draw(picture), bbox, colour, text)
    return np.array(picture)


def draw_record(image: Pixels, known: Record) -> Pixels:
    """(H, W, 3) uint8 with all that `known` says: heads with axes and yaw, pitch, roll; objects with expressions.

    Small images are enlarged by a whole number, so that the words can be read.
    """
    scale = max(1, -(-_LEAST_TILE_PX // max(image.shape[:2])))
    picture = Image.fromarray(image).resize((image.shape[1] * scale, image.shape[0] * scale), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for bbox in dict.fromkeys(thing.bbox for thing in known.objects):
        names = " / ".join(thing.expression for thing in known.objects if thing.bbox == bbox)
        _box(draw, [v * scale for v in bbox], _OBJECT_BOX, names)
    for head in known.heads:
        x0, y0, x1, y1 = (v * scale for v in head.bbox)
        _box(draw, (x0, y0, x1, y1), _HEAD_BOX)
        if head.rotation is None:
            continue
        # At the lower edge: above the box its expression may stand.
        _words(draw, (x0 + 3, y1 - 17), _HEAD_BOX, " ".join(f"{angle:+.0f}" for angle in head.pose_deg))
        _axes(draw, head.matrix, ((x0 + x1) / 2, (y0 + y1) / 2), 0.6 * max(x1 - x0, y1 - y0))
    return np.array(picture)


def contact_sheet(tiles: Sequence[Pixels], titles: Sequence[str], columns: int = 0) -> Pixels:
    """Images of any sizes in a grid, each with its title below it. columns 0: about as wide as high."""
    columns = columns or max(1, round(len(tiles) ** 0.5))
    cell_w, cell_h = max(tile.shape[1] for tile in tiles), max(tile.shape[0] for tile in tiles)
    gap, line = 6, 16
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (cell_w + gap) + gap, rows * (cell_h + line + gap) + gap), (24, 24, 28))
    draw = ImageDraw.Draw(sheet)
    for k, (tile, title) in enumerate(zip(tiles, titles, strict=True)):
        x, y = gap + k % columns * (cell_w + gap), gap + k // columns * (cell_h + line + gap)
        sheet.paste(Image.fromarray(tile), (x, y))
        draw.text((x, y + cell_h + 1), title, fill=_TEXT, font=_font())
    return np.array(sheet)


def preview(shard_set: ShardSet, count: int, out: Path) -> int:
    """Write a contact sheet of `count` samples spread over the set to `out`; returns how many there are on it.

    Raises UsageError where `out` ends in no kind of image.
    """
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise UsageError(f"--out {out}: {out.suffix!r} is no kind of image that can be written; let it end in .png")
    count = min(count, len(shard_set))
    tiles, titles = [], []
    for i in [len(shard_set) * k // count for k in range(count)]:
        stored = shard_set.read(i)
        known = shard_set.parse(i, stored.json)
        tiles.append(draw_record(shard_set.pixels(i, stored, known), known))
        titles.append(stored.key)
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(contact_sheet(tiles, titles)).save(out)
    return count


def _axes(draw: ImageDraw.ImageDraw, rotation: np.ndarray, centre: tuple[float, float], length: float) -> None:
    x, y = centre
    axes = [(rotation[:, 0], RED), (rotation[:, 1], GREEN), (-rotation[:, 2], BLUE)]
    # Far ends first (z into the scene), so that what is nearer is drawn over it.
    for axis, colour in sorted(axes, key=lambda pair: -pair[0][2]):
        draw.line((x, y, x + length * axis[0], y + length * axis[1]), fill=colour, width=max(2, round(length / 30)))


def _box(draw: ImageDraw.ImageDraw, bbox: Sequence[float], colour: Colour, text: str = "") -> None:
    x0, y0, x1, y1 = bbox
    draw.rectangle((x0, y0, x1, y1), outline=colour, width=2)
    # Inside the box where there is no room above it.
    _words(draw, (x0 + 2, y0 - 14 if y0 >= 14 else y0 + 2), colour, text)


def _words(draw: ImageDraw.ImageDraw, place: tuple[float, float], colour: Colour, text: str) -> None:
    draw.text(place, text, fill=colour, font=_font(), stroke_width=1, stroke_fill=(0, 0, 0))


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(12)
