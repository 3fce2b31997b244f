"""The renderer: z-buffer and shading, compiled by numba when it is first used.

Pixel (x, y) covers [x, x+1) × [y, y+1); it is sampled `SUPERSAMPLING` times a side. A triangle is seen from both
sides. `reference.py` says the same in plain numpy and is what the tests compare with.
"""

from dataclasses import dataclass, replace

import numpy as np

from shards.sources.synthetic.mesh import Mesh

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


def project_extent(mesh: Mesh, focal_px: float, size_px: int) -> tuple[Array, Array, float]:
    """Lowest and highest (x, y) of the boxed vertices in pixels, and the depth of the nearest in metres."""
    from shards.sources.synthetic import kernels

    x0, y0, x1, y1, near_m = kernels.extent(mesh.position, mesh.boxed, float(focal_px), size_px / 2)
    return np.array([x0, y0]), np.array([x1, y1]), float(near_m)


def bend(mesh: Mesh, head: Array, bust: Array, pivot: Array, centre: Array) -> Mesh:
    """The mesh in camera coordinates: its origin at `centre`, head turned by `head`, bust by `bust` about `pivot`."""
    from shards.sources.synthetic import kernels

    position, normal = np.empty_like(mesh.position), np.empty_like(mesh.normal)
    joint = head @ pivot - bust @ pivot
    kernels.bend(mesh.position, mesh.normal, mesh.rigid, head, bust, centre, joint, position, normal)
    return replace(mesh, position=position, normal=normal)


def measure(batch: Batch, seen: Visibility, things: int) -> tuple[Array, Array]:
    """For each thing: share of it that shows (things,), and the box of that in pixels (things, 4); 0 where none."""
    from shards.sources.synthetic import kernels

    alone, shown = np.zeros(things, np.int64), np.zeros(things, np.int64)
    boxes = np.zeros((things, 4), np.int64)
    kernels.measure(seen.face, batch.slot, seen.covered, alone, shown, boxes)
    return shown / np.maximum(alone, 1), np.where(shown[:, None] > 0, boxes, 0) / SUPERSAMPLING
