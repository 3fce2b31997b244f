"""The renderer: z-buffer and shading, compiled by numba when it is first used.

Pixel (x, y) covers [x, x+1) × [y, y+1); it is sampled `SUPERSAMPLING` times a side. A triangle is seen from both
sides. `reference.py` says the same in plain numpy and is what the tests compare with.
"""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

SUPERSAMPLING = 2


@dataclass(frozen=True)
class Batch:
    """All triangles of a scene in camera coordinates (x right, y down, z forward, metres).

    position, normal, chart, colour: (N, 3) float32; faces (M, 3) int32; texture (M,): index into textures, or a
    material below 0; shine (M,) float32; slot (M,): number of the labelled thing (0..31), -1 where none;
    textures (T, rows, columns, 3) uint8.
    """

    position: Array
    normal: Array
    chart: Array
    colour: Array
    faces: Array
    texture: Array
    shine: Array
    slot: Array
    textures: Array


@dataclass(frozen=True)
class Light:
    """direction: (3,) towards the light, camera coordinates; ambient: share of light from everywhere."""

    direction: Array
    ambient: float


@dataclass(frozen=True)
class Visibility:
    """What each sample of the supersampled image sees: face (H, W) index or -1, weights (H, W, 2) of the first two
    corners, covered (H, W): bit k set where thing k lies, hidden or not."""

    face: Array
    weights: Array
    covered: Array

    def slots(self, batch: Batch) -> Array:
        """(H, W) number of the thing seen, -1 for none."""
        return np.where(self.face >= 0, batch.slot[self.face], -1)


def see(batch: Batch, focal_px: float, size_px: int) -> Visibility:
    """Resolve visibility on the supersampled grid of a square image whose principal point is its centre."""
    side = size_px * SUPERSAMPLING
    face = np.full((side, side), -1, np.int32)
    weights = np.zeros((side, side, 2), np.float32)
    covered = np.zeros((side, side), np.uint32)
    from shards.sources.synthetic import kernels

    kernels.see(
        batch.position, batch.faces, batch.slot, float(focal_px * SUPERSAMPLING), side / 2, face, weights, covered
    )
    return Visibility(face, weights, covered)


def shade(batch: Batch, seen: Visibility, focal_px: float, background: Array, light: Light) -> Array:
    """(H, W, 3) float32 image, 0..1, over the (H, W, 3) background."""
    image = np.empty(background.shape, np.float32)
    direction = np.asarray(light.direction, np.float64) / np.linalg.norm(light.direction)
    from shards.sources.synthetic import kernels

    kernels.shade(
        batch.position,
        batch.normal,
        batch.chart,
        batch.colour,
        batch.faces,
        batch.texture,
        batch.shine,
        batch.textures,
        seen.face,
        seen.weights,
        direction,
        float(light.ambient),
        np.ascontiguousarray(background, np.float32),
        image,
    )
    return image
