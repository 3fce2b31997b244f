"""Augmentation: crop, turn, mirror and colour of an image with its boxes, poses and camera; on matrices, never triples.

What happens to a sample is a pure function of (seed, position in the stream), so it does not depend on ranks or workers
and is the same after a resume. Poses stay in camera axes: cropping does not change them (it moves the optical centre),
turning the image clockwise by a gives Rz(a) · M, mirroring F · M · F. Sides keep their proportion, since squeezing one
more than the other would show another pose.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from launcher.errors import UsageError
from shards import pose
from shards.plan import is_mirrored
from shards.record import Camera, Head, Object, Record
from shards.shuffle import mix

if TYPE_CHECKING:
    import torch

Box = tuple[float, float, float, float]

FILL = (124, 116, 104)
"""RGB of the corners that a turned image leaves empty: about the mean of photographs."""
_LEAST_INSIDE = 0.5
_LUMA = (0.299, 0.587, 0.114)
_SQUARE_PIXELS = 1e-3


@dataclass(frozen=True)
class Augment:
    """How far samples may be changed. The default changes nothing.

    flip: mirror every other image, on average. rotate_deg: turn by up to so many degrees either way. crop: keep at
    least this share of both sides (1: no crop). colour: brightness, contrast and saturation by up to this share.
    Raises UsageError for values out of range.
    """

    flip: bool = False
    rotate_deg: float = 0.0
    crop: float = 1.0
    colour: float = 0.0

    def __post_init__(self) -> None:
        for name, low, high in (("rotate_deg", 0.0, 180.0), ("crop", 0.1, 1.0), ("colour", 0.0, 0.9)):
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"augment.{name} {getattr(self, name)}: it must lie between {low:g} and {high:g}")

    def at(self, seed: int, position: int, known: Record) -> "Change":
        """What happens to the sample `known` at `position` of the stream.

        A crop keeps every labelled box whole where the image has objects, as an expression speaks of them all, else
        one head. Images without heads are not turned, those with objects every other time: their expressions and boxes
        do not survive a turn.
        """
        whole = (0, 0, known.image.width, known.image.height)
        mirrored = self.flip and is_mirrored(seed, position)
        if self.rotate_deg == 0.0 and self.crop == 1.0 and self.colour == 0.0:
            return Change(whole, mirrored=mirrored)
        draw = _Draws(seed, position)
        turns = self.rotate_deg > 0.0 and bool(known.heads) and (not known.objects or draw(0) < 0.5)
        strengths = [1.0 + self.colour * (2.0 * draw(k) - 1.0) for k in (1, 2, 3)]
        return Change(
            crop=self._window(known, draw) if self.crop < 1.0 else whole,
            clockwise_deg=self.rotate_deg * (2.0 * draw(4) - 1.0) if turns else 0.0,
            mirrored=mirrored,
            brightness=strengths[0],
            contrast=strengths[1],
            saturation=strengths[2],
        )

    def _window(self, known: Record, draw: "_Draws") -> tuple[int, int, int, int]:
        sides = (known.image.width, known.image.height)
        if known.objects:
            boxes = [head.bbox for head in known.heads] + [thing.bbox for thing in known.objects]
        else:
            boxes = [known.heads[int(draw(5) * len(known.heads))].bbox] if known.heads else []
        share = self.crop + (1.0 - self.crop) * draw(6)
        spans = [_span(boxes, axis, side) for axis, side in enumerate(sides)]
        share = max(share, *((high - low) / side for (low, high), side in zip(spans, sides, strict=True)))
        (x0, x1), (y0, y1) = (
            _place(span, side, math.ceil(share * side - 1e-9), draw(7 + axis))
            for axis, (span, side) in enumerate(zip(spans, sides, strict=True))
        )
        return (x0, y0, x1, y1)


class _Draws:
    """Numbers in [0, 1) for one place of the stream, each by its own name."""

    def __init__(self, seed: int, position: int) -> None:
        self._seed, self._position = seed, position

    def __call__(self, name: int) -> float:
        return mix(self._seed, self._position, 0xA06, name) / 2.0**64


def _span(boxes: Sequence[Box], axis: int, side: int) -> tuple[int, int]:
    """Whole pixels of an axis that all boxes cover together, within the image; an empty span for none."""
    if not boxes:
        return (side // 2, side // 2)
    low, high = min(box[axis] for box in boxes), max(box[axis + 2] for box in boxes)
    return (min(max(math.floor(low), 0), side - 1), max(min(math.ceil(high), side), 1))


def _place(span: tuple[int, int], side: int, length: int, draw: float) -> tuple[int, int]:
    """A window of `length` pixels that covers `span`, anywhere it fits."""
    lowest, highest = max(0, span[1] - length), min(span[0], side - length)
    start = lowest + int(draw * (highest - lowest + 1))
    return (start, start + length)


@dataclass(frozen=True)
class Change:
    """What happens to one image, in this order: crop (pixels), turn about the crop's centre, mirror, colour."""

    crop: tuple[int, int, int, int]
    clockwise_deg: float = 0.0
    mirrored: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0

    def record(self, known: Record) -> Record:
        """What is known of the changed image, in pixels of the crop.

        Heads of which less than half is left are dropped, as are all objects of a turned image.
        """
        if self.crop != (0, 0, known.image.width, known.image.height):
            known = _cropped(known, self.crop)
        if self.clockwise_deg:
            known = _turned(known, self.clockwise_deg)
        return known.mirrored() if self.mirrored else known

    def cut(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3) to the pixels of the crop; a view where it is the whole image."""
        x0, y0, x1, y1 = self.crop
        cut = pixels[y0:y1, x0:x1]
        return cut if cut.shape == pixels.shape else np.ascontiguousarray(cut)

    def finish(self, image: "torch.Tensor") -> "torch.Tensor":
        """(3, S, S) uint8, the crop squeezed to a square, to (3, S, S) uint8: turned, mirrored, coloured."""
        coloured = (self.brightness, self.contrast, self.saturation) != (1.0, 1.0, 1.0)
        if self.clockwise_deg or coloured:
            image = image.contiguous()  # these two work on one colour after the other
        if self.clockwise_deg:
            image = _turned_image(image, self.clockwise_deg, self._sides())
        if self.mirrored:
            image = image.flip(-1)
        if coloured:
            image = _coloured(image, self.brightness, self.contrast, self.saturation)
        return image

    def _sides(self) -> tuple[int, int]:
        return self.crop[2] - self.crop[0], self.crop[3] - self.crop[1]


def _cropped(known: Record, crop: tuple[int, int, int, int]) -> Record:
    x0, y0, width, height = crop[0], crop[1], crop[2] - crop[0], crop[3] - crop[1]
    camera = known.image.camera
    if camera is not None:
        camera = replace(camera, cx=camera.cx - x0, cy=camera.cy - y0)
    image = replace(known.image, width=width, height=height, camera=camera)
    heads = [replace(head, bbox=_moved(head.bbox, -x0, -y0)) for head in known.heads]
    objects = [Object(thing.expression, _moved(thing.bbox, -x0, -y0)) for thing in known.objects]
    return Record(image, _inside(heads, width, height), objects)


def _turned(known: Record, clockwise_deg: float) -> Record:
    width, height = known.image.width, known.image.height
    angle = math.radians(clockwise_deg)
    cosine, sine = math.cos(angle), math.sin(angle)

    def turn(x: float, y: float) -> tuple[float, float]:
        x, y = x - width / 2, y - height / 2
        return cosine * x - sine * y + width / 2, sine * x + cosine * y + height / 2

    heads = []
    for head in known.heads:
        (x0, y0, x1, y1), rotation = head.bbox, head.rotation
        x, y = turn((x0 + x1) / 2, (y0 + y1) / 2)
        # The box of the turned outline, an ellipse that fills the old box; the turned box's own would be too large.
        half_x = math.hypot(cosine * (x1 - x0), sine * (y1 - y0)) / 2
        half_y = math.hypot(sine * (x1 - x0), cosine * (y1 - y0)) / 2
        if rotation is not None:
            rotation = tuple(pose.rotate_rotation(head.matrix, clockwise_deg).ravel().tolist())
        heads.append(replace(head, bbox=(x - half_x, y - half_y, x + half_x, y + half_y), rotation=rotation))
    camera = known.image.camera
    if camera is not None:
        square = abs(camera.fx / camera.fy - 1.0) < _SQUARE_PIXELS
        # Pixels that are not square would be skewed: no such camera can be written down.
        camera = Camera(camera.fx, camera.fy, *turn(camera.cx, camera.cy)) if square else None
    return Record(replace(known.image, camera=camera), _inside(heads, width, height), [])


def _inside(heads: list[Head], width: int, height: int) -> list[Head]:
    """Heads with boxes cut at the image's edges; those of which less than half is left are dropped."""
    kept = []
    for head in heads:
        x0, y0, x1, y1 = head.bbox
        box = (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
        left = max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) / ((x1 - x0) * (y1 - y0))
        if left >= _LEAST_INSIDE:
            kept.append(replace(head, bbox=box, visible=head.visible * min(left, 1.0)))
    return kept


def _moved(box: Box, x: float, y: float) -> Box:
    return (box[0] + x, box[1] + y, box[2] + x, box[3] + y)


def _turned_image(image: "torch.Tensor", clockwise_deg: float, sides: tuple[int, int]) -> "torch.Tensor":
    """(3, S, S) turned as the image of `sides` (width, height) that was squeezed to it."""
    import torch
    from torch.nn import functional

    angle, ratio, size_px = math.radians(clockwise_deg), sides[1] / sides[0], image.shape[-1]
    cosine, sine = math.cos(angle), math.sin(angle)
    # From places in the result to places in the source, both from -1 to 1 along each side; affine_grid does the same
    # as a product of matrices, in ten times the time.
    along = (torch.arange(size_px) * 2 + 1) / size_px - 1
    grid = torch.empty(1, size_px, size_px, 2)
    grid[0, :, :, 0] = cosine * along + (sine * ratio * along)[:, None]
    grid[0, :, :, 1] = -sine / ratio * along + (cosine * along)[:, None]
    fill = torch.tensor(FILL, dtype=torch.float32)[:, None, None]
    turned = functional.grid_sample((image - fill)[None], grid, "bilinear", "zeros", align_corners=False)[0]
    return (turned + fill).round_().clamp_(0, 255).to(torch.uint8)


def _coloured(image: "torch.Tensor", brightness: float, contrast: float, saturation: float) -> "torch.Tensor":
    """Saturation about each pixel's grey, contrast about the mean grey, then brightness: one matrix and one offset."""
    import torch

    luma = torch.tensor(_LUMA)
    matrix = saturation * torch.eye(3) + (1.0 - saturation) * luma.expand(3, 3)
    values = image.reshape(3, -1).float()
    mean = float(luma @ values.mean(dim=1))
    coloured = torch.addmm(torch.tensor(brightness * (1.0 - contrast) * mean), brightness * contrast * matrix, values)
    return coloured.round_().clamp_(0, 255).to(torch.uint8).reshape(image.shape)
