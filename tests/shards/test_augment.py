"""Augmentation: images and labels change together, poses by matrices, and every change is a function of its place."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import UsageError
from shards import pose
from shards.augment import FILL, Augment, Change
from shards.pixels import resize
from shards.plan import is_mirrored
from shards.record import Camera, Head, Image, Object, Record

WIDTH, HEIGHT = 160, 120
CAMERA = Camera(150.0, 150.0, 90.0, 50.0)
ALL = Augment(flip=True, rotate_deg=30.0, crop=0.5, colour=0.4)


def head(box: tuple[float, float, float, float], yaw: float = 40.0, pitch: float = 20.0, roll: float = 10.0) -> Head:
    return Head(box, tuple(pose.rotation_from_pose(yaw, pitch, roll).flat))


def record(*heads: Head, objects: list[Object] | None = None, camera: Camera | None = CAMERA) -> Record:
    return Record(Image(WIDTH, HEIGHT, "made", "1", "anna", camera), list(heads), objects or [])


def ellipse(box: tuple[float, float, float, float]) -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    inside = ((2 * x - box[0] - box[2]) / (box[2] - box[0])) ** 2 + ((2 * y - box[1] - box[3]) / (box[3] - box[1])) ** 2
    picture = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    picture[:] = FILL
    picture[inside <= 1] = (255, 20, 20)
    return picture


def seen_box(image: torch.Tensor, width: int, height: int) -> list[float]:
    """Of what is red in (3, S, S), in pixels of an image of width x height."""
    rows, columns = np.nonzero((image[0].numpy() > 190) & (image[1].numpy() < 70))
    scale = np.array([width, height, width, height]) / image.shape[-1]
    return (np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) * scale).tolist()


@given(st.integers(0, 2**40), st.integers(0, 500))
def test_what_is_drawn_stays_in_its_box(seed: int, position: int) -> None:
    """A head that fills its box as an ellipse is found again, by its colour, where the changed record puts it."""
    box = (50.0, 30.0, 100.0, 95.0)
    known = record(head(box))
    change = replace(ALL, colour=0.0).at(seed, position, known)
    changed = change.record(known)
    assert (changed.image.width, changed.image.height) == (
        change.crop[2] - change.crop[0],
        change.crop[3] - change.crop[1],
    )
    image = change.finish(resize(change.cut(ellipse(box)), 240))
    assert len(changed.heads) == 1
    np.testing.assert_allclose(changed.heads[0].bbox, seen_box(image, *_size(changed)), atol=1.6)


def _size(known: Record) -> tuple[int, int]:
    return known.image.width, known.image.height


@given(st.integers(0, 2**40), st.integers(0, 500))
def test_points_of_a_head_fall_where_the_changed_image_shows_them(seed: int, position: int) -> None:
    """Camera, pose and pixels agree: a cross-check by projection, with the head turned and moved in camera axes."""
    known = record(head((60.0, 30.0, 100.0, 80.0)))
    change = ALL.at(seed, position, known)
    changed = change.record(known)
    angle = np.radians(change.clockwise_deg)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    mirror = np.diag([-1.0 if change.mirrored else 1.0, 1.0, 1.0])
    points = np.random.default_rng(1).uniform(-1, 1, (6, 3)) @ np.diag([-1.0 if change.mirrored else 1.0, 1, 1])
    middle = np.array([0.3, 0.2, 9.0])
    before = project(CAMERA, (known.heads[0].matrix @ mirror @ points.T).T + middle)
    # The same by hand: crop, turn about the crop's centre, mirror.
    x0, y0, x1, y1 = change.crop
    centre = np.array([x1 - x0, y1 - y0]) / 2
    by_hand = (turn[:2, :2] @ (before - [x0, y0] - centre).T).T + centre
    if change.mirrored:
        by_hand[:, 0] = (x1 - x0) - by_hand[:, 0]
    assert changed.image.camera is not None
    after = project(changed.image.camera, (changed.heads[0].matrix @ points.T).T + mirror @ turn @ middle)
    np.testing.assert_allclose(after, by_hand, atol=1e-6)


def project(camera: Camera, points: np.ndarray) -> np.ndarray:
    return np.stack([camera.fx * points[:, 0], camera.fy * points[:, 1]], 1) / points[:, 2:] + [camera.cx, camera.cy]


def test_a_turn_is_not_roll_plus_the_angle() -> None:
    known = record(head((60.0, 30.0, 100.0, 80.0), yaw=120.0))
    turned = Change((0, 0, WIDTH, HEIGHT), clockwise_deg=30.0).record(known).heads[0]
    np.testing.assert_allclose(turned.matrix, pose.rotate_rotation(known.heads[0].matrix, 30.0))
    naive = pose.rotation_from_pose(120.0, 20.0, 40.0)
    assert float(pose.geodesic_deg(turned.matrix, naive)) > 20.0


@given(st.integers(0, 2**40), st.integers(0, 500))
def test_changed_records_are_sound(seed: int, position: int) -> None:
    from shards.record import from_json

    rng = np.random.default_rng(position)
    heads = [
        head((x, y, x + 30, y + 40), *rng.uniform((-180, -90, -180), (180, 90, 180)))
        for x, y in rng.uniform(0, 80, (3, 2))
    ]
    objects = [Object("the mug on the left", (2.0, 3.0, 20.0, 90.0))] if position % 2 else []
    known = record(*heads, objects=objects)
    change = ALL.at(seed, position, known)
    changed = change.record(known)
    again = from_json(changed.to_json())
    for box in [h.bbox for h in again.heads] + [o.bbox for o in again.objects]:
        assert -0.01 <= box[0] < box[2] <= again.image.width + 0.01
        assert -0.01 <= box[1] < box[3] <= again.image.height + 0.01
    if not change.clockwise_deg:
        assert len(changed.objects) == len(objects)
    if objects and not change.clockwise_deg:
        assert len(changed.heads) == 3 and all(h.visible == 1.0 for h in changed.heads), "expressions speak of them all"
    assert changed.heads, "the head that was chosen is whole"


def test_sides_keep_their_proportion_and_every_place_of_a_crop_comes() -> None:
    known = record(head((70.0, 50.0, 90.0, 70.0)))
    crops = np.array([Augment(crop=0.6).at(3, position, known).crop for position in range(400)])
    widths, heights = crops[:, 2] - crops[:, 0], crops[:, 3] - crops[:, 1]
    np.testing.assert_allclose(widths / WIDTH, heights / HEIGHT, atol=1 / HEIGHT)
    assert widths.min() <= 0.62 * WIDTH and widths.max() >= 0.98 * WIDTH
    assert crops.min() == 0 and crops[:, 2].max() == WIDTH and crops[:, 3].max() == HEIGHT
    assert (crops[:, 0] <= 70).all() and (crops[:, 2] >= 90).all()


def test_angles_are_spread_evenly_and_half_of_the_images_with_objects_stay_as_they_are() -> None:
    plain, spoken = record(head((1, 1, 9, 9))), record(head((1, 1, 9, 9)), objects=[Object("it", (1, 1, 5, 5))])
    angles = np.array([Augment(rotate_deg=20.0).at(1, position, plain).clockwise_deg for position in range(2000)])
    assert abs(angles.mean()) < 1.0 and 19.5 < np.abs(angles).max() <= 20.0 and 11.0 < angles.std() < 12.0
    turned = [bool(Augment(rotate_deg=20.0).at(1, position, spoken).clockwise_deg) for position in range(2000)]
    assert 900 < sum(turned) < 1100
    assert not any(Augment(rotate_deg=20.0).at(1, k, record(objects=spoken.objects)).clockwise_deg for k in range(50))


def test_the_default_changes_nothing_and_flips_are_those_of_the_plan() -> None:
    known = record(head((1, 1, 9, 9)), objects=[Object("it", (1, 1, 5, 5))])
    change = Augment().at(1, 2, known)
    pixels = ellipse((10, 10, 60, 60))
    assert change == Change((0, 0, WIDTH, HEIGHT)) and change.record(known) is known
    cut = change.cut(pixels)
    assert np.shares_memory(cut, pixels) and cut.shape == pixels.shape
    image = resize(pixels, 64)
    assert change.finish(image) is image
    assert [Augment(flip=True).at(5, k, known).mirrored for k in range(99)] == [is_mirrored(5, k) for k in range(99)]


def test_changes_are_fixed_for_ever() -> None:
    """A changed draw breaks every run that resumes: never change these numbers."""
    change = ALL.at(1, 7, record(head((60.0, 30.0, 100.0, 80.0))))
    assert (change.crop, change.mirrored) == ((24, 20, 151, 115), True)
    strengths = (change.clockwise_deg, change.brightness, change.contrast, change.saturation)
    assert [round(value, 6) for value in strengths] == [2.436441, 1.028342, 1.158935, 0.659044]


def test_colour_is_that_of_its_definition() -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(60, 180, (3, 20, 20), dtype=np.uint8))
    whole = (0, 0, 20, 20)
    bright = Change(whole, brightness=1.2).finish(image)
    np.testing.assert_allclose(bright, image.numpy() * 1.2, atol=0.51)
    grey = Change(whole, saturation=0.0).finish(image).numpy()
    luma = np.tensordot([0.299, 0.587, 0.114], image.numpy().astype(float), 1)
    np.testing.assert_allclose(grey, np.broadcast_to(luma, (3, 20, 20)), atol=0.51)
    flat = Change(whole, contrast=0.0).finish(image).numpy()
    assert flat.min() == flat.max() == round(luma.mean())


def test_corners_that_a_turn_leaves_empty_are_filled() -> None:
    white = torch.full((3, 40, 40), 255, dtype=torch.uint8)
    turned = Change((0, 0, 40, 40), clockwise_deg=45.0).finish(white)
    assert turned[:, 0, 0].tolist() == list(FILL) and turned[:, 20, 20].tolist() == [255] * 3


def test_oblong_pixels_have_no_camera_once_turned() -> None:
    oblong = record(head((60, 30, 100, 80)), camera=Camera(150.0, 120.0, 80.0, 60.0))
    assert Change((0, 0, WIDTH, HEIGHT), clockwise_deg=10.0).record(oblong).image.camera is None
    assert Change((10, 0, WIDTH, HEIGHT)).record(oblong).image.camera == Camera(150.0, 120.0, 70.0, 60.0)


def test_a_head_half_outside_is_dropped_or_less_visible() -> None:
    known = record(head((0.0, 0.0, 40.0, 40.0)), head((30.0, 0.0, 70.0, 40.0)), head((60.0, 0.0, 100.0, 40.0)))
    changed = Change((30, 0, WIDTH, HEIGHT)).record(known)
    assert [h.bbox for h in changed.heads] == [(0.0, 0.0, 40.0, 40.0), (30.0, 0.0, 70.0, 40.0)]
    assert Change((50, 0, WIDTH, HEIGHT)).record(known).heads[0].visible == 0.5


@pytest.mark.parametrize(
    "wrong", [{"rotate_deg": -1.0}, {"crop": 0.0}, {"crop": 1.5}, {"colour": 1.0}, {"crop": float("nan")}]
)
def test_options_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"augment.{next(iter(wrong))} "):
        Augment(**wrong)  # type: ignore[arg-type]
