"""What makes a domain: its people, things, camera, light, background and the finish of its images."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shards.sources.synthetic import dolls, people, words
from shards.sources.synthetic.mesh import Mesh
from shards.sources.synthetic.raster import Light

Array = np.ndarray
Rng = np.random.Generator
Range = tuple[float, float]


@dataclass(frozen=True)
class Domain:
    """heads: how many a scene shows, each count with its odds; hfov_deg: horizontal field of view; camera_pitch_deg:
    mean and sigma, below 0 looks down; cast, noise (sigma, 0..1) and jpeg_quality: ranges drawn from for each scene."""

    name: str
    identities: dict[str, int]
    make_head: Callable[[str, str], Mesh]
    shapes: tuple[str, ...]
    hfov_deg: Range
    camera_pitch_deg: Range
    background: Callable[[Rng, int], Array]
    light: Callable[[Rng], Light]
    cast: Range
    noise: Range
    jpeg_quality: tuple[int, int]
    heads: tuple[tuple[int, float], ...] = ((1, 0.35), (2, 0.40), (3, 0.25))


GROUP = 5
"""Identities of a scene come from one group of so many, so that scenes of two groups share no one."""

_IDENTITIES = {"train": 120, "val": 30, "test": 40, "base": 400}


def identities(domain: Domain, split: str) -> list[str]:
    """The subjects of a split; no two splits or domains share one."""
    return [f"{domain.name}-{split}-{number:04d}" for number in range(domain.identities[split])]


def _studio_light(rng: Rng) -> Light:
    direction = np.array([rng.uniform(-0.9, 0.9), rng.uniform(-1.0, -0.3), rng.uniform(-1.2, -0.6)])
    return Light(direction, float(rng.uniform(0.38, 0.55)))


def _hard_light(rng: Rng) -> Light:
    side = rng.choice([-1.0, 1.0])
    direction = np.array([side * rng.uniform(0.5, 1.4), rng.uniform(-0.9, 0.35), rng.uniform(-0.9, -0.1)])
    return Light(direction, float(rng.uniform(0.33, 0.45)))


def _studio(rng: Rng, size: int) -> Array:
    """A wall of two colours that run into each other, a floor, soft patches."""
    down = np.linspace(0.0, 1.0, size)[:, None, None]
    tint = _muted(rng.uniform(0.35, 0.85, 3))
    upper, lower = np.clip(tint + rng.uniform(-0.12, 0.12, (2, 3)), 0.1, 0.95)
    picture = np.broadcast_to(upper * (1 - down) + lower * down, (size, size, 3)).copy()
    horizon = int(size * rng.uniform(0.6, 0.95))
    floor = _muted(rng.uniform(0.25, 0.65, 3))
    picture[horizon:] = floor * (0.85 + 0.3 * (down[horizon:] - horizon / size))
    return np.clip(picture + 0.05 * _soft(rng, size, 7)[..., None], 0.0, 1.0)


def _patterned(rng: Rng, size: int) -> Array:
    """Bricks, checks, stripes, weave or blotches, of two colours of not too different brightness."""
    pattern = (_bricks, _checks, _stripes, _weave, _blotches)[rng.integers(5)](rng, size)
    first = _muted(rng.uniform(0.2, 0.75, 3))
    second = np.clip(first + rng.uniform(-0.24, 0.24) + rng.uniform(-0.1, 0.1, 3), 0.08, 0.9)
    picture = first * pattern[..., None] + second * (1.0 - pattern[..., None])
    return np.clip(picture + 0.06 * _soft(rng, size, 12)[..., None], 0.0, 1.0)


def _muted(colour: Array) -> Array:
    """Half way to grey: walls should not vie with the coloured solids."""
    return 0.5 * colour + 0.5 * colour.mean()


def _axes(size: int) -> tuple[Array, Array]:
    ticks = (np.arange(size) + 0.5) / size
    return ticks[None, :], ticks[:, None]


def _soft(rng: Rng, size: int, cells: int) -> Array:
    """(size, size) smooth noise of sigma about 1, `cells` bumps a side."""
    at = np.linspace(0.0, cells - 1.0, size)
    near = np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(cells)[None]))
    return near @ rng.standard_normal((cells, cells)) @ near.T


def _bricks(rng: Rng, size: int) -> Array:
    x, y = _axes(size)
    rows = rng.integers(6, 13)
    row = np.floor(y * rows)
    across = (x * rows * 0.45 + 0.5 * (row % 2)) % 1.0
    brick = (across > 0.06) & ((y * rows) % 1.0 > 0.13)
    shade = rng.uniform(0.65, 1.0, (32, 32))[row.astype(int) % 32, np.floor(x * rows * 0.45).astype(int) % 32]
    return brick * shade


def _checks(rng: Rng, size: int) -> Array:
    x, y = _axes(size)
    across, down = rng.uniform(4, 10, 2)
    return ((np.floor(x * across) + np.floor(y * down)) % 2).astype(float)


def _stripes(rng: Rng, size: int) -> Array:
    x, y = _axes(size)
    angle, count = rng.uniform(0, np.pi), rng.uniform(4, 12)
    return 0.5 + 0.5 * np.clip(4.0 * np.sin(2 * np.pi * count * (x * np.cos(angle) + y * np.sin(angle))), -1, 1)


def _weave(rng: Rng, size: int) -> Array:
    x, y = _axes(size)
    count = rng.uniform(3, 8)
    return 0.5 * (np.sin(2 * np.pi * count * x) > 0.3) + 0.5 * (np.sin(2 * np.pi * count * y) > 0.3)


def _blotches(rng: Rng, size: int) -> Array:
    return np.clip(0.5 + 1.2 * _soft(rng, size, int(rng.integers(5, 11))), 0.0, 1.0)


DOMAINS = {
    "A": Domain(
        name="A",
        identities=_IDENTITIES,
        make_head=people.make_person,
        shapes=words.SHAPES,
        hfov_deg=(45.0, 60.0),
        camera_pitch_deg=(-8.0, 12.0),
        background=_studio,
        light=_studio_light,
        cast=(1.0, 1.0),
        noise=(0.0, 0.0),
        jpeg_quality=(90, 90),
    ),
    "B": Domain(
        name="B",
        identities=_IDENTITIES,
        make_head=people.make_person,
        shapes=words.SHAPES_B,
        hfov_deg=(30.0, 40.0),
        camera_pitch_deg=(-14.0, 13.0),
        background=_patterned,
        light=_hard_light,
        cast=(0.86, 1.10),
        noise=(0.01, 0.02),
        jpeg_quality=(60, 80),
    ),
    "C": Domain(
        name="C",
        identities=_IDENTITIES,
        make_head=dolls.make_doll,
        shapes=words.SHAPES_B,
        hfov_deg=(30.0, 50.0),
        camera_pitch_deg=(-14.0, 13.0),
        background=_patterned,
        light=_hard_light,
        cast=(0.80, 1.10),
        noise=(0.01, 0.03),
        jpeg_quality=(60, 80),
    ),
    # Crowds in the studio, from above: for weak labels. Nothing of B's look, so that B stays another data set.
    "W": Domain(
        name="W",
        identities=_IDENTITIES,
        make_head=people.make_person,
        shapes=words.SHAPES,
        hfov_deg=(45.0, 60.0),
        camera_pitch_deg=(-16.0, 12.0),
        background=_studio,
        light=_studio_light,
        cast=(0.92, 1.06),
        noise=(0.0, 0.02),
        jpeg_quality=(60, 90),
        heads=((3, 0.3), (4, 0.4), (5, 0.3)),
    ),
}
