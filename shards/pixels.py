"""Encoded images to pixels, within bounds: what the bytes claim is checked before memory is given for it."""

import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

MOST_PIXELS = 178_956_970
"""Largest image that is decoded: Pillow's own limit for files that are no bomb (half a gigabyte of RGB)."""


_MOST_KEPT_BYTES = 64 << 20
_EIGHT_BIT = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}


class Scratch:
    """Memory for pixels that are needed until the next image is decoded: it stays in the processor's caches."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def take(self, size: int) -> np.ndarray:
        """(size,) uint8, the same memory as last time, but for the largest images."""
        if self._memory.size >= size:
            return self._memory[:size]
        fresh = np.empty(size, np.uint8)
        if size <= _MOST_KEPT_BYTES:
            self._memory = fresh
        return fresh


class SizeError(ValueError):
    """An image of another size than was said."""


def decode_image(data: bytes, extension: str, size_px: int) -> "torch.Tensor":
    """Encoded image to (3, size_px, size_px) uint8 RGB. Raises ValueError for bytes that do not decode."""
    return resize(decode_pixels(data, extension), size_px)


def decode_pixels(
    data: bytes, extension: str, size: tuple[int, int] | None = None, scratch: Scratch | None = None
) -> np.ndarray:
    """Encoded image to (H, W, 3) uint8 RGB; JPEG by simplejpeg at full size, others by Pillow.

    size: width and height it must have; raises SizeError, before decoding, where it has others. scratch: where the
    result may lie. Raises ValueError for bytes that do not decode, and for images of more than MOST_PIXELS or of more
    than 8 bits a colour.
    """
    if extension != "jpg":
        return _by_pillow(data, size)
    try:
        pixels = _by_simplejpeg(data, size, scratch)
    except SizeError:
        raise
    except ValueError as refused:
        # simplejpeg takes each warning for an error: stray bytes, a segment that ends early. Photos of the web have
        # them and every viewer shows them; Pillow refuses only those that are cut.
        try:
            return _by_pillow(data, size, "JPEG")
        except SizeError:
            raise
        except ValueError:
            raise refused from None
    return _by_pillow(data, size, "JPEG") if pixels is None else pixels


def _by_simplejpeg(data: bytes, size: tuple[int, int] | None, scratch: Scratch | None) -> np.ndarray | None:
    """None for a JPEG of four colours, which it does not turn into RGB."""
    import simplejpeg

    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height, size)
    if colours in ("CMYK", "YCCK"):
        return None
    place = None if scratch is None else scratch.take(height * width * 3)
    pixels: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=place)
    return pixels


def _by_pillow(data: bytes, size: tuple[int, int] | None, kind: str | None = None) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=None if kind is None else (kind,)) as image:
            _check_size(*image.size, size)
            check_mode(image.mode)
            return np.array(image.convert("RGB"))
    except SizeError:
        raise
    except Exception as error:
        # Damaged bytes make Pillow raise SyntaxError, zlib.error, struct.error, … as well as OSError.
        raise ValueError(str(error).split("\n")[0] or type(error).__name__) from None


def check_mode(mode: str) -> None:
    """Raise ValueError for a mode of Pillow's whose pixels do not fit into 8 bits: made RGB they would be all white."""
    if mode not in _EIGHT_BIT:
        raise ValueError(
            f"its pixels are of mode {mode}, of more than 8 bits; make it 8-bit first, as `mogrify -depth 8` does"
        )


def _check_size(width: int, height: int, said: tuple[int, int] | None) -> None:
    if said is not None and (width, height) != said:
        raise SizeError(f"the image is {width}x{height}, its record says {said[0]}x{said[1]}")
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width}x{height} pixels, more than {MOST_PIXELS:,}")


def resize(pixels: np.ndarray, size_px: int, out: "torch.Tensor | None" = None) -> "torch.Tensor":
    """(H, W, 3) uint8 to (3, size_px, size_px) uint8: antialiased bicubic, both sides squeezed to the same length.

    out: where the result goes; a third faster where its colours lie side by side (strides (1, 3·size_px, 3)).
    """
    import torch

    image: Any = torch.from_numpy(pixels).permute(2, 0, 1)
    square = (size_px, size_px)
    if image.shape[1:] == square:
        return image.contiguous() if out is None else out.copy_(image)
    # Colours side by side, as decoded: torch's fast path for uint8; within 2 grey levels of Pillow.
    if out is None:
        bigger = torch.nn.functional.interpolate(image[None], square, mode="bicubic", antialias=True)
        return bigger[0].contiguous()
    # What interpolate calls, which itself takes no place for the result.
    torch.ops.aten._upsample_bicubic2d_aa.out(image[None], square, False, out=out[None])
    return out
