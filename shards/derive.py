"""Sources made of sources: the same samples in another order, or with their images smaller or encoded anew."""

import io
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.errors import UsageError, UserError
from shards.pixels import decode_pixels
from shards.record import Camera, Record
from shards.shuffle import shuffled

if TYPE_CHECKING:
    from shards.write import Sample, Source

_OF_SOURCE = 0x50C3
_QUALITY_OF_SMALLER_JPEGS = 95


class Shuffled:
    """A source in an order that is shuffled by a seed: subjects and sequences spread over all shards."""

    def __init__(self, source: "Source", seed: int) -> None:
        self.name, self.licence, self.split = source.name, source.licence, source.split
        self.scope: Mapping[str, Any] = {**source.scope, "shuffle": seed}
        self._source, self._seed = source, seed

    def __len__(self) -> int:
        return len(self._source)

    def sample(self, i: int) -> "Sample":
        """The sample that the shuffle puts at place i."""
        return self._source.sample(int(shuffled(np.array([i]), len(self), (self._seed, _OF_SOURCE))[0]))


class Reencoded:
    """A source with images no longer than `max_side_px`, and as JPEG of `quality` where that is given.

    Boxes and camera are scaled along. Images that need no change keep their bytes; smaller ones stay what they were,
    JPEG (of quality 95) or PNG. Raises UsageError for values that cannot be meant.
    """

    def __init__(self, source: "Source", quality: int | None, max_side_px: int | None) -> None:
        if quality is not None and not 1 <= quality <= 100:
            raise UsageError(f"JPEG quality {quality}: it must lie between 1 and 100")
        if max_side_px is not None and max_side_px < 16:
            raise UsageError(f"longest side {max_side_px} px: at least 16 are needed")
        self.name, self.licence, self.split = source.name, source.licence, source.split
        options = {"reencode_jpeg": quality, "max_side": max_side_px}
        self.scope: Mapping[str, Any] = {**source.scope, **{k: v for k, v in options.items() if v is not None}}
        self._source, self._quality, self._max_side_px = source, quality, max_side_px

    def __len__(self) -> int:
        return len(self._source)

    def sample(self, i: int) -> "Sample":
        """Sample i of the source, smaller or encoded anew. Raises UserError for an image that does not decode."""
        sample = self._source.sample(i)
        known = sample.record
        size = (known.image.width, known.image.height)
        factor = min(1.0, (self._max_side_px or max(size)) / max(size))
        if self._quality is None and factor == 1.0:
            return sample
        try:
            pixels = decode_pixels(sample.image, sample.extension, size)
        except ValueError as error:
            raise UserError(f"{self.name} sample {i}, key {sample.key}: its image does not decode ({error})") from None
        if factor < 1.0:
            width, height = (max(1, round(side * factor)) for side in size)
            pixels, known = _smaller(pixels, width, height), _scaled(known, width, height)
        if self._quality is None and sample.extension == "png":
            return replace(sample, image=_png(pixels), record=known)
        image = _jpeg(pixels, self._quality or _QUALITY_OF_SMALLER_JPEGS)
        return replace(sample, image=image, extension="jpg", record=known)


def _smaller(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def _scaled(known: Record, width: int, height: int) -> Record:
    """The record of the same image at another size. Poses stay: a side's rounding shows them no differently."""
    x, y = width / known.image.width, height / known.image.height
    camera = known.image.camera
    if camera is not None:
        camera = Camera(camera.fx * x, camera.fy * y, camera.cx * x, camera.cy * y)

    def scale(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        return (box[0] * x, box[1] * y, box[2] * x, box[3] * y)

    return Record(
        replace(known.image, width=width, height=height, camera=camera),
        [replace(head, bbox=scale(head.bbox)) for head in known.heads],
        [replace(thing, bbox=scale(thing.bbox)) for thing in known.objects],
    )


def _jpeg(pixels: np.ndarray, quality: int) -> bytes:
    import simplejpeg

    sampling = "444" if quality >= 95 else "420"
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling=sampling
    )


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
