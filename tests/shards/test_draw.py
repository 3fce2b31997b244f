"""Drawing: axes where the convention says, boxes where the record says, sheets of any number."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import draw, pose
from shards.index import open_set

BLACK = np.zeros((200, 200, 3), np.uint8)


def middle(image: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Mean x, y of the pixels of a colour, relative to the centre of BLACK."""
    y, x = np.nonzero((image == colour).all(axis=-1))
    return np.array([x.mean(), y.mean()]) - 100


@pytest.mark.parametrize("angles", [(40.0, 0.0, 0.0), (-30.0, 25.0, 15.0), (150.0, 20.0, -60.0), (0.0, -50.0, 100.0)])
def test_axes_are_the_orthographic_columns(angles: tuple[float, float, float]) -> None:
    rotation = pose.rotation_from_pose(*angles)
    image = draw.draw_axes(BLACK, rotation, (100, 100), 80)
    for axis, colour in ((rotation[:, 0], draw.RED), (rotation[:, 1], draw.GREEN), (-rotation[:, 2], draw.BLUE)):
        if np.hypot(*axis[:2]) > 0.3:
            np.testing.assert_allclose(middle(image, colour), 40 * axis[:2], atol=4)
    assert BLACK.max() == 0, "the image that was given is not drawn on"


def test_a_box_and_its_words() -> None:
    image = draw.draw_box(BLACK, (50, 60, 120, 150), (255, 0, 0), "the ring")
    assert tuple(image[60, 80]) == (255, 0, 0) and tuple(image[100, 50]) == (255, 0, 0)
    assert tuple(image[100, 80]) == (0, 0, 0)
    assert image[46:58].max() == 255


def test_preview_enlarges_small_images(tiny_set: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "pictures" / "sheet.png"
    assert draw.preview(open_set(tiny_set(samples=7)), 24, out) == 7
    with Image.open(out) as sheet:
        assert sheet.width > 3 * 320 and sheet.format == "PNG"


def test_sheets_of_one_and_of_mixed_sizes() -> None:
    assert draw.contact_sheet([BLACK], ["one"]).shape == (200 + 16 + 12, 200 + 12, 3)
    sheet = draw.contact_sheet([BLACK, BLACK[:50, :30], BLACK], ["a", "b", "c"], columns=3)
    assert sheet.shape == (200 + 16 + 12, 3 * 206 + 6, 3)
