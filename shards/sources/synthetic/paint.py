"""Paints a head's texture: skin, hair, brows, lips, beard, over directions seen from the head's centre."""

from dataclasses import dataclass

import numpy as np

from shards.sources.synthetic.mesh import smoothstep
from shards.sources.synthetic.surface import TEXTURE_HIGH_DEG, TEXTURE_LOW_DEG

Array = np.ndarray
Colour = tuple[float, float, float]

ROWS, COLUMNS = 160, 288

_HAIRLINE_AZIMUTH_DEG = (0.0, 30.0, 55.0, 68.0, 76.0, 84.0, 100.0, 118.0, 140.0, 180.0)
_HAIRLINE_ELEVATION_DEG = (43.0, 40.0, 31.0, 17.0, 2.0, -4.0, -6.0, -24.0, -34.0, -37.0)


@dataclass(frozen=True)
class Look:
    """The colours (RGB, 0..1) and lines of one face; degrees are directions from the head's centre."""

    skin: Colour
    hair: Colour
    brow: Colour
    lip: Colour
    iris: Colour
    bald: bool
    stubble: float
    beard: bool
    hairline_shift_deg: float
    brow_height_deg: float
    brow_slant_deg: float


def hairline_deg(azimuth_deg: Array, shift_deg: float) -> Array:
    """Elevation above which hair grows, at an azimuth (0 = ahead); one smooth line round the head."""
    away = np.abs(azimuth_deg)
    front = smoothstep((70.0 - away) / 30.0)
    return np.interp(away, _HAIRLINE_AZIMUTH_DEG, _HAIRLINE_ELEVATION_DEG) + shift_deg * front


def paint(look: Look, rng: np.random.Generator) -> Array:
    """(ROWS, COLUMNS, 3) uint8 texture."""
    elevation = (TEXTURE_HIGH_DEG - (np.arange(ROWS) + 0.5) / ROWS * (TEXTURE_HIGH_DEG - TEXTURE_LOW_DEG))[:, None]
    azimuth = ((np.arange(COLUMNS) + 0.5) / COLUMNS * 360.0 - 180.0)[None]
    away = np.abs(azimuth)
    picture = np.broadcast_to(np.array(look.skin), (ROWS, COLUMNS, 3)).copy()

    def lay(mask: Array, colour: Colour | Array, strength: float = 1.0) -> None:
        cover = (mask * strength)[..., None]
        picture[:] = picture * (1.0 - cover) + np.asarray(colour) * cover

    skin = np.array(look.skin)
    lay(_ellipse(away, elevation, 24.0, -12.0, 11.0, 8.0, 8.0), skin * (1.04, 0.84, 0.80), 0.5)
    lay(_ellipse(away, elevation, 18.0, 7.0, 10.0, 6.5, 3.0), skin * 0.62, 0.75)
    lay(_ellipse(away, elevation, 4.0, -15.0, 1.6, 1.1, 0.8), skin * 0.3)
    lay(_beard(away, elevation), look.hair, 0.92 if look.beard else look.stubble)
    lay(_ellipse(away, elevation, 0.0, -22.3 - 0.02 * away**2, 9.5, 2.4, 0.7), look.lip)
    lay(_ellipse(away, elevation, 0.0, -26.6 + 0.02 * away**2, 8.5, 2.6, 0.7), look.lip)
    lay(_ellipse(away, elevation, 0.0, -24.4, 10.0, 0.6, 0.4), np.array(look.lip) * 0.4)
    arch = look.brow_height_deg + look.brow_slant_deg * (away - 16.0) / 10.0 - 0.012 * (away - 18.0) ** 2
    lay(_ellipse(away, elevation, 17.0, arch, 11.5, 2.0, 0.8), look.brow)
    if not look.bald:
        strands = 1.0 + 0.10 * rng.standard_normal((1, COLUMNS)) * np.clip(elevation + 90, 0, 1)
        edge = smoothstep((elevation - hairline_deg(azimuth, look.hairline_shift_deg)) / 2.5 + 0.5)
        lay(edge, np.array(look.hair) * np.clip(strands, 0.7, 1.3)[..., None])
    return (np.clip(picture, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _ellipse(x: Array, y: Array, cx: float, cy: float | Array, rx: float, ry: float, soft: float) -> Array:
    distance = np.hypot((x - cx) / rx, (y - cy) / ry)
    return smoothstep((1.0 - distance) * min(rx, ry) / soft + 0.5)


def _beard(away: Array, elevation: Array) -> Array:
    upper = np.interp(away, (0.0, 11.0, 14.0, 30.0, 55.0, 68.0, 76.0), (-17.0, -18.5, -21.0, -24.0, -16.0, -4.0, 6.0))
    chin = smoothstep((upper - elevation) / 3.0 + 0.5) * smoothstep((78.0 - away) / 4.0)
    return chin * smoothstep((elevation + 62.0) / 8.0)
