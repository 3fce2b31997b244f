"""The synthetic data set: scenes by number, and any of its images made again from its record."""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from launcher.errors import UsageError, UserError
from shards.record import Camera, Head, Image, Object, Record
from shards.sources.synthetic import DEFAULT_IMAGE_PX, SPLITS
from shards.sources.synthetic.domains import DOMAINS, Domain
from shards.sources.synthetic.raster import shade
from shards.sources.synthetic.scene import REFERENCE_PX, HeadLoader, Scene, compose
from shards.sources.synthetic.words import head_expressions
from shards.write import Sample

Array = np.ndarray

VERSION = 2
"""Of the pictures: raised whenever the same seed would give another image."""

_LEAST_VISIBLE = 0.5
_LEAST_HEAD_PX = 12.0
_LEAST_SOLID_VISIBLE, _LEAST_SOLID_PX = 0.35, 7.0
_SEED_BITS = 48


class SyntheticSource:
    """Scenes of one domain and split. `sample(i)` depends on (domain, split, seed, image size, i) and nothing else."""

    licence = "CC0-1.0"

    def __init__(
        self, domain: str, scenes: int, seed: int = 0, split: str = "train", image_size: int = DEFAULT_IMAGE_PX
    ) -> None:
        """image_size: side in pixels. Raises UsageError on a name or size that does not exist."""
        if domain not in DOMAINS:
            raise UsageError(f"domain {domain!r}: choose one of {', '.join(DOMAINS)}")
        if split not in SPLITS:
            raise UsageError(f"split {split!r}: choose one of {', '.join(SPLITS)}")
        if not 48 <= image_size <= 2048:
            raise UsageError(f"image size {image_size} px: it must lie between 48 and 2048")
        if scenes < 1:
            raise UsageError(f"{scenes} scenes: at least one is needed")
        if seed < 0:
            raise UsageError(f"seed {seed}: it must be 0 or more")
        self.name = f"synthetic-{domain}"
        self.split = split
        self.scope: Mapping[str, Any] = {
            "domain": domain,
            "scenes": scenes,
            "seed": seed,
            "image_size": image_size,
            "version": VERSION,
        }
        self._domain, self._scenes, self._seed, self._size_px = domain, scenes, seed, image_size

    def __len__(self) -> int:
        return self._scenes

    def sample(self, i: int) -> Sample:
        """Scene `i`, rendered and labelled. Raises IndexError outside 0..len-1."""
        if not 0 <= i < self._scenes:
            raise IndexError(f"scene {i} of {self._scenes}")
        key = f"{self._domain}-{self.split}-{self._seed}-{i:07d}"
        seed = scene_seed(self._domain, self.split, self._seed, i)
        image, record = _make(self._domain, self.split, seed, self._size_px, key)
        return Sample(key, image, "jpg", record)


def scene_seed(domain: str, split: str, seed: int, i: int) -> int:
    """The seed of scene `i`; its upper bits say domain and split, so that no two splits share one."""
    place = list(DOMAINS).index(domain) * len(SPLITS) + SPLITS.index(split)
    digest = hashlib.sha256(f"{domain}/{split}/{seed}/{i}".encode()).digest()
    return (place << _SEED_BITS) + int.from_bytes(digest[:6], "big")


def remake(image: Image) -> bytes:
    """The JPEG bytes of an image of this source, from what its record says. Raises UserError for any other image."""
    if not image.source.startswith("synthetic-") or image.seed is None:
        raise UserError(
            f"image {image.id!r} of {image.source!r}: only images of the synthetic source can be made again"
        )
    place, domains = image.seed >> _SEED_BITS, list(DOMAINS)
    if place >= len(domains) * len(SPLITS):
        raise UserError(f"image {image.id!r}: seed {image.seed} belongs to no domain; the record was changed")
    domain, split = domains[place // len(SPLITS)], SPLITS[place % len(SPLITS)]
    return _make(domain, split, image.seed, image.width, image.id)[0]


@functools.cache
def _heads() -> HeadLoader:
    return HeadLoader()


def _make(domain_name: str, split: str, seed: int, size_px: int, key: str) -> tuple[bytes, Record]:
    domain = DOMAINS[domain_name]
    rng = np.random.default_rng(seed)
    scene = compose(domain, split, rng, size_px, _heads())
    picture = shade(scene.batch, scene.seen, scene.focal_px, domain.background(rng, size_px), domain.light(rng))
    return _finish(picture, domain, rng), _label(scene, domain, seed, size_px, key)


def _finish(picture: Array, domain: Domain, rng: np.random.Generator) -> bytes:
    import simplejpeg

    picture = picture * rng.uniform(*domain.cast, 3).astype(np.float32)
    sigma = rng.uniform(*domain.noise)
    if sigma > 0:
        picture = picture + sigma * rng.standard_normal(picture.shape, dtype=np.float32)
    pixels = (np.clip(picture, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    low, high = domain.jpeg_quality
    quality = int(rng.integers(low, high + 1))
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="444"
    )


def _label(scene: Scene, domain: Domain, seed: int, size_px: int, key: str) -> Record:
    scale = size_px / REFERENCE_PX
    heads = [
        Head(head.box, tuple(head.rotation.reshape(9).tolist()), visible=head.visible, subject=head.subject)
        for head in scene.heads
        if head.visible >= _LEAST_VISIBLE and _least_side(head.box) >= _LEAST_HEAD_PX * scale
    ]
    objects = [
        Object(solid.name, solid.box)
        for solid in scene.solids
        if solid.box and solid.visible >= _LEAST_SOLID_VISIBLE and _least_side(solid.box) >= _LEAST_SOLID_PX * scale
    ]
    # A head too hidden to be labelled is still there: no expression about heads could be sure to mean another one.
    if len(heads) == len(scene.heads):
        objects += [Object(text, heads[k].bbox) for text, k in head_expressions([h.bbox for h in heads], size_px)]
    camera = Camera(scene.focal_px, scene.focal_px, size_px / 2, size_px / 2)
    image = Image(size_px, size_px, f"synthetic-{domain.name}", key, scene.group, camera, seed)
    return Record(image, heads, objects)


def _least_side(box: tuple[float, float, float, float]) -> float:
    return min(box[2] - box[0], box[3] - box[1])
