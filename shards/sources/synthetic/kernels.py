"""The rasteriser's inner loops, compiled by numba: import this module only to render."""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

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


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's can hold the cache
        return numba.njit(function)


@_compiled
def see(position, faces, slot, focal, centre, out_face, out_weights, out_covered):  # type: ignore[no-untyped-def]
    """Fill, for each sample, the nearest face, its perspective-correct weights, and the bits of all things there."""
    n = position.shape[0]
    u, v, inverse = np.empty(n), np.empty(n), np.empty(n)
    for i in range(n):
        inverse[i] = 1.0 / max(float(position[i, 2]), 1e-6)
        u[i] = focal * position[i, 0] * inverse[i] + centre
        v[i] = focal * position[i, 1] * inverse[i] + centre
    nearest = np.zeros(out_face.shape, np.float64)
    for t in range(faces.shape[0]):
        a, b, c = faces[t, 0], faces[t, 1], faces[t, 2]
        if min(position[a, 2], position[b, 2], position[c, 2]) >= NEAR_M:
            bit = np.uint32(0)
            if slot[t] >= 0:
                bit = np.uint32(1) << np.uint32(slot[t])
            _fill(t, a, b, c, u, v, inverse, bit, nearest, out_face, out_weights, out_covered)


@_compiled
def _fill(t, a, b, c, u, v, inverse, bit, nearest, out_face, out_weights, out_covered):  # type: ignore[no-untyped-def]
    ax, ay, bx, by, cx, cy = u[a], v[a], u[b], v[b], u[c], v[c]
    side = out_face.shape[0]
    x0, x1 = max(0, int(np.ceil(min(ax, bx, cx) - 0.5))), min(side - 1, int(np.floor(max(ax, bx, cx) - 0.5)))
    y0, y1 = max(0, int(np.ceil(min(ay, by, cy) - 0.5))), min(side - 1, int(np.floor(max(ay, by, cy) - 0.5)))
    area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
    if x0 > x1 or y0 > y1 or abs(area) < 1e-12:
        return
    share = 1.0 / area
    step_a, step_b = (by - cy) * share, (cy - ay) * share
    first_x = x0 + 0.5
    for y in range(y0, y1 + 1):
        py = y + 0.5
        row_a = ((bx - first_x) * (cy - py) - (cx - first_x) * (by - py)) * share
        row_b = ((cx - first_x) * (ay - py) - (ax - first_x) * (cy - py)) * share
        for x in range(x0, x1 + 1):
            wa = row_a + (x - x0) * step_a
            wb = row_b + (x - x0) * step_b
            wc = 1.0 - wa - wb
            if wa < 0.0 or wb < 0.0 or wc < 0.0:
                continue
            out_covered[y, x] |= bit
            nearness = wa * inverse[a] + wb * inverse[b] + wc * inverse[c]
            if nearness > nearest[y, x]:
                nearest[y, x] = nearness
                out_face[y, x] = t
                out_weights[y, x, 0] = wa * inverse[a] / nearness
                out_weights[y, x, 1] = wb * inverse[b] / nearness


@_compiled
def shade(  # type: ignore[no-untyped-def]
    position, normal, chart, colour, faces, texture, shine, textures, face, weights, light, ambient, background, image
):
    """Fill the image: the mean over a pixel's samples of what each sees, the background where it sees nothing."""
    samples = face.shape[0] // image.shape[0]
    rgb, total = np.empty(3), np.empty(3)
    n, p, q = np.empty(3), np.empty(3), np.empty(3)
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            total[:] = 0.0
            for y in range(row * samples, (row + 1) * samples):
                for x in range(column * samples, (column + 1) * samples):
                    t = face[y, x]
                    if t < 0:
                        for k in range(3):
                            total[k] += background[row, column, k]
                        continue
                    a, b, c = faces[t, 0], faces[t, 1], faces[t, 2]
                    wa, wb = float(weights[y, x, 0]), float(weights[y, x, 1])
                    wc = 1.0 - wa - wb
                    for k in range(3):
                        n[k] = wa * normal[a, k] + wb * normal[b, k] + wc * normal[c, k]
                        p[k] = wa * position[a, k] + wb * position[b, k] + wc * position[c, k]
                        q[k] = wa * chart[a, k] + wb * chart[b, k] + wc * chart[c, k]
                        rgb[k] = wa * colour[a, k] + wb * colour[b, k] + wc * colour[c, k]
                    if texture[t] != PLAIN:
                        _material(texture[t], textures, q, rgb)
                    gain, spot = _lit(n, p, light, ambient, shine[t])
                    for k in range(3):
                        total[k] += min(1.0, rgb[k] * gain + spot)
            for k in range(3):
                image[row, column, k] = total[k] / (samples * samples)


@_compiled
def _material(index, textures, q, rgb):  # type: ignore[no-untyped-def]
    length = np.sqrt(q[0] * q[0] + q[1] * q[1] + q[2] * q[2]) + 1e-12
    if index == EYE:
        cosine = q[2] / length
        if cosine > PUPIL_COSINE:
            rgb[:] = 0.02
        elif cosine < IRIS_COSINE:
            rgb[:] = WHITE
        return
    rows, columns = textures.shape[1], textures.shape[2]
    azimuth = np.degrees(np.arctan2(q[0], q[2]))
    elevation = np.degrees(np.arcsin(max(-1.0, min(1.0, q[1] / length))))
    x = (azimuth + 180.0) / 360.0 * columns - 0.5
    y = (TEXTURE_HIGH_DEG - elevation) / (TEXTURE_HIGH_DEG - TEXTURE_LOW_DEG) * rows - 0.5
    y = max(0.0, min(rows - 1.0, y))
    left, top = int(np.floor(x)), int(np.floor(y))
    fx, fy = x - left, y - top
    left, right, bottom = left % columns, (left + 1) % columns, min(top + 1, rows - 1)
    for k in range(3):
        upper = textures[index, top, left, k] * (1.0 - fx) + textures[index, top, right, k] * fx
        lower = textures[index, bottom, left, k] * (1.0 - fx) + textures[index, bottom, right, k] * fx
        rgb[k] = (upper * (1.0 - fy) + lower * fy) / 255.0


@_compiled
def _lit(n, p, light, ambient, shine):  # type: ignore[no-untyped-def]
    normal_length = np.sqrt(n[0] * n[0] + n[1] * n[1] + n[2] * n[2]) + 1e-12
    distance = np.sqrt(p[0] * p[0] + p[1] * p[1] + p[2] * p[2]) + 1e-12
    facing = 1.0 if n[0] * p[0] + n[1] * p[1] + n[2] * p[2] <= 0.0 else -1.0
    scale = facing / normal_length
    cosine = scale * (n[0] * light[0] + n[1] * light[1] + n[2] * light[2])
    diffuse = max(0.0, min(1.0, (1.0 - WRAP) * cosine + WRAP))
    hx, hy, hz = light[0] - p[0] / distance, light[1] - p[1] / distance, light[2] - p[2] / distance
    half_length = np.sqrt(hx * hx + hy * hy + hz * hz) + 1e-12
    glint = max(0.0, scale * (n[0] * hx + n[1] * hy + n[2] * hz) / half_length)
    return ambient + (1.0 - ambient) * diffuse, shine * glint**GLOSS


@_compiled
def bend(position, normal, rigid, head, bust, shift, bust_shift, out_position, out_normal):  # type: ignore[no-untyped-def]
    """Each vertex turned by `head` and by `bust` (3, 3), and the two mixed by its share `rigid` of the head."""
    for i in range(position.shape[0]):
        w = rigid[i]
        for k in range(3):
            p, n, q, m = shift[k], 0.0, shift[k] + bust_shift[k], 0.0
            for j in range(3):
                p += head[k, j] * position[i, j]
                n += head[k, j] * normal[i, j]
                q += bust[k, j] * position[i, j]
                m += bust[k, j] * normal[i, j]
            out_position[i, k] = w * p + (1.0 - w) * q
            out_normal[i, k] = w * n + (1.0 - w) * m


@_compiled
def extent(position, boxed, focal, centre):  # type: ignore[no-untyped-def]
    """x0, y0, x1, y1 in pixels and the nearest depth of the projected vertices that are `boxed`."""
    x0, y0, x1, y1, near = np.inf, np.inf, -np.inf, -np.inf, np.inf
    for i in range(position.shape[0]):
        if boxed[i]:
            scale = focal / position[i, 2]
            x, y = position[i, 0] * scale + centre, position[i, 1] * scale + centre
            x0, y0, x1, y1 = min(x0, x), min(y0, y), max(x1, x), max(y1, y)
            near = min(near, float(position[i, 2]))
    return x0, y0, x1, y1, near


@_compiled
def measure(face, slot, covered, alone, seen, boxes):  # type: ignore[no-untyped-def]
    """Count the samples where each thing lies (alone) and shows (seen); boxes: x0, y0, x1, y1 of the latter."""
    boxes[:, :2] = face.shape[0]
    for y in range(face.shape[0]):
        for x in range(face.shape[1]):
            if covered[y, x]:
                for k in range(alone.shape[0]):
                    alone[k] += (covered[y, x] >> np.uint32(k)) & np.uint32(1)
            if face[y, x] >= 0 and slot[face[y, x]] >= 0:
                k = slot[face[y, x]]
                seen[k] += 1
                boxes[k, 0], boxes[k, 1] = min(boxes[k, 0], x), min(boxes[k, 1], y)
                boxes[k, 2], boxes[k, 3] = max(boxes[k, 2], x + 1), max(boxes[k, 3], y + 1)
