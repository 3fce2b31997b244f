"""Heads of domains A and B: the MakeHuman mesh, shaped, painted, dressed and put on a closed bust."""

import functools
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shards.sources.synthetic import wear
from shards.sources.synthetic.mesh import Mesh, join, make_mesh, smoothstep, sphere, vertex_normals
from shards.sources.synthetic.paint import Look, hairline_deg, paint
from shards.sources.synthetic.surface import EYE, TEXTURED

Array = np.ndarray

_ASSET = Path(__file__).with_name("head_asset.npz")
_SKINS = ((0.95, 0.78, 0.68), (0.88, 0.68, 0.54), (0.80, 0.60, 0.46), (0.64, 0.44, 0.32), (0.46, 0.31, 0.23))
_NATURAL_HAIR = (
    (0.08, 0.06, 0.05),
    (0.24, 0.15, 0.08),
    (0.42, 0.27, 0.13),
    (0.72, 0.56, 0.30),
    (0.55, 0.54, 0.52),
    (0.48, 0.18, 0.08),
)
_DYED_HAIR = (
    (0.30, 0.10, 0.35),
    (0.10, 0.30, 0.42),
    (0.60, 0.22, 0.30),
    (0.85, 0.82, 0.75),
    (0.16, 0.34, 0.20),
    (0.14, 0.10, 0.09),
    (0.60, 0.40, 0.16),
)
_IRISES = ((0.25, 0.15, 0.08), (0.20, 0.40, 0.60), (0.28, 0.42, 0.24), (0.12, 0.08, 0.06))
_STYLES_A = {"short": 0.42, "bald": 0.10, "bob": 0.14, "long": 0.14, "bun": 0.08, "beanie": 0.06, "cap": 0.06}
_STYLES_B = {"short": 0.30, "bald": 0.08, "bob": 0.14, "long": 0.14, "bun": 0.10, "brim": 0.12, "cap": 0.12}


@dataclass(frozen=True)
class Base:
    """The mean shape and all that is known of its vertices. Decimetres, y up, z out of the face.

    corners (18, N, 3) and modifiers (214, N, 3) are added to `position`; chart: the mean shape seen from its centre.
    """

    position: Array
    faces: Array
    corners: Array
    modifiers: Array
    chart: Array
    ear: Array
    rigid: Array
    left_eye: Array
    right_eye: Array
    collar: Array
    owned: Array
    boxed: Array


_EYE_CENTRE = np.array([0.0, 7.284, 1.245])
_EYE_DISTANCE = 0.6155
_SKULL_CENTRE = np.array([0.0, 7.15, 0.45])


@functools.cache
def load_base() -> Base:
    """The asset, cut to head and neck; read once."""
    with np.load(_ASSET) as asset:
        position, faces = asset["v"].astype(np.float32), asset["f"].astype(np.int32)
        is_eye, is_skin = asset["lab"] == 1, asset["lab"] == 0
        corners, modifiers = asset["corners"].astype(np.float32), asset["mods"].astype(np.float32)
        names = [str(name) for name in asset["mod_names"]]
    eye = np.zeros(len(position), bool)
    eye[faces[is_eye].ravel()] = True
    x, y, z = position.T
    neck = (y > 5.86) & ((np.abs(x) < 0.58) | (y > 6.2))
    kept = faces[is_skin & neck[faces].all(1)]
    lift = y + 0.5 * (z - 0.2)
    ear = np.linalg.norm(modifiers[names.index("ears/ear-wing-incr")], axis=1)
    return Base(
        position=position,
        faces=kept,
        corners=corners,
        modifiers=modifiers,
        chart=(position - _SKULL_CENTRE).astype(np.float32),
        ear=smoothstep(ear / ear.max() * 3.0 - 0.3).astype(np.float32),
        rigid=smoothstep((lift - 5.75) / 0.85).astype(np.float32),
        left_eye=eye & (x > 0),
        right_eye=eye & (x < 0),
        collar=(y > 5.86) & (y < 6.06) & (np.abs(x) < 0.58),
        owned=(lift[kept] > 6.45).all(1),
        boxed=(lift > 6.62) & (y > 6.1) & ~eye,
    )


def seed_of(text: str) -> int:
    """128 bits of the text's SHA-256: what a named thing's randomness starts from."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


def make_person(subject: str, domain: str) -> Mesh:
    """The head and bust that the identity `subject` always has: metres, head frame, origin inside the skull."""
    rng = np.random.default_rng(seed_of(subject))
    base = load_base()
    shape, eyes = _shape(base, rng)
    look = _look(rng, domain)
    styles = _STYLES_A if domain == "A" else _STYLES_B
    style = str(rng.choice(list(styles), p=np.array(list(styles.values())) / sum(styles.values())))
    look = replace(look, bald=style == "bald")
    thickness_m = {"bald": 0.0, "short": rng.uniform(0.004, 0.014)}.get(style, 0.004)
    parts = [_skin(base, _with_hair(base, shape, look, thickness_m), look, rng)]
    parts += [_eyeball(centre, radius, look) for centre, radius in eyes]
    parts += wear.hair_and_hat(style, _skull(base, shape), np.array(look.hair), rng, domain)
    if rng.random() < 0.2:
        parts += wear.glasses([centre for centre, _ in eyes], eyes[0][1], rng)
    parts.append(wear.bust(shape[base.collar], rng, domain))
    return join(parts)


def _shape(base: Base, rng: np.random.Generator) -> tuple[Array, list[tuple[Array, float]]]:
    """(N, 3) metres from the skull's centre, and each eye's centre and radius."""
    mix = rng.dirichlet(np.full(len(base.corners), 0.35)).astype(np.float32)
    chosen = rng.choice(len(base.modifiers), 14, replace=False)
    amounts = rng.uniform(0.0, 0.7, 14).astype(np.float32)
    shape = base.position + np.tensordot(mix, base.corners, 1) + np.tensordot(amounts, base.modifiers[chosen], 1)
    centres = [shape[mask].mean(0) for mask in (base.left_eye, base.right_eye)]
    scale = _EYE_DISTANCE / float(centres[0][0] - centres[1][0])
    origin = (centres[0] + centres[1]) / 2 * np.array([0, 1, 1]) + (_SKULL_CENTRE - _EYE_CENTRE) / scale
    radii = [
        float(np.linalg.norm(shape[m] - c, axis=1).max())
        for m, c in zip((base.left_eye, base.right_eye), centres, strict=True)
    ]
    factor = 0.1 * scale * rng.uniform(0.96, 1.04)
    eyes = [((centre - origin) * factor, radius * factor) for centre, radius in zip(centres, radii, strict=True)]
    return ((shape - origin) * factor).astype(np.float32), eyes


def _look(rng: np.random.Generator, domain: str) -> Look:
    skin = np.array(_SKINS[rng.integers(len(_SKINS))]) * rng.uniform(0.92, 1.04)
    hairs = _NATURAL_HAIR if domain == "A" else _DYED_HAIR
    hair = np.clip(np.array(hairs[rng.integers(len(hairs))]) * rng.uniform(0.8, 1.15), 0.02, 0.95)
    lip = skin * rng.uniform(0.3, 0.6) + np.array([0.62, 0.22, 0.22]) * 0.5
    return Look(
        skin=tuple(np.clip(skin, 0, 1)),
        hair=tuple(hair),
        brow=tuple(hair * 0.7),
        lip=tuple(np.clip(lip * rng.uniform(0.8, 1.0), 0, 1)),
        iris=_IRISES[rng.integers(len(_IRISES))],
        bald=False,
        beard=bool(rng.random() < 0.18),
        stubble=float(max(0.0, rng.uniform(-0.5, 0.35))),
        hairline_shift_deg=float(rng.uniform(-6, 9)),
        brow_height_deg=float(rng.uniform(17.5, 20.5)),
        brow_slant_deg=float(rng.uniform(-1.0, 1.5)),
    )


def _with_hair(base: Base, shape: Array, look: Look, thickness_m: float) -> Array:
    if not thickness_m:
        return shape
    azimuth = np.degrees(np.arctan2(base.chart[:, 0], base.chart[:, 2]))
    elevation = np.degrees(np.arcsin(base.chart[:, 1] / np.linalg.norm(base.chart, axis=1)))
    grown = smoothstep((elevation - hairline_deg(azimuth, look.hairline_shift_deg)) / 14.0)
    outward = base.chart / np.linalg.norm(base.chart, axis=1, keepdims=True)
    return (shape + outward * (grown * (1.0 - base.ear) * thickness_m)[:, None]).astype(np.float32)


def _skin(base: Base, shape: Array, look: Look, rng: np.random.Generator) -> Mesh:
    used, faces = np.unique(base.faces, return_inverse=True)
    faces = faces.reshape(base.faces.shape).astype(np.int32)
    mesh = make_mesh(shape[used], faces, look.skin, chart=base.chart[used], shine=0.08)
    ear = base.ear[used][faces].max(1) > 0.3
    normal = vertex_normals(mesh.position, faces)
    return replace(
        mesh,
        normal=normal,
        material=np.where(ear, mesh.material, np.int32(TEXTURED)),
        rigid=base.rigid[used],
        boxed=base.boxed[used],
        owned=base.owned,
        texture=paint(look, rng),
    )


def _eyeball(centre: Array, radius: float, look: Look) -> Mesh:
    points, faces = sphere(9, 14)
    position = points * radius * 0.97 + centre
    return make_mesh(position, faces, look.iris, normal=points, chart=points, material=EYE, shine=0.35)


def _skull(base: Base, shape: Array) -> wear.Skull:
    head = shape[base.boxed & (base.ear < 0.2)]
    upper = head[head[:, 1] > 0.01]
    return wear.Skull(
        half_width=float(np.abs(upper[:, 0]).max()),
        top=float(upper[:, 1].max()),
        front=float(shape[base.boxed & (base.position[:, 1] > 7.6)][:, 2].max()),
        back=float(upper[:, 2].min()),
        chin=float(head[:, 1].min()),
    )
