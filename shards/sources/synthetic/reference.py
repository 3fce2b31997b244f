"""The renderer in plain numpy: slow, simple, and the measure of the compiled one. Same inputs, same outputs."""

import numpy as np

from shards.sources.synthetic.raster import SUPERSAMPLING, Batch, Light, Visibility
from shards.sources.synthetic.surface import (
    EYE,
    GLOSS,
    IRIS_COSINE,
    NEAR_M,
    PLAIN,
    PUPIL_COSINE,
    TEXTURE_HIGH_DEG,
    TEXTURE_LOW_DEG,
    WHITE,
    WRAP,
)

Array = np.ndarray


def see(batch: Batch, focal_px: float, size_px: int) -> Visibility:
    """As `raster.see`."""
    side = size_px * SUPERSAMPLING
    face, nearest = np.full((side, side), -1, np.int32), np.zeros((side, side))
    weights, covered = np.zeros((side, side, 2), np.float32), np.zeros((side, side), np.uint32)
    inverse = 1.0 / np.maximum(batch.position[:, 2].astype(float), 1e-6)
    screen = batch.position[:, :2].astype(float) * inverse[:, None] * focal_px * SUPERSAMPLING + side / 2
    low = np.maximum(np.ceil(screen[batch.faces].min(1) - 0.5), 0).astype(int)
    high = np.minimum(np.floor(screen[batch.faces].max(1) - 0.5), side - 1).astype(int) + 1
    drawn = (batch.position[batch.faces, 2] >= NEAR_M).all(1) & (low < high).all(1)
    for t in np.flatnonzero(drawn):
        corners, (x0, y0), (x1, y1) = batch.faces[t], low[t], high[t]
        window = np.s_[y0:y1, x0:x1]
        flat = _flat_weights(screen[corners], np.arange(x0, x1)[None, :] + 0.5, np.arange(y0, y1)[:, None] + 0.5)
        if flat is None:
            continue
        inside = (flat >= 0).all(0)
        depth = np.tensordot(inverse[corners], flat, 1)
        if batch.slot[t] >= 0:
            covered[window] |= np.where(inside, np.uint32(1 << int(batch.slot[t])), np.uint32(0))
        wins = inside & (depth > nearest[window])
        nearest[window][wins], face[window][wins] = depth[wins], t
        for k in range(2):
            weights[window][wins, k] = (flat[k] * inverse[corners[k]])[wins] / depth[wins]
    return Visibility(face, weights, covered)


def _flat_weights(corners: Array, x: Array, y: Array) -> Array | None:
    """(3, rows, columns) weights of the corners on the screen, at the samples (x, y); None for a mere line."""
    (ax, ay), (bx, by), (cx, cy) = corners
    area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
    if abs(area) < 1e-12:
        return None
    first = ((bx - x) * (cy - y) - (cx - x) * (by - y)) / area
    second = ((cx - x) * (ay - y) - (ax - x) * (cy - y)) / area
    return np.stack([first, second, 1.0 - first - second])


def shade(batch: Batch, seen: Visibility, focal_px: float, background: Array, light: Light) -> Array:
    """As `raster.shade`."""
    fine = background.astype(float).repeat(SUPERSAMPLING, 0).repeat(SUPERSAMPLING, 1)
    hit = seen.face >= 0
    face = seen.face[hit]
    first, second = seen.weights[hit].astype(float).T
    weights = np.stack([first, second, 1.0 - first - second], 1)[..., None]
    normal, point, chart, colour = (
        (attribute[batch.faces[face]].astype(float) * weights).sum(1)
        for attribute in (batch.normal, batch.position, batch.chart, batch.colour)
    )
    material = batch.texture[face]
    cosine = chart[:, 2] / (np.linalg.norm(chart, axis=1) + 1e-12)
    colour[(material == EYE) & (cosine > PUPIL_COSINE)] = 0.02
    colour[(material == EYE) & (cosine < IRIS_COSINE)] = WHITE
    textured = material > PLAIN
    colour[textured] = _texture(batch.textures, material[textured], chart[textured])
    gain, spot = _lit(normal, point, light, batch.shine[face])
    fine[hit] = np.minimum(1.0, colour * gain[:, None] + spot[:, None])
    size = background.shape[0]
    return fine.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 3).mean((1, 3)).astype(np.float32)


def _texture(textures: Array, index: Array, chart: Array) -> Array:
    rows, columns = textures.shape[1:3]
    azimuth = np.degrees(np.arctan2(chart[:, 0], chart[:, 2]))
    elevation = np.degrees(np.arcsin(np.clip(chart[:, 1] / (np.linalg.norm(chart, axis=1) + 1e-12), -1.0, 1.0)))
    x = (azimuth + 180.0) / 360.0 * columns - 0.5
    y = (TEXTURE_HIGH_DEG - elevation) / (TEXTURE_HIGH_DEG - TEXTURE_LOW_DEG) * rows - 0.5
    y = np.clip(y, 0.0, rows - 1.0)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    fx, fy = (x - left)[:, None], (y - top)[:, None]
    left, right, bottom = left % columns, (left + 1) % columns, np.minimum(top + 1, rows - 1)
    upper = textures[index, top, left] * (1.0 - fx) + textures[index, top, right] * fx
    lower = textures[index, bottom, left] * (1.0 - fx) + textures[index, bottom, right] * fx
    return (upper * (1.0 - fy) + lower * fy) / 255.0


def _lit(normal: Array, point: Array, light: Light, shine: Array) -> tuple[Array, Array]:
    towards_light = np.asarray(light.direction, float) / np.linalg.norm(light.direction)
    normal = normal / (np.linalg.norm(normal, axis=1, keepdims=True) + 1e-12)
    normal = np.where((normal * point).sum(1, keepdims=True) <= 0, normal, -normal)
    diffuse = np.clip((1.0 - WRAP) * (normal @ towards_light) + WRAP, 0.0, 1.0)
    half = towards_light - point / (np.linalg.norm(point, axis=1, keepdims=True) + 1e-12)
    half /= np.linalg.norm(half, axis=1, keepdims=True) + 1e-12
    glint = np.maximum(0.0, (normal * half).sum(1))
    return light.ambient + (1.0 - light.ambient) * diffuse, shine * glint**GLOSS
