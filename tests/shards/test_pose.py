"""Angles: the convention, its inverse over the full range, and every public convention we take labels from."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from shards import pose

S = np.diag([1.0, -1.0, -1.0])
full = st.floats(-180, 180, allow_nan=False)
half = st.floats(-90, 90, allow_nan=False)


def rx(deg: float) -> np.ndarray:
    c, s = np.cos(np.radians(deg)), np.sin(np.radians(deg))
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def ry(deg: float) -> np.ndarray:
    c, s = np.cos(np.radians(deg)), np.sin(np.radians(deg))
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def rz(deg: float) -> np.ndarray:
    c, s = np.cos(np.radians(deg)), np.sin(np.radians(deg))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


@given(full, half, full)
def test_the_matrix_is_pitch_then_yaw_then_roll(yaw: float, pitch: float, roll: float) -> None:
    matrix = pose.rotation_from_pose(yaw, pitch, roll)
    np.testing.assert_allclose(matrix, rx(-pitch) @ ry(yaw) @ rz(roll), atol=1e-12)
    other = Rotation.from_euler("zyx", [roll, yaw, -pitch], degrees=True).as_matrix()
    np.testing.assert_allclose(matrix, other, atol=1e-12)


@given(full, half, full)
@example(90.0, 30.0, 40.0)
@example(-90.0, -80.0, 170.0)
@example(90.0, 90.0, 0.0)
@example(90.0 - 1e-5, 20.0, -100.0)
@example(-90.0 + 3e-6, 20.0, 100.0)
@example(180.0, -90.0, -180.0)
@example(0.0, 90.0, 90.0)
def test_a_pose_gives_the_same_matrix_back_within_its_ranges(yaw: float, pitch: float, roll: float) -> None:
    matrix = pose.rotation_from_pose(yaw, pitch, roll)
    again = pose.pose_from_rotation(matrix)
    assert abs(again[1]) <= 90.0 + 1e-9
    assert -180.0 < again[0] <= 180.0 and -180.0 < again[2] <= 180.0
    np.testing.assert_allclose(pose.rotation_from_pose(*again), matrix, atol=3e-6)


@given(st.floats(-1, 1), half, full)
def test_near_gimbal_lock_rounded_matrices_come_back(tiny: float, pitch: float, roll: float) -> None:
    matrix = np.round(pose.rotation_from_pose(90.0 + tiny * 1e-3, pitch, roll), 7)
    again = pose.pose_from_rotation(matrix)
    assert float(pose.geodesic_deg(pose.rotation_from_pose(*again), matrix)) < 1e-3


def test_gimbal_lock_gives_roll_zero_or_180() -> None:
    yaw, pitch, roll = pose.pose_from_rotation(pose.rotation_from_pose(90.0, 20.0, 50.0))
    assert (yaw, round(roll, 6)) == (90.0, 0.0) and pitch == pytest.approx(-30.0)
    yaw, pitch, roll = pose.pose_from_rotation(pose.rotation_from_pose(90.0, 60.0, -50.0))
    assert (yaw, round(abs(roll), 6)) == (90.0, 180.0) and pitch == pytest.approx(-70.0)


@given(st.floats(-89, 89), st.floats(-89, 89), st.floats(-179, 179))
def test_front_views_decode_to_the_angles_they_were_made_of(yaw: float, pitch: float, roll: float) -> None:
    triple = pose.pose_from_rotation(pose.rotation_from_pose(yaw, pitch, roll))
    np.testing.assert_allclose(triple, [yaw, pitch, roll], atol=1e-6)


@given(st.floats(91, 179), st.floats(-89, 89), st.floats(-179, 179))
def test_rear_views_decode_to_the_angles_they_were_made_of(yaw: float, pitch: float, roll: float) -> None:
    triple = pose.pose_from_rotation(pose.rotation_from_pose(yaw, pitch, roll))
    np.testing.assert_allclose(triple, [yaw, pitch, roll], atol=1e-6)


def test_signs_of_the_face_direction() -> None:
    face = -pose.rotation_from_pose(20.0, 0.0, 0.0)[:, 2]
    assert face[0] < 0, "yaw > 0 looks to the image's left"
    assert -pose.rotation_from_pose(0.0, 20.0, 0.0)[1, 2] < 0, "pitch > 0 looks up (y down)"
    up = pose.rotation_from_pose(0.0, 0.0, 20.0) @ [0, -1, 0]
    assert up[0] > 0, "roll > 0 tilts clockwise"
    assert -pose.rotation_from_pose(150.0, 20.0, 0.0)[1, 2] > 0, "from behind, pitch > 0 looks down"


def test_shapes_of_many_poses_are_kept() -> None:
    triples = np.random.default_rng(0).uniform(-80, 80, (4, 5, 3))
    matrices = pose.rotation_from_pose(triples[..., 0], triples[..., 1], triples[..., 2])
    assert matrices.shape == (4, 5, 3, 3)
    np.testing.assert_allclose(pose.pose_from_rotation(matrices), triples, atol=1e-9)
    assert pose.rotation_from_pose(0.0, 0.0, 0.0).shape == (3, 3)


def test_biwi_sample_of_the_public_card() -> None:
    file = [[0.980639, 0.109899, 0.162077], [-0.11023, 0.993882, -0.00697376], [-0.161851, -0.011027, 0.986754]]
    np.testing.assert_allclose(pose.pose_from_rotation(np.array(file)), [9.33, -0.40, -6.39], atol=0.01)


@given(st.floats(-89, 89), st.floats(-89, 89), st.floats(-179, 179))
def test_biwi_decode_of_hopenet_is_ours_with_the_matrix_of_the_file(yaw: float, pitch: float, roll: float) -> None:
    r = pose.rotation_from_pose(yaw, pitch, roll).T
    their_yaw = -np.arctan2(-r[2, 0], np.hypot(r[2, 1], r[2, 2]))
    their_pitch, their_roll = np.arctan2(r[2, 1], r[2, 2]), -np.arctan2(r[1, 0], r[0, 0])
    np.testing.assert_allclose(np.degrees([their_yaw, their_pitch, their_roll]), [yaw, pitch, roll], atol=1e-6)


@given(full, half, full)
def test_3ddfa_matrices(yaw: float, pitch: float, roll: float) -> None:
    theirs = rx(pitch).T @ ry(yaw).T @ rz(roll).T  # elementary matrices transposed, y up
    np.testing.assert_allclose(pose.from_3ddfa(theirs), pose.rotation_from_pose(yaw, pitch, roll), atol=1e-12)


@given(full, half, full)
def test_6drepnet_matrices(yaw: float, pitch: float, roll: float) -> None:
    theirs = rz(roll) @ ry(yaw) @ rx(pitch)
    ours = pose.rotation_from_pose(yaw, pitch, roll)
    np.testing.assert_allclose(pose.from_6drepnet(theirs), ours, atol=1e-12)
    np.testing.assert_allclose(pose.from_6drepnet(ours), theirs, atol=1e-12)


def test_6drepnet_distances_are_ours() -> None:
    a, b = Rotation.random(50, random_state=1).as_matrix(), Rotation.random(50, random_state=2).as_matrix()
    np.testing.assert_allclose(pose.geodesic_deg(pose.from_6drepnet(a), pose.from_6drepnet(b)), pose.geodesic_deg(a, b))


def test_head_to_camera_matrices() -> None:
    frontal = S  # y up, z out of the face, looking into the camera
    np.testing.assert_allclose(pose.from_head_to_camera(frontal), np.eye(3))


def test_img2pose_rule_is_the_canonical_decode() -> None:
    m = Rotation.random(random_state=3)
    x, y, z = m.inv().as_euler("xyz", degrees=True)
    np.testing.assert_allclose(pose.rotation_from_pose(-y, x, -z), m.as_matrix(), atol=1e-12)


@given(st.lists(st.floats(-1, 1), min_size=6, max_size=6))
def test_six_numbers_make_a_rotation(values: list[float]) -> None:
    a, b = np.array(values[:3]), np.array(values[3:])
    if np.linalg.norm(np.cross(a, b)) < 1e-3:
        return
    assert pose.is_rotation(pose.from_6d(np.array(values)), 1e-9)


def test_six_numbers_of_a_rotation_give_it_back() -> None:
    m = Rotation.random(5, random_state=4).as_matrix()
    np.testing.assert_allclose(pose.from_6d(np.concatenate([m[..., 0], m[..., 1]], axis=-1)), m, atol=1e-12)


@given(full, half, full)
def test_flip_is_minus_yaw_and_minus_roll(yaw: float, pitch: float, roll: float) -> None:
    flipped = pose.flip_rotation(pose.rotation_from_pose(yaw, pitch, roll))
    np.testing.assert_allclose(flipped, pose.rotation_from_pose(-yaw, pitch, -roll), atol=1e-12)


def test_turning_the_image_turns_the_projected_axes_and_is_not_roll_plus_a() -> None:
    matrix = pose.rotation_from_pose(60.0, 20.0, 10.0)
    turned = pose.rotate_rotation(matrix, 30.0)
    # A point of the image turned clockwise by 30 degrees (x right, y down).
    np.testing.assert_allclose(turned[:2], rz(30.0)[:2, :2] @ matrix[:2], atol=1e-12)
    assert float(pose.geodesic_deg(turned, pose.rotation_from_pose(60.0, 20.0, 40.0))) > 10.0


def test_ray_relative_pose_of_a_head_at_the_edge() -> None:
    facing_along_its_ray = pose.ray_relative(
        pose.rotation_from_pose(0.0, 0.0, 0.0), np.array([np.tan(np.radians(30)), 0, 1])
    )
    yaw, pitch, roll = pose.pose_from_rotation(facing_along_its_ray)
    assert yaw == pytest.approx(-30.0) and pitch == pytest.approx(0.0) and roll == pytest.approx(0.0)
    np.testing.assert_allclose(pose.ray_relative(np.eye(3), np.array([0.0, 0.0, 5.0])), np.eye(3))


@given(st.floats(-1e4, 1e4))
def test_wrap_stays_in_range(angle: float) -> None:
    wrapped = float(pose.wrap_deg(angle))
    assert -180.0 < wrapped <= 180.0
    assert abs((wrapped - angle + 180.0) % 360.0 - 180.0) < 1e-9


def test_geodesic_equals_the_angle_of_the_turn() -> None:
    for angle in (0.0, 1e-4, 5.0, 90.0, 179.0, 180.0):
        assert float(pose.geodesic_deg(np.eye(3), ry(angle))) == pytest.approx(angle, abs=1e-5)


@pytest.mark.parametrize("bad", [np.eye(3) * 1.01, np.diag([1.0, 1.0, -1.0]), np.full((3, 3), np.nan)])
def test_is_rotation_refuses(bad: np.ndarray) -> None:
    assert not pose.is_rotation(bad)
    assert pose.is_rotation(np.stack([np.eye(3), bad, np.eye(3)])).tolist() == [True, False, True]


def test_a_rear_view_that_published_decoders_take_for_a_front_view() -> None:
    """6DRepNet's decode knows |yaw| <= 90 only; its full-range patch flips yaw alone, which is another rotation."""
    matrix = pose.rotation_from_pose(150.0, 10.0, 5.0)
    theirs = pose.from_6drepnet(matrix)
    sy = np.hypot(theirs[0, 0], theirs[1, 0])
    decoded = np.degrees(
        [np.arctan2(-theirs[2, 0], sy), np.arctan2(theirs[2, 1], theirs[2, 2]), np.arctan2(theirs[1, 0], theirs[0, 0])]
    )
    np.testing.assert_allclose(decoded, [30.0, -170.0, -175.0], atol=1e-9)
    np.testing.assert_allclose(pose.rotation_from_pose(*decoded), matrix, atol=1e-12)
    np.testing.assert_allclose(pose.pose_from_rotation(matrix), [150.0, 10.0, 5.0], atol=1e-9)
    patched = pose.rotation_from_pose(150.0, *decoded[1:])
    assert float(pose.geodesic_deg(patched, matrix)) > 100.0


def test_roll_plus_the_angle_is_the_more_wrong_the_more_a_head_looks_aside() -> None:
    rng = np.random.default_rng(0)
    pitch, roll = rng.uniform(-40, 40, 20_000), rng.uniform(-30, 30, 20_000)
    for low, expected_deg in ((0, 13.7), (30, 24.7), (60, 36.5), (90, 46.8), (120, 54.4), (150, 58.1)):
        yaw = rng.uniform(low, low + 30, 20_000) * rng.choice([-1, 1], 20_000)
        turned = pose.rotate_rotation(pose.rotation_from_pose(yaw, pitch, roll), 30.0)
        naive = pose.rotation_from_pose(yaw, pitch, roll + 30.0)
        assert pose.geodesic_deg(turned, naive).mean() == pytest.approx(expected_deg, abs=0.5)


def test_angles_near_profile_cost_more_than_the_rotation_does() -> None:
    """The same 5 degrees of noise: yaw errs by 2.5 everywhere, pitch and roll by 33 at yaw 85."""
    rng = np.random.default_rng(0)
    for yaw, expected_deg in ((0.0, (2.5, 2.5, 2.5)), (75.0, (2.6, 9.6, 9.6)), (85.0, (2.4, 33.0, 33.0))):
        matrix = pose.rotation_from_pose(yaw, 0.0, 0.0)
        axes = rng.normal(size=(20_000, 3))
        axes *= np.radians(5.0) / np.linalg.norm(axes, axis=1, keepdims=True)
        noisy = Rotation.from_rotvec(axes).as_matrix() @ matrix
        np.testing.assert_allclose(pose.geodesic_deg(noisy, matrix), 5.0, atol=1e-6)
        errors = np.abs(pose.wrap_deg(pose.pose_from_rotation(noisy) - [yaw, 0.0, 0.0])).mean(axis=0)
        np.testing.assert_allclose(errors, expected_deg, rtol=0.1)


@pytest.mark.parametrize(("hfov_deg", "edge_deg"), [(40, 20.0), (65, 32.5), (90, 45.0)])
def test_a_head_at_the_edge_looks_turned_by_half_the_field_of_view(hfov_deg: float, edge_deg: float) -> None:
    ray = np.array([np.tan(np.radians(hfov_deg / 2)), 0.0, 1.0])
    assert pose.pose_from_rotation(pose.ray_relative(np.eye(3), ray))[0] == pytest.approx(-edge_deg)
