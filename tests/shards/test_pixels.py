"""Images as the world has them: what every viewer shows is decoded, what is cut or would lose its values is not."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from shards.pixels import SizeError, decode_pixels

WIDTH, HEIGHT = 60, 40


def encoded(kind: str = "JPEG", **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def stray_bytes_at_the_end(data: bytes) -> bytes:
    return data[:-2] + b"stray" + data[-2:]


def segment_that_ends_early(data: bytes) -> bytes:
    return data[:-40] + data[-2:]


def stray_bytes_in_the_header(data: bytes) -> bytes:
    at = data.index(b"\xff\xda")
    return data[:at] + bytes(7) + data[at:]


@pytest.mark.parametrize("change", [stray_bytes_at_the_end, segment_that_ends_early, stray_bytes_in_the_header])
def test_jpegs_with_warnings_are_decoded(change: Callable[[bytes], bytes]) -> None:
    data = encoded()
    pixels = decode_pixels(change(data), "jpg", (WIDTH, HEIGHT))
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_allclose(pixels[:16].astype(int), decode_pixels(data, "jpg")[:16], atol=2)
    with pytest.raises(SizeError, match="the image is 60x40, its record says 61x40"):
        decode_pixels(change(data), "jpg", (WIDTH + 1, HEIGHT))


def test_jpegs_that_are_cut_or_none_are_refused_with_what_is_wrong() -> None:
    data = encoded()
    for bad, said in ((data[:-200], "Premature end of JPEG file"), (b"no image", "JPEG"), (encoded("PNG"), "JPEG")):
        with pytest.raises(ValueError, match=said):
            decode_pixels(bad, "jpg")


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_pixels_of_more_than_8_bits_are_refused(dtype: str) -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((HEIGHT, WIDTH), 300, dtype)).save(file, "PNG" if dtype == "uint16" else "TIFF")
    with pytest.raises(ValueError, match="its pixels are of mode [IF].*, of more than 8 bits"):
        decode_pixels(file.getvalue(), "png")
