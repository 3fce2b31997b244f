"""Poses on a picture: true ones as solid axes, predicted ones dashed, so that they can be told apart."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from shards import draw
from shards.draw import Pixels

_DASH_PX, _GAP_PX = 6, 4
_AXIS_SHARE = 0.6  # length of an axis as a share of the box's longer side
_CROP_SHARE = 1.6  # side of a crop as a share of the box's longer side


def draw_pose(image: Pixels, bbox: Sequence[float], rotation: np.ndarray, *, dashed: bool = False) -> Pixels:
    """(H, W, 3) uint8 with the axes of the head in `bbox` (x0, y0, x1, y1 in pixels); `rotation` (3, 3) is M.

    Red M[:,0], green M[:,1], blue -M[:,2], which points out of the face.
    """
    x0, y0, x1, y1 = bbox
    centre, length = ((x0 + x1) / 2, (y0 + y1) / 2), _AXIS_SHARE * max(x1 - x0, y1 - y0)
    if not dashed:
        return draw.draw_axes(image, rotation, centre, length)
    picture = Image.fromarray(image)
    pen = ImageDraw.Draw(picture)
    axes = [(rotation[:, 0], draw.RED), (rotation[:, 1], draw.GREEN), (-rotation[:, 2], draw.BLUE)]
    for axis, colour in axes:
        end = (centre[0] + length * axis[0], centre[1] + length * axis[1])
        _dashed_line(pen, centre, end, colour, max(2, round(length / 30)))
    return np.array(picture)


def _dashed_line(
    pen: ImageDraw.ImageDraw, start: Sequence[float], end: Sequence[float], colour: draw.Colour, width: int
) -> None:
    start_xy, end_xy = np.asarray(start, dtype=float), np.asarray(end, dtype=float)
    length = float(np.linalg.norm(end_xy - start_xy))
    step = (end_xy - start_xy) / max(length, 1e-9)
    for at in np.arange(0.0, length, _DASH_PX + _GAP_PX):
        stop = min(length, at + _DASH_PX)
        # A white rim keeps dashes visible over the solid line of the same colour.
        for pen_width, pen_colour in ((width + 2, (255, 255, 255)), (width, colour)):
            pen.line((*(start_xy + at * step), *(start_xy + stop * step)), fill=pen_colour, width=pen_width)


def head_tile(
    image: Pixels, bbox: Sequence[float], truth: np.ndarray | None, predicted: np.ndarray | None, side_px: int = 160
) -> Pixels:
    """(side_px, side_px, 3) uint8: a head cut out with a margin, true axes solid, predicted ones dashed."""
    x0, y0, x1, y1 = bbox
    half = _CROP_SHARE * max(x1 - x0, y1 - y0) / 2
    left, top = (x0 + x1) / 2 - half, (y0 + y1) / 2 - half
    window = (left, top, left + 2 * half, top + 2 * half)
    # Beyond the image's border Pillow fills black, so heads at the edge keep their scale.
    tile = Image.fromarray(image).transform(
        (side_px, side_px), Image.Transform.EXTENT, window, Image.Resampling.BICUBIC
    )
    scale = side_px / (2 * half)
    inside = [(v - corner) * scale for v, corner in zip(bbox, (left, top, left, top), strict=True)]
    pixels = np.array(tile)
    if truth is not None:
        pixels = draw_pose(pixels, inside, truth)
    if predicted is not None:
        pixels = draw_pose(pixels, inside, predicted, dashed=True)
    return pixels
