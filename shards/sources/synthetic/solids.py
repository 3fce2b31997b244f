"""The coloured solids of a scene."""

import functools

import numpy as np

from shards import pose
from shards.sources.synthetic.mesh import Mesh, cube, lathe, make_mesh, moved, sphere, torus
from shards.sources.synthetic.words import COLOURS

Array = np.ndarray


def make_solid(colour: str, shape: str, height_m: float, centre: Array, rng: np.random.Generator) -> Mesh:
    """A solid about `height_m` large at `centre` (camera coordinates), leaning and turned at random."""
    lean = (rng.uniform(-35, 35), rng.uniform(-25, 30), rng.uniform(-35, 35))
    if shape in ("cube", "ring"):
        lean = (rng.uniform(-60, 60), *lean[1:])
    turn = pose.rotation_from_pose(*lean) @ pose.HEAD_TO_CAMERA
    rgb = np.clip(np.array(COLOURS[colour]) * rng.uniform(0.92, 1.05), 0.0, 1.0)
    mesh = _unit(shape)
    mesh = moved(mesh, turn, tuple(centre), height_m / 2)
    mesh.colour[:] = rgb
    return mesh


def _unit(shape: str) -> Mesh:
    points, faces = _points(shape)
    return make_mesh(points, faces, (0.0, 0.0, 0.0), shine=0.18)


@functools.cache
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
