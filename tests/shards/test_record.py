"""The schema of a sample: what is refused and how it is said; the stored form; the mirror image."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import UserError
from shards import pose
from shards.record import Camera, Head, Image, Object, Record, RecordError, from_json, mirror_words


def make(yaw: float = 20.0, pitch: float = 10.0, roll: float = -5.0) -> Record:
    image = Image(640, 480, "made", "7", "anna", Camera(600.0, 600.0, 330.0, 240.0))
    head = Head((10.0, 20.0, 110.0, 140.5), tuple(pose.rotation_from_pose(yaw, pitch, roll).flat), subject="anna")
    return Record(image, [head], [Object("the ring on the left", (1.0, 2.0, 30.0, 40.0))])


def changed(**changes: Any) -> str:
    value = json.loads(make().to_json())
    for path, new in changes.items():
        *folders, last = path.split("__")
        place = value
        for folder in folders:
            place = place[int(folder) if folder.isdigit() else folder]
        place[last] = new
    return json.dumps(value)


@given(st.floats(-180, 180), st.floats(-90, 90), st.floats(-180, 180))
def test_reading_and_writing_again_gives_the_same_bytes(yaw: float, pitch: float, roll: float) -> None:
    text = make(yaw, pitch, roll).to_json()
    assert from_json(text).to_json() == text


def test_stored_form_has_the_fields_of_the_schema() -> None:
    value = json.loads(make().to_json())
    assert value["convention"] == "hpe-v1"
    assert value["heads"][0]["pose"] == {"yaw": 20.0, "pitch": 10.0, "roll": -5.0}
    assert len(value["heads"][0]["rotation"]) == 9
    assert value["image"]["camera"] == {"fx": 600.0, "fy": 600.0, "cx": 330.0, "cy": 240.0}


def test_stored_angles_never_say_minus_180() -> None:
    stored = json.loads(make(yaw=-179.999999, roll=-179.999999).to_json())["heads"][0]["pose"]
    assert stored["yaw"] == 180.0 and stored["roll"] == 180.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "not a record"),
        (changed(convention="hpe-v0"), "convention 'hpe-v0'"),
        (changed(image__width=0), "both sides must be positive"),
        (changed(image__width=48.0), "both sides must be positive whole numbers"),
        (changed(image__subject=7), "subject must be text, one is 7"),
        (changed(image__camera={"fx": 1.0, "fy": 1.0, "cx": float("nan"), "cy": 0.0}), "its numbers must be finite"),
        (changed(image__camera={"fx": 1.0, "fy": 1.0, "cx": "2", "cy": 0.0}), "not a record"),
        ("[" * 100_000, "not JSON"),
        (changed(image__colour="red"), "not a record"),
        (changed(heads__0__pose={"yaw": 412.0, "pitch": 0.0, "roll": 0.0}), "yaw 412.0 deg is outside [-180, 180]"),
        (changed(heads__0__pose={"yaw": 0.0, "pitch": 91.0, "roll": 0.0}), "pitch 91.0 deg is outside [-90, 90]"),
        (changed(heads__0__pose={"yaw": float("nan"), "pitch": 0.0, "roll": 0.0}), "yaw nan"),
        (changed(heads__0__pose={"yaw": 25.0, "pitch": 10.0, "roll": -5.0}), "differ by"),
        (changed(heads__0__rotation=[1.0, 0, 0, 0, 1, 0, 0, 0, -1]), "is not a rotation matrix"),
        (changed(heads__0__rotation=[1.0, 0, 0]), "is not a rotation matrix"),
        (changed(heads__0__rotation=None), "of rotation and pose one is null"),
        (changed(heads__0__bbox=[10, 10, 10, 20]), "needs x0 < x1"),
        (changed(heads__0__bbox=[10, 10, float("inf"), 20]), "needs x0 < x1"),
        (changed(heads__0__bbox=[10, 10]), "not a record"),
        (changed(heads__0__visible=1.5), "visible 1.5 is outside"),
        (changed(heads__0__confidence=-1), "confidence -1.0 is outside"),
        (changed(objects__0__expression=" "), "object 0: its expression is empty; name the thing, or leave"),
        (changed(objects__0__bbox=[5, 5, 1, 9]), "object 0: box [5, 5, 1, 9]"),
    ],
)
def test_impossible_records_are_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(RecordError) as caught:
        from_json(text)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError)


def test_a_head_may_have_no_known_rotation() -> None:
    posed = make()
    bare = Head((1.0, 2.0, 31.0, 42.0), None, subject="ben", weak=True)
    mixed = Record(posed.image, [bare, *posed.heads])
    stored = json.loads(mixed.to_json())["heads"]
    assert stored[0]["rotation"] is None and stored[0]["pose"] is None and stored[1]["pose"]["yaw"] == 20.0
    assert from_json(mixed.to_json()).heads[0] == bare
    np.testing.assert_allclose(mixed.poses_deg, [[20.0, 10.0, -5.0]])
    assert Record(posed.image, [bare]).poses_deg.shape == (0, 3)
    assert mixed.mirrored().heads[0].bbox == (609.0, 2.0, 639.0, 42.0) and mixed.mirrored().heads[0].rotation is None
    with pytest.raises(ValueError, match="no rotation"):
        _ = bare.pose_deg


@given(st.floats(-180, 180), st.floats(-90, 90), st.floats(-180, 180), st.floats(0, 0.3))
def test_the_check_of_a_pose_is_that_of_the_pose_module(yaw: float, pitch: float, roll: float, off_deg: float) -> None:
    value = json.loads(make().to_json())
    rotation = pose.rotation_from_pose(yaw, pitch, roll) @ pose.rotation_from_pose(0.0, 0.0, off_deg)
    value["heads"][0] |= {"rotation": rotation.tolist(), "pose": {"yaw": yaw, "pitch": pitch, "roll": roll}}
    assert abs(off_deg - 0.1) < 1e-6 or refused(value) == (off_deg > 0.1)
    value["heads"][0]["rotation"] = (rotation * (1.0 + off_deg / 1000)).ravel().tolist()
    assert refused(value) or pose.is_rotation(rotation * (1.0 + off_deg / 1000))


def refused(value: dict[str, Any]) -> bool:
    try:
        from_json(json.dumps(value))
    except RecordError:
        return True
    return False


def test_a_rotation_that_is_wrong_is_numbered_among_all_heads() -> None:
    value = json.loads(make().to_json())
    unknown = value["heads"][0] | {"rotation": None, "pose": None}
    value["heads"] = [unknown, value["heads"][0] | {"pose": {"yaw": 25.0, "pitch": 10.0, "roll": -5.0}}]
    with pytest.raises(RecordError, match="head 1: pose"):
        from_json(json.dumps(value))


def test_mirrored_twice_is_the_same_record() -> None:
    assert make().mirrored().mirrored().to_json() == make().to_json()


def test_mirrored_moves_boxes_poses_camera_and_words() -> None:
    mirrored = make().mirrored()
    assert mirrored.heads[0].bbox == (530.0, 20.0, 630.0, 140.5)
    np.testing.assert_allclose(mirrored.heads[0].pose_deg, [-20.0, 10.0, 5.0])
    assert mirrored.objects[0].expression == "the ring on the right"
    assert mirrored.objects[0].bbox == (610.0, 2.0, 639.0, 40.0)
    assert mirrored.image.camera is not None and mirrored.image.camera.cx == 310.0


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("Left of the leftmost bright cup", "Right of the rightmost bright cup"),
        ("RIGHT, rightward and upright", "LEFT, leftward and upright"),
        ("leftside of the lefthand cup, on its left sides", "rightside of the righthand cup, on its right sides"),
        ("the left-hand one, lefty", "the right-hand one, lefty"),
    ],
)
def test_words_left_and_right_are_exchanged(text: str, other: str) -> None:
    assert mirror_words(text) == other
    assert mirror_words(other) == text
