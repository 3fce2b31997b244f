"""Heads of domain C: dolls of ellipsoids, nothing taken from the mesh of domains A and B."""

from collections.abc import Sequence

import numpy as np

from shards.sources.synthetic.mesh import Mesh, join, make_mesh, sphere
from shards.sources.synthetic.people import seed_of

Array = np.ndarray


def make_doll(subject: str, domain: str) -> Mesh:
    """The doll's head and neck that `subject` always has: metres, head frame, origin inside the head."""
    rng = np.random.default_rng(seed_of(subject))
    w, h, d = rng.uniform(0.070, 0.085), rng.uniform(0.105, 0.122), rng.uniform(0.088, 0.102)
    skin = np.array([0.95, 0.80, 0.68]) * rng.uniform(0.45, 1.0) * rng.uniform(0.92, 1.08, 3)
    hair = rng.uniform(0.05, 0.75, 3)
    eye_x, eye_y, eye_z = w * 0.42, h * 0.05, d * 0.86
    parts = [
        _blob((0, 0, 0), (w, h, d), skin, boxed=True),
        _blob((0, -0.12 * h, 0.97 * d), (0.011, 0.020, 0.022 * rng.uniform(0.9, 1.4)), skin * 0.97, boxed=True),
        _blob((0, -0.48 * h, 0.80 * d), (0.024, 0.007, 0.013), np.array([0.68, 0.22, 0.24])),
        _blob((0, 0.14 * h, -0.10 * d), (w * 1.05, h * 0.98, d * 1.0), hair, boxed=True, shine=0.2),
        _neck(h, w, skin),
    ]
    for side in (1, -1):
        parts.append(_blob((side * eye_x, eye_y, eye_z), (0.015, 0.012, 0.011), (0.96, 0.96, 0.96), shine=0.3))
        parts.append(_blob((side * eye_x, eye_y, eye_z + 0.007), (0.007, 0.007, 0.006), rng.uniform(0.02, 0.35, 3)))
        parts.append(_blob((side * eye_x, eye_y + 0.024, eye_z + 0.002), (0.019, 0.004, 0.008), hair * 0.6))
        parts.append(_blob((side * w, -0.10 * h, 0), (0.010, 0.026, 0.017), skin * 0.93, boxed=True))
    return join(parts)


def _blob(
    centre: Sequence[float],
    radii: Sequence[float],
    colour: Sequence[float] | Array,
    boxed: bool = False,
    shine: float = 0.1,
) -> Mesh:
    points, faces = sphere(15, 20)
    normal = points / np.asarray(radii)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    position = points * np.asarray(radii) + np.asarray(centre)
    return make_mesh(position, faces, np.clip(colour, 0, 1), normal=normal, boxed=boxed, shine=shine)


def _neck(h: float, w: float, skin: Array) -> Mesh:
    points, faces = sphere(13, 16)
    position = points * [0.55 * w, 0.55 * h, 0.6 * w] + [0, -1.05 * h, -0.01]
    return make_mesh(position, faces, skin * 0.92, rigid=0.0, owned=False)
