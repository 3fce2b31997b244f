"""The pose and the box that landmarks tell, against maths written here and numbers of other programs."""

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from launcher.errors import UserError
from shards import pose
from shards.sources import face
from shards.sources.face import Lens

ASSET = Path(face.__file__).parent / "synthetic" / "head_asset.npz"
# Vertices of the asset, in the order of face.OPENPOSE, picked on pictures of the mesh: ends of the brow ridge,
# corners of the eyes, wings of the nose, corners of the mouth, edge of the lower lip, chin.
VERTICES = [212, 208, 2771, 2767, 4996, 4243, 1789, 2563, 2841, 288, 4547, 2108, 492, 1994]
HEAD_CENTRE_CM = (0.0, 71.2, 5.6)
# A camera of Panoptic's kind; pixels by cv2.projectPoints of OpenCV 5.0.0.
DISTORTION = (-0.2326, 0.1925, -0.000253, 0.000418, -0.0112)
K = np.array([[1395.5, 0, 950.8], [0, 1392.2, 563.6], [0, 0, 1.0]])
SEEN = {
    (0.4, -0.3, 2.0): (1226.155997350625, 357.5766260379375),
    (-1.2, 0.7, 3.0): (415.9407993345335, 874.8606607736601),
    (0.0, 0.0, 1.0): (950.8, 563.6),
    (1.5, 0.9, 2.5): (1730.8361690711624, 1030.1715492966005),
}


def umeyama(model: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """Rotation, scale and shift of Umeyama 1991, equations 40 to 42."""
    m, s = model - model.mean(0), seen - seen.mean(0)
    u, d, vt = np.linalg.svd(s.T @ m / len(m))
    sign = np.diag([1, 1, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ sign @ vt
    scale = np.trace(np.diag(d) @ sign) / (m**2).sum(1).mean()
    return rotation, scale, seen.mean(0) - scale * rotation @ model.mean(0)


def test_the_reference_is_the_mean_adult_of_the_head_asset_tilted() -> None:
    asset = np.load(ASSET)
    adult = ["child" not in str(name) for name in asset["corner_names"]]
    mean = asset["v"].astype(float) + asset["corners"][adult].astype(float).mean(0)
    points = 10 * mean[VERTICES] - HEAD_CENTRE_CM
    mirrored = [2, 3, 0, 1, 7, 6, 5, 4, 9, 8, 11, 10, 12, 13]
    points = (points + points[mirrored] * [-1, 1, 1]) / 2
    tilted = Rotation.from_rotvec([face.TILT_DEG, 0, 0], degrees=True).apply(points)
    np.testing.assert_allclose(face.reference().points, tilted, atol=0.02)
    assert face.reference().points.shape == (len(face.OPENPOSE), 3)


def test_smplx_numbers_are_those_of_agora_hpe() -> None:
    """DirectMHP takes joints[76:] and of these the following 13."""
    assert [k - 76 for k in face.SMPLX] == [0, 4, 9, 5, 28, 25, 22, 19, 18, 14, 37, 31, 40]


def test_a_face_laid_over_itself_moved_gives_the_move_back() -> None:
    known, rng = face.reference(), np.random.default_rng(0)
    for turn in Rotation.random(50, rng=rng):
        scale, shift = rng.uniform(0.001, 3), rng.normal(size=3) * 10
        placed = face.lay(known, scale * turn.apply(known.points) + shift)
        assert placed is not None
        assert pose.geodesic_deg(placed.rotation, turn.as_matrix()) < 1e-6
        np.testing.assert_allclose(placed.centre, shift, atol=1e-9)
        assert placed.radius == pytest.approx(scale * known.radius)


@pytest.mark.parametrize("used", [None, (0, 1, 2, 3, 4, 7, 9), (12, 1, 5, 10, 8, 3, 2)])
def test_noisy_landmarks_give_umeyamas_fit(used: tuple[int, ...] | None) -> None:
    known, rng = face.reference(), np.random.default_rng(1)
    places = list(used or range(13))
    for turn in Rotation.random(30, rng=rng):
        seen = 0.01 * turn.apply(known.points[places]) + rng.normal(size=(len(places), 3)) * 0.004 + [0, 0, 3]
        rotation, scale, shift = umeyama(known.points[places], seen)
        placed = face.lay(known, seen, used)
        assert placed is not None and pose.geodesic_deg(placed.rotation, rotation) < 1e-5
        np.testing.assert_allclose(placed.centre, shift, atol=1e-9)
        assert placed.radius == pytest.approx(scale * known.radius)


def test_landmarks_that_tell_no_pose() -> None:
    known = face.reference()
    hole = known.points.copy()
    hole[3, 1] = np.nan
    line = np.arange(14.0)[:, None] * [1.0, 2.0, 3.0]
    for landmarks in (hole, line, np.zeros((14, 3)), known.points + np.inf):
        assert face.lay(known, landmarks) is None


def test_projection_is_opencvs() -> None:
    seen = Lens(K, DISTORTION).project(np.array(list(SEEN)))
    np.testing.assert_allclose(seen, list(SEEN.values()), atol=1e-9)


@pytest.mark.parametrize("distortion", [(0, 0, 0, 0, 0), DISTORTION])
def test_the_box_bounds_the_picture_of_the_sphere(distortion: tuple[float, ...]) -> None:
    lens = Lens(K, distortion)  # type: ignore[arg-type]
    points = np.random.default_rng(2).normal(size=(200_000, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    for centre, radius in (((0.3, 0.2, 2.5), 0.15), ((-1.4, 0.8, 2.8), 0.3), ((0.0, 0.0, 1.0), 0.4)):
        seen = lens.project(points * radius + centre)
        box = face.picture_of_sphere(np.array(centre), radius, lens)
        assert box == pytest.approx((*seen.min(0), *seen.max(0)), abs=0.01 * (box[2] - box[0]) if box else 0)


def test_no_box_where_the_lens_would_fold_the_picture_or_the_sphere_is_not_in_front() -> None:
    lens = Lens(K, DISTORTION)
    barrel = Lens(K, (-0.3, 0.0, 0.0, 0.0, 0.0))
    aside = np.array([4.0, 0.0, 2.0])
    assert 0 < barrel.project(aside[None])[0, 0] < 1920, "a point far off the axis lands in the image"
    assert face.picture_of_sphere(aside, 0.15, barrel) is None
    for centre in ((0.0, 0.0, -3.0), (0.0, 0.0, 0.1), (1.0, 0.0, 0.0)):
        assert face.picture_of_sphere(np.array(centre), 0.15, lens) is None


def at(pose_deg: tuple[float, float, float], centre: tuple[float, float, float]) -> face.Placed:
    """A head of radius 0.15 with this yaw, pitch, roll."""
    yaw, pitch, roll = pose_deg
    m = Rotation.from_euler("XYZ", [-pitch, yaw, roll], degrees=True).as_matrix()
    return face.Placed(m @ np.diag([1, -1, -1]), np.array(centre), 0.15)


@pytest.mark.parametrize(
    ("pose_deg", "centre", "reason"),
    [
        ((10, 0, 0), (0, 0, -2), face.BEHIND),
        ((10, 0, 100), (0, 0, -2), face.BEHIND),
        ((10, 0, 100), (0, 0, 2), face.ROLLED),
        ((170, 0, -91), (9, 0, 2), face.ROLLED),
        ((10, 0, 89), (9, 0, 2), face.OUTSIDE),
        ((10, 0, 0), (1.42, 0, 2), face.CUT),
        ((10, 0, 0), (0, 0, 0.4), face.LARGE),
    ],
)
def test_reasons_to_leave_a_head_out(
    pose_deg: tuple[float, float, float], centre: tuple[float, float, float], reason: str
) -> None:
    """In the published order: a head of impossible roll is one even if it is outside the image."""
    assert face.label(at(pose_deg, centre), np.eye(3), np.zeros(3), Lens(K), (1920, 1080)) == reason


def test_a_head_seen_by_a_turned_camera() -> None:
    """The camera at world (1, 2, 3) looks along world -z with world y up: x to the right is world x."""
    rotation = np.diag([1.0, -1.0, -1.0])
    shift = -rotation @ np.array([1.0, 2.0, 3.0])
    # A head at world (1, 2, 0) whose axes are the world's looks along world z, into the camera.
    seen = face.label(face.Placed(np.eye(3), np.array([1.0, 2.0, 0.0]), 0.15), rotation, shift, Lens(K), (1920, 1080))
    assert not isinstance(seen, str)
    np.testing.assert_allclose(pose.pose_from_rotation(seen[0]), [0, 0, 0], atol=1e-9)
    half = 0.15 / np.sqrt(9 - 0.15**2)
    assert seen[1] == pytest.approx(
        (950.8 - 1395.5 * half, 563.6 - 1392.2 * half, 950.8 + 1395.5 * half, 563.6 + 1392.2 * half), abs=0.1
    )


def test_the_published_reference_can_be_named(tmp_path: Path) -> None:
    turned = Rotation.from_euler("x", 5, degrees=True).apply(face.reference().points)
    points = np.zeros((58, 3))
    points[[38, 34, 33, 29, 13, 17, 25, 21, 54, 50, 43, 39, 45, 6]] = turned
    for name, array in (("a.npy", points), ("b.npy", points.T)):
        np.save(tmp_path / name, array)
        known = face.reference(tmp_path / name)
        np.testing.assert_allclose(known.points, turned)
        assert known.radius == 18 and known.centre.tolist() == [0, 5, -5]


def test_a_reference_that_is_none_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "face.npy"
    with pytest.raises(UserError, match="face.npy: no such file; --reference"):
        face.reference(path)
    path.write_bytes(b"no array")
    with pytest.raises(UserError, match="not a .npy of numbers"):
        face.reference(path)
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="not a .npy of numbers"):
        face.reference(path)
    np.save(path, np.zeros((14, 3)))
    with pytest.raises(UserError, match=r"an array of \(14, 3\)"):
        face.reference(path)
