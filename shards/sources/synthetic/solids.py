"""The coloured solids of a scene."""

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from shards import pose
from shards.sources.synthetic.mesh import Mesh, cube, lathe, make_mesh, moved, sphere, torus
from shards.sources.synthetic.words import COLOURS

Array = np.ndarray


def make_solids(pairs: Sequence[tuple[str, str]], rng: np.random.Generator) -> list[Mesh]:
    """A solid about 2 high round the origin for each (colour, shape), leaning and turned at random in camera axes."""
    lean_deg = rng.uniform((-35, -25, -35), (35, 30, 35), (len(pairs), 3))
    lean_deg[:, 0] *= [1.7 if shape in ("cube", "ring") else 1.0 for _, shape in pairs]
    turns = pose.rotation_from_pose(*lean_deg.T) @ pose.HEAD_TO_CAMERA
    made = []
    for (colour, shape), turn in zip(pairs, turns, strict=True):
        mesh = moved(_unit(shape), turn)
        rgb = np.clip(np.array(COLOURS[colour]) * rng.uniform(0.92, 1.05), 0.0, 1.0)
        made.append(replace(mesh, colour=np.broadcast_to(rgb.astype(np.float32), mesh.position.shape)))
    return made


@functools.cache
def _unit(shape: str) -> Mesh:
    points, faces = _points(shape)
    return make_mesh(points, faces, (0.0, 0.0, 0.0), shine=0.18)


def _points(shape: str) -> tuple[Array, Array]:
    """A solid of about height 2 and the same bulk for every shape."""
    match shape:
        case "cube":
            points, faces = cube()
            return points * 0.72, faces
        case "ball":
            points, faces = sphere(15, 22)
            return points * 0.92, faces
        case "cone":
            return lathe([(1.0, 0.0, 0.0), (-0.9, 0.85, 0.85), (-0.9, 0.85, 0.85), (-0.9, 0.0, 0.0)])
        case "cylinder":
            rim = [(0.95, 0.6, 0.6)] * 2 + [(-0.95, 0.6, 0.6)] * 2
            return lathe([(0.95, 0.0, 0.0), *rim, (-0.95, 0.0, 0.0)])
        case "ring":
            return torus(0.36)
        case "vase":
            radii = [
                (-1.0, 0.0),
                (-1.0, 0.42),
                (-0.7, 0.60),
                (-0.25, 0.68),
                (0.15, 0.55),
                (0.5, 0.26),
                (0.7, 0.22),
                (1.0, 0.42),
            ]
            return lathe([(y, r, r) for y, r in radii])
        case _:
            raise ValueError(f"no such shape: {shape}")
