"""The compiled renderer against the plain one, and against geometry that is known."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from shards import pose
from shards.sources.synthetic import domains, people, raster, reference, scene, surface
from shards.sources.synthetic.mesh import Mesh

SIZE_PX = 56
FOCAL_PX = 60.0
FRONT_LIGHT = raster.Light(np.array([0.2, -0.4, -1.0]), 0.4)


def _scene(domain: str, seed: int) -> scene.Scene:
    loader = scene.HeadLoader()
    return scene.compose(domains.DOMAINS[domain], "val", np.random.default_rng(seed), SIZE_PX, loader)


@pytest.fixture(scope="module")
def person() -> Mesh:
    return people.make_person("A-val-0003", "A")


def _posed(mesh: Mesh, rotation: np.ndarray) -> Mesh:
    turn = rotation @ pose.HEAD_TO_CAMERA
    return raster.bend(mesh, turn, turn, np.zeros(3), np.array([0.02, -0.01, 0.7]))


@pytest.mark.parametrize(("domain", "seed"), [("A", 1), pytest.param("B", 4, marks=pytest.mark.slow), ("C", 2)])
def test_the_compiled_renderer_equals_the_plain_one(domain: str, seed: int) -> None:
    made = _scene(domain, seed)
    compiled = raster.see(made.batch, made.focal_px, SIZE_PX)
    plain = reference.see(made.batch, made.focal_px, SIZE_PX)
    assert (compiled.face >= 0).mean() > 0.05
    assert (compiled.face == plain.face).mean() > 0.9995
    assert (compiled.covered == plain.covered).mean() > 0.9995
    same = compiled.face == plain.face
    np.testing.assert_allclose(compiled.weights[same], plain.weights[same], atol=1e-4)

    background = np.random.default_rng(0).uniform(0, 1, (SIZE_PX, SIZE_PX, 3))
    ours = raster.shade(made.batch, plain, made.focal_px, background, FRONT_LIGHT)
    theirs = reference.shade(made.batch, plain, made.focal_px, background, FRONT_LIGHT)
    # The sign of a normal seen edge-on may fall either way: allow that in a pixel or two.
    assert np.percentile(np.abs(ours - theirs), 99.9) < 1e-4


def test_a_triangle_covers_the_samples_inside_it_with_the_nearer_in_front() -> None:
    corners = np.array([[-0.5, -0.5, 1.0], [0.5, -0.5, 1.0], [-0.5, 0.5, 1.0]], np.float32)
    both = np.concatenate([corners * 2.0, corners * [0.5, 0.5, 1.0]]).astype(np.float32)
    zeros = np.zeros((6, 3), np.float32)
    batch = raster.Batch(
        position=both,
        normal=zeros + np.float32([0, 0, -1]),
        chart=zeros,
        colour=np.repeat(np.eye(3, dtype=np.float32)[:2], 3, 0),
        faces=np.arange(6, dtype=np.int32).reshape(2, 3),
        texture=np.full(2, -1, np.int32),
        shine=np.zeros(2, np.float32),
        slot=np.arange(2, dtype=np.int32),
        textures=np.zeros((1, 1, 1, 3), np.uint8),
    )
    seen = raster.see(batch, 40.0, 40)
    # The first is (after projection) a right triangle of 40 px sides: half of the 40 px square.
    assert abs(np.count_nonzero(seen.covered & 1) - 80 * 80 / 2) <= 80
    assert abs(np.count_nonzero(seen.covered & 2) - 40 * 40 / 2) <= 40
    shares, boxes = raster.measure(batch, seen, 2)
    np.testing.assert_allclose(shares, [0.75, 1.0], atol=0.02)
    np.testing.assert_allclose(boxes[1], [10, 10, 30, 30], atol=0.5)
    straight_on = raster.Light(np.array([0.0, 0.0, -1.0]), 1.0)
    image = raster.shade(batch, seen, 40.0, np.zeros((40, 40, 3)), straight_on)
    np.testing.assert_allclose(image[13, 13], [0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(image[2, 2], [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(image[38, 38], [0, 0, 0], atol=1e-6)


def test_interpolation_is_correct_in_perspective() -> None:
    """Half way on the screen between depths 1 and 3 lies a quarter of the way along the edge."""
    position = np.array([[-1, 0, 1], [3, 0, 3], [3, 1, 3], [-1, 1, 1]], np.float32)
    faces = np.array([[0, 1, 2], [0, 2, 3]], np.int32)
    made = _scene("C", 0)
    batch = replace(
        made.batch,
        position=position,
        faces=faces,
        slot=np.zeros(2, np.int32),
    )
    seen = raster.see(batch, 20.0, SIZE_PX)
    row, column = SIZE_PX, SIZE_PX  # the first sample right of and below the centre
    face = faces[seen.face[row, column]]
    first, second = seen.weights[row, column]
    depth = np.array([first, second, 1 - first - second]) @ position[face, 2]
    assert depth == pytest.approx(1.5, abs=0.03)


@pytest.mark.parametrize(
    ("yaw", "pitch", "roll"),
    [
        (0, 0, 0),
        (40, 0, 0),
        (-40, 0, 0),
        (0, 30, 0),
        (0, -30, 0),
        (30, 20, 25),
        (-75, 10, -20),
        (150, 25, 10),
        (-120, -30, 5),
    ],
)
def test_the_nose_points_where_the_label_says(person: Mesh, yaw: float, pitch: float, roll: float) -> None:
    rotation = pose.rotation_from_pose(yaw, pitch, roll)
    posed = _posed(person, rotation)
    nose = posed.position[_nose_vertex(person)]
    centre = np.array([0.02, -0.01, 0.7])
    towards = (nose - centre) / np.linalg.norm(nose - centre)
    face_direction = -rotation[:, 2]
    assert np.degrees(np.arccos(towards @ face_direction)) < 20
    if (pitch, roll) == (0, 0) and yaw:
        assert np.sign(nose[0] - centre[0]) == -np.sign(yaw)  # yaw > 0: to the image's left
    if (yaw, roll) == (0, 0) and pitch:
        level = _posed(person, np.eye(3)).position[_nose_vertex(person)]
        assert np.sign(level[1] - nose[1]) == np.sign(pitch)  # pitch > 0: up
    if abs(yaw) > 90:
        assert nose[2] > centre[2]  # the face is turned away
        assert np.sign(face_direction[1]) == np.sign(pitch)  # beyond 90 degrees pitch > 0 points the face down


@pytest.mark.parametrize("roll", [35, -35])
def test_roll_above_zero_tilts_clockwise_in_the_image(person: Mesh, roll: float) -> None:
    posed = _posed(person, pose.rotation_from_pose(0, 0, roll))
    crown = posed.position[np.argmax(np.where(person.boxed, person.position[:, 1], -1.0))]
    assert np.sign(crown[0] - 0.02) == np.sign(roll)
    assert crown[1] < -0.01


def _nose_vertex(mesh: Mesh) -> int:
    skin = np.zeros(len(mesh.position), bool)
    skin[mesh.faces[mesh.material == surface.TEXTURED]] = True
    return int(np.argmax(np.where(skin, mesh.position[:, 2], -1.0)))


@pytest.mark.slow
def test_the_renderer_is_compiled_where_no_cache_can_be_written() -> None:
    """All loops are taken and one is run: compiling the others without a cache is no different, and half a minute."""
    code = (
        "import numba.core.caching as c\n"
        "c.CacheImpl._locator_classes = []\n"
        "import numpy as np\n"
        "from shards.sources.synthetic import kernels\n"
        "found = kernels.extent(np.array([[0.5, 0.0, 2.0], [9.0, 9.0, 9.0]]), np.array([True, False]), 100.0, 50.0)\n"
        "assert found == (75.0, 50.0, 75.0, 50.0, 2.0), found\n"
        "assert kernels.extent.nopython_signatures\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
