"""What a head wears: long hair, bun, hats, glasses, and the bust it stands on. Metres, head frame."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shards.sources.synthetic.mesh import Mesh, grid_faces, lathe, make_mesh, moved, smoothstep, sphere, torus

Array = np.ndarray

_HATS_A = ((0.20, 0.25, 0.40), (0.45, 0.12, 0.12), (0.25, 0.27, 0.25), (0.70, 0.66, 0.58))
_HATS_B = ((0.75, 0.60, 0.15), (0.15, 0.40, 0.38), (0.55, 0.25, 0.50), (0.85, 0.85, 0.85))


@dataclass(frozen=True)
class Skull:
    """Extents of a head without its ears, from its centre, in metres (back and chin are negative)."""

    half_width: float
    top: float
    front: float
    back: float
    chin: float

    @property
    def middle(self) -> float:
        """z of the middle between forehead and back."""
        return (self.front + self.back) / 2

    @property
    def half_depth(self) -> float:
        """Half of the length from forehead to back."""
        return (self.front - self.back) / 2


def hair_and_hat(style: str, skull: Skull, hair: Array, rng: np.random.Generator, domain: str) -> list[Mesh]:
    """The meshes of a style: short and bald have none, their hair is in the texture."""
    hats = _HATS_A if domain == "A" else _HATS_B
    hat = np.array(hats[rng.integers(len(hats))]) * rng.uniform(0.8, 1.1)
    match style:
        case "bob":
            return [_hair_shell(skull, hair, bottom=skull.chin * rng.uniform(0.75, 1.0), rng=rng)]
        case "long":
            return [_hair_shell(skull, hair, bottom=skull.chin * rng.uniform(1.35, 1.6), rng=rng)]
        case "bun":
            return [_bun(skull, hair, rng)]
        case "beanie":
            return [_crown(skull, hat, 1.10, rng), _brim(skull, hat * 0.7, reach=0.006, drop=0.016)]
        case "cap":
            return [_crown(skull, hat, 1.07, rng), _visor(skull, hat * 0.8)]
        case "brim":
            return [_crown(skull, hat, 1.07, rng), _brim(skull, hat * 0.85, reach=0.036, drop=0.004)]
        case _:
            return []


def _hair_shell(skull: Skull, colour: Array, bottom: float, rng: np.random.Generator) -> Mesh:
    """Hair that hangs around the head, open at the face."""
    rows, columns = 20, 30
    top, thick = skull.top + 0.010, rng.uniform(1.08, 1.14)
    down = np.linspace(0.0, 1.0, rows) ** 1.3
    y = (top + (bottom - top) * down)[:, None]
    round_ = np.sqrt(np.clip(1.0 - (np.clip(y, 0, None) / top) ** 2, 0.0, 1.0))
    hang = 1.0 - 0.10 * smoothstep(-y / 0.2)
    opening = np.radians(rng.uniform(84, 96)) * smoothstep((skull.top * rng.uniform(0.70, 0.80) - y) / 0.05)
    azimuth = opening + np.linspace(0.0, 1.0, columns)[None] * (2 * np.pi - 2 * opening)
    lock = 1.0 + 0.012 * np.sin(azimuth * 11.0)
    x = np.sin(azimuth) * skull.half_width * thick * round_ * hang * lock
    z = skull.middle + np.cos(azimuth) * skull.half_depth * thick * round_ * hang * lock
    points = np.stack([x, np.broadcast_to(y, x.shape), z], -1).reshape(-1, 3)
    mesh = make_mesh(points, grid_faces(rows, columns, wrap=False), colour, shine=0.12)
    strands = 1.0 + 0.10 * np.tile(rng.standard_normal(columns), rows)[:, None]
    mesh.colour[:] = np.clip(mesh.colour * strands, 0.0, 1.0)
    mesh.boxed[:] = points[:, 1] > skull.chin
    return mesh


def _bun(skull: Skull, colour: Array, rng: np.random.Generator) -> Mesh:
    points, faces = sphere(11, 16)
    radius = skull.half_width * rng.uniform(0.42, 0.55)
    centre = np.array([0.0, skull.top * rng.uniform(0.45, 0.8), skull.back - radius * 0.35])
    return make_mesh(points * radius + centre, faces, colour * 0.95, normal=points, shine=0.12)


def _crown(skull: Skull, colour: Array, loose: float, rng: np.random.Generator) -> Mesh:
    rows = []
    edge, top = _hat_edge(skull), skull.top + rng.uniform(0.008, 0.022)
    for level in np.linspace(0.0, 1.0, 9):
        width = np.sqrt(1.0 - (1.0 - level) ** 2.4)
        rows.append((top + (edge - top) * level, skull.half_width * loose * width, skull.half_depth * loose * width))
    points, faces = lathe(rows)
    mesh = make_mesh(points + [0, 0, skull.middle], faces, colour, shine=0.05, boxed=True)
    return mesh


def _hat_edge(skull: Skull) -> float:
    return skull.top * 0.52


def _brim(skull: Skull, colour: Array, reach: float, drop: float) -> Mesh:
    width, depth, edge = skull.half_width * 1.08, skull.half_depth * 1.08, _hat_edge(skull)
    outer = (edge - drop, width + reach, depth + reach)
    profile = [
        (edge + 0.008, width, depth),
        (edge + 0.004, width + reach, depth + reach),
        outer,
        (edge - drop, width, depth),
    ]
    points, faces = lathe(profile)
    return make_mesh(points + [0, 0, skull.middle], faces, colour, shine=0.05)


def _visor(skull: Skull, colour: Array) -> Mesh:
    columns = 15
    azimuth = np.radians(np.linspace(-62, 62, columns))
    edge, width, depth = _hat_edge(skull), skull.half_width * 1.07, skull.half_depth * 1.07
    inner = np.stack([np.sin(azimuth) * width, np.full(columns, edge + 0.002), np.cos(azimuth) * depth], 1)
    bulge = np.cos(azimuth * 1.45)
    outer = inner + np.stack([np.zeros(columns), -0.014 * bulge, 0.058 * bulge], 1)
    under = inner - [0, 0.006, 0]
    points = np.concatenate([inner, outer, under]) + [0, 0, skull.middle]
    return make_mesh(points, grid_faces(3, columns, wrap=False), colour, shine=0.05)


def glasses(eyes: Sequence[Array], eye_radius: float, rng: np.random.Generator) -> list[Mesh]:
    """Two rims, a bridge and the bars to the ears; `eyes` are the eyeballs' centres."""
    colour = np.array([0.05, 0.05, 0.06]) if rng.random() < 0.7 else rng.uniform(0.1, 0.5, 3)
    radius, square = eye_radius * rng.uniform(1.55, 1.8), rng.uniform(0.75, 0.95)
    ring, faces = torus(0.11, 24, 6)
    parts = []
    for centre in eyes:
        front = np.asarray(centre) + [0.0, -0.002, eye_radius * 1.75]
        parts.append(make_mesh(ring * [radius, radius * square, radius * 0.9] + front, faces, colour, shine=0.3))
        side = float(np.sign(centre[0]))
        hinge = front + [side * radius, 0.003, 0.0]
        parts.append(_bar(hinge, hinge + [side * 0.012, 0.004, -0.09], 0.0016, colour))
    left, right = (np.asarray(centre) + [0.0, 0.003, eye_radius * 1.8] for centre in eyes)
    parts.append(_bar(left - [radius * 0.95, 0, 0], right + [radius * 0.95, 0, 0], 0.0014, colour))
    return parts


def _bar(start: Array, end: Array, radius: float, colour: Array) -> Mesh:
    along = end - start
    length = float(np.linalg.norm(along))
    axis = along / length
    across = np.cross(axis, [0.0, 1.0, 0.2])
    across /= np.linalg.norm(across)
    points, faces = lathe([(0.0, radius, radius), (length, radius, radius)], columns=6)
    turn = np.stack([across, axis, np.cross(across, axis)], axis=1)
    return moved(make_mesh(points, faces, colour, shine=0.2), turn, tuple(start))


def bust(collar: Array, rng: np.random.Generator, domain: str) -> Mesh:
    """A closed, clothed bust below the neck whose ring of points is `collar` (K, 3)."""
    centre = (collar.min(0) + collar.max(0)) / 2
    rx, rz = (collar.max(0) - collar.min(0))[[0, 2]] / 2
    y = float(collar[:, 1].max())
    shoulder = rng.uniform(0.135, 0.165)
    profile = [
        (y, rx * 1.02, rz * 0.98),
        (y - 0.006, rx * 1.16, rz * 1.10),
        (y - 0.022, rx * 1.30, rz * 1.20),
        (y - 0.038, shoulder * 0.72, rz * 1.28),
        (y - 0.056, shoulder * 0.92, rz * 1.32),
        (y - 0.080, shoulder, rz * 1.35),
        (y - 0.125, shoulder * 0.98, rz * 1.35),
        (y - 0.135, shoulder * 0.90, rz * 1.2),
        (y - 0.135, 0.0, 0.0),
    ]
    points, faces = lathe(profile, columns=32)
    low, high = (0.12, 0.85) if domain == "A" else (0.10, 0.70)
    colour = rng.uniform(low, high, 3)
    mesh = make_mesh(points + [centre[0], 0.0, centre[2]], faces, colour, shine=0.03, rigid=0.0, owned=False)
    if domain == "B":
        stripes = (np.arange(len(profile)) % 2 == 0).repeat(32)
        mesh.colour[stripes] *= 0.6
    return mesh
