"""A small source of drawn images for tests: deterministic, quick, and no renderer."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageDraw

from shards import pose
from shards.record import Head, Image, Object, Record
from shards.write import Sample


class TinySource:
    """`samples` images of a few discs ("heads") and one square ("the box on the left"); pure in i and seed."""

    licence = "CC0-1.0"

    def __init__(
        self, samples: int = 12, seed: int = 0, split: str = "train", size_px: int = 48, extension: str = "jpg"
    ):
        self.name = f"tiny-{split}"
        self.split = split
        self.scope: Mapping[str, Any] = {"seed": seed, "samples": samples, "size_px": size_px}
        self._samples, self._seed, self._size_px, self._extension = samples, seed, size_px, extension

    def __len__(self) -> int:
        return self._samples

    def sample(self, i: int) -> Sample:
        """Sample i: 48 x 36 pixels at the default size."""
        rng = np.random.default_rng([self._seed, i, sum(map(ord, self.split))])
        width, height = self._size_px, self._size_px * 3 // 4
        picture = PillowImage.new("RGB", (width, height), tuple(int(v) for v in rng.integers(120, 250, 3)))
        heads = [self._head(rng, k, width, height, picture) for k in range(1 + i % 2)]
        box = (1.0, 1.0, 1.0 + width // 6, 1.0 + width // 6)
        ImageDraw.Draw(picture).rectangle(box, fill=(200, 20, 20))
        file = io.BytesIO()
        picture.save(file, "JPEG" if self._extension == "jpg" else "PNG", quality=90)
        subject = f"{self.split}-{self._seed}-{i % 5}"
        image = Image(width, height, self.name, f"{i}", subject, seed=i)
        record = Record(image, heads, [Object("the red box on the left", box)])
        return Sample(f"{self.name}-{i:06d}", file.getvalue(), self._extension, record)  # type: ignore[arg-type]

    def _head(self, rng: np.random.Generator, k: int, width: int, height: int, picture: PillowImage.Image) -> Head:
        radius = height / 6
        x, y = rng.uniform(radius + 1, width - radius - 1), rng.uniform(radius + 1, height - radius - 1)
        box = (x - radius, y - radius, x + radius, y + radius)
        ImageDraw.Draw(picture).ellipse(box, fill=(224, 172, 105))
        yaw, pitch, roll = rng.uniform((-180, -90, -180), (180, 90, 180))
        rotation = pose.rotation_from_pose(yaw, pitch, roll)
        return Head(box, tuple(rotation.flat), subject=f"{self.split}-{self._seed}-person-{k}")
