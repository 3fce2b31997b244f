"""Heads cut out of images, as crop networks want them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shards.pixels import resize
from shards.record import Record


def head_crops(pixels: np.ndarray, boxes: Sequence[Sequence[float]], size_px: int, margin: float) -> Tensor:
    """(H, W, 3) uint8 and boxes in its pixels to (heads, 3, size_px, size_px) uint8.

    A crop is a square about the box's centre, its longer side enlarged by `margin` on both sides; beyond the image it
    repeats the image's edge. Uniform scaling: squeezing a head would turn it.
    """
    height, width = pixels.shape[:2]
    crops = []
    for x0, y0, x1, y1 in boxes:
        side = max(1, round(max(x1 - x0, y1 - y0) * (1.0 + 2.0 * margin)))
        left, top = round((x0 + x1 - side) / 2), round((y0 + y1 - side) / 2)
        columns = np.clip(np.arange(left, left + side), 0, width - 1)
        rows = np.clip(np.arange(top, top + side), 0, height - 1)
        crops.append(resize(np.ascontiguousarray(pixels[rows[:, None], columns]), size_px))
    return torch.stack(crops) if crops else torch.empty(0, 3, size_px, size_px, dtype=torch.uint8)


@dataclass(frozen=True)
class CropView:
    """The view of a stream that gives an image's heads, in the record's order."""

    size_px: int
    margin: float

    def __call__(self, pixels: np.ndarray, known: Record) -> Tensor:
        """(H, W, 3) uint8 to (heads, 3, size_px, size_px) uint8."""
        return head_crops(pixels, [head.bbox for head in known.heads], self.size_px, self.margin)
