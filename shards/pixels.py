"""Encoded images to pixels, within bounds: what the bytes claim is checked before memory is given for it."""

import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

MOST_PIXELS = 178_956_970
"""Largest image that is decoded: Pillow's own limit for files that are no bomb (half a gigabyte of RGB)."""


class SizeError(ValueError):
    """An image of another size than was said."""


def decode_image(data: bytes, extension: str, size_px: int) -> "torch.Tensor":
    """Encoded image to (3, size_px, size_px) uint8 RGB. Raises ValueError for bytes that do not decode."""
    return resize(decode_pixels(data, extension), size_px)


def decode_pixels(data: bytes, extension: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """Encoded image to (H, W, 3) uint8 RGB; JPEG by simplejpeg at full size, others by Pillow.

    size: width and height it must have; raises SizeError, before decoding, where it has others. Raises ValueError for
    bytes that do not decode and for images of more than MOST_PIXELS.
    """
    if extension == "jpg":
        import simplejpeg

        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height, size)
        if colours not in ("CMYK", "YCCK"):
            pixels: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB")
            return pixels
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_size(*image.size, size)
            return np.array(image.convert("RGB"))
    except SizeError:
        raise
    except Exception as error:
        # Damaged bytes make Pillow raise SyntaxError, zlib.error, struct.error, … as well as OSError.
        raise ValueError(str(error).split("\n")[0] or type(error).__name__) from None


def _check_size(width: int, height: int, said: tuple[int, int] | None) -> None:
    if said is not None and (width, height) != said:
        raise SizeError(f"the image is {width}x{height}, its record says {said[0]}x{said[1]}")
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width}x{height} pixels, more than {MOST_PIXELS:,}")


def resize(pixels: np.ndarray, size_px: int) -> "torch.Tensor":
    """(H, W, 3) uint8 to (3, size_px, size_px) uint8: antialiased bicubic, both sides squeezed to the same length."""
    import torch

    image: Any = torch.from_numpy(pixels).permute(2, 0, 1)
    if image.shape[1:] != (size_px, size_px):
        # channels_last in, as decoded: torch's fast path for uint8; within 2 grey levels of Pillow.
        square = (size_px, size_px)
        image = torch.nn.functional.interpolate(image[None], square, mode="bicubic", antialias=True)[0]
    return image.contiguous()
