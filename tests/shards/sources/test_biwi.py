"""BIWI: the matrix of the file against Hopenet's decode, boxes against points on the sphere, people in one split."""

import argparse
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy import arctan2, degrees, sqrt

from launcher.errors import UsageError, UserError
from shards import pose
from shards.cli import main
from shards.sources import SOURCES
from shards.sources.biwi.source import PEOPLE, Biwi, read_camera, train_sequences
from shards.sources.fixtures import biwi as fixture
from shards.sources.fixtures import build_words


@pytest.fixture(scope="module")
def hpdb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "hpdb"
    fixture.write(folder)
    return folder


def test_the_known_frame_has_its_known_pose(hpdb: Path) -> None:
    """Sequence 12, first frame, as its data set card shows it."""
    sample = next(s for s in map(Biwi(hpdb).sample, range(6)) if s.key == "12/frame_00003")
    np.testing.assert_allclose(sample.record.heads[0].pose_deg, [9.33, -0.40, -6.39], atol=0.01)


def test_poses_are_those_of_hopenets_decode(hpdb: Path) -> None:
    """deep-head-pose, datasets.py: R is the transposed matrix of the file; |yaw| stays below 90 in this data set."""
    source = Biwi(hpdb)
    for sample in map(source.sample, range(len(source))):
        text = (hpdb / f"{sample.record.image.id}_pose.txt").read_text().split()
        r = np.array(text[:9], dtype=float).reshape(3, 3).T
        roll, pitch = -arctan2(r[1, 0], r[0, 0]), arctan2(r[2, 1], r[2, 2])
        yaw = -arctan2(-r[2, 0], sqrt(r[2, 1] ** 2 + r[2, 2] ** 2))
        np.testing.assert_allclose(sample.record.heads[0].pose_deg, degrees([yaw, pitch, roll]), atol=1e-3)


def test_rgb_axes_turn_every_head_by_the_cameras_rotation(hpdb: Path) -> None:
    depth, rgb = Biwi(hpdb), Biwi(hpdb, rgb_axes=True)
    turn_deg = degrees(np.arccos((np.trace(fixture.TO_RGB) - 1) / 2))
    assert 0.9 < turn_deg < 1.1
    for i in range(len(depth)):
        pair = [source.sample(i).record.heads[0].matrix for source in (depth, rgb)]
        assert pose.geodesic_deg(*pair) == pytest.approx(turn_deg, abs=1e-3)
        # A nose tip in depth axes, seen from the RGB camera: the direction turns with the axes.
        np.testing.assert_allclose(pair[1][:, 2], fixture.TO_RGB @ pair[0][:, 2], atol=1e-5)


def test_boxes_bound_the_sphere_as_the_camera_sees_it(hpdb: Path) -> None:
    camera = read_camera(hpdb / "12" / "rgb.cal")
    np.testing.assert_array_equal(camera.intrinsics, np.round(fixture.RGB, 3))
    directions = np.random.default_rng(0).standard_normal((3, 200_000))
    directions /= np.linalg.norm(directions, axis=0)
    for centre in (np.array([43.4, -30.7, 906.9]), np.array([-300.0, 200.0, 700.0])):
        points = fixture.TO_RGB @ (120 * directions + centre[:, None]) + fixture.OFFSET_MM[:, None]
        x, y, _ = camera.intrinsics @ (points / points[2])
        expected = (x.min(), y.min(), x.max(), y.max())
        assert camera.box_of_sphere(centre, 120.0) == pytest.approx(expected, abs=0.05)
    assert camera.box_of_sphere(np.array([0.0, 0.0, 100.0]), 120.0) is None
    assert camera.box_of_sphere(np.array([0.0, 0.0, -900.0]), 120.0) is None
    assert camera.box_of_sphere(np.array([2000.0, 0.0, 135.0]), 120.0) is None


def test_a_box_holds_the_drawn_face_and_the_camera_is_stored(hpdb: Path) -> None:
    sample = Biwi(hpdb).sample(0)
    assert sample.extension == "png" and sample.image == (hpdb / "03" / "frame_00003_rgb.png").read_bytes()
    x0, y0, x1, y1 = sample.record.heads[0].bbox
    assert x1 - x0 == pytest.approx(2 * 120 * 129.4 / 937, rel=0.05)
    assert sample.record.image.camera is not None and sample.record.image.camera.cy == 60.125
    smaller = Biwi(hpdb, head_radius_mm=60).sample(0).record.heads[0].bbox
    assert x0 < smaller[0] < smaller[2] < x1


def test_what_is_dropped_is_counted_and_people_are_subjects(hpdb: Path) -> None:
    source = Biwi(hpdb)
    assert len(source) == 6 and source.scope["dropped"] == {"head outside the image": 1}
    subjects = {s.key[:2]: s.record.heads[0].subject for s in map(source.sample, range(6))}
    assert subjects == {"03": "biwi/F03", "12": "biwi/M06", "15": "biwi/F03", "20": "biwi/M12"}


def test_seventy_thirty_keeps_people_apart() -> None:
    assert len(PEOPLE) == 24 and len(set(PEOPLE.values())) == 20
    assert sum(person.startswith("F") for person in set(PEOPLE.values())) == 6
    for seed in range(50):
        train = train_sequences(seed)
        assert len(train) == 16
        assert not {PEOPLE[s] for s in train} & {PEOPLE[s] for s in set(PEOPLE) - train}
    assert len({frozenset(train_sequences(seed)) for seed in range(50)}) > 40


def test_protocols_choose_sequences(hpdb: Path) -> None:
    train, test = (Biwi(hpdb, "70-30", split, seed=2) for split in ("train", "test"))
    assert set(train.scope["sequences"]) | set(test.scope["sequences"]) == {"03", "12", "15", "20"}
    assert set(train.scope["sequences"]) <= train_sequences(2) and not set(test.scope["sequences"]) & train_sequences(2)
    assert len(train) + len(test) == 6


def test_missing_and_broken_files_are_named(hpdb: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folders 01, 02, …; name hpdb"):
        Biwi(tmp_path)
    with pytest.raises(UsageError, match="--head-radius-mm 0"):
        Biwi(hpdb, head_radius_mm=0)

    def broken(name: str, text: str | None, said: str) -> None:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(hpdb / "15", copy / "15")
        (copy / "15" / name).unlink()
        if text is not None:
            (copy / "15" / name).write_text(text)
        with pytest.raises(UserError, match=said):
            Biwi(copy)

    broken("rgb.cal", None, r"rgb\.cal: not there; this file of kinect_head_pose_db\.tgz")
    broken("rgb.cal", "1 2 3\n", r"rgb\.cal: 3 numbers, at least 23")
    broken("rgb.cal", "1 " * 27, r"rgb\.cal: .* rotation matrix")
    broken("frame_00003_pose.txt", "1 0 0\n0 1 0\n0 0 one\n", "does not hold numbers")
    broken("frame_00003_pose.txt", "1 0 0\n0 1 0\n0 0 2\n\n1 2 3\n", "no rotation matrix")
    broken("frame_00003_rgb.png", None, r"frame_00003_rgb\.png: not there")


def test_a_built_set_verifies(hpdb: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "set"
    assert main([*build_words("biwi", hpdb), "--out", str(out)]) == 0
    assert main(["verify", str(out)]) == 0
    assert "good" in capsys.readouterr().out


def test_options_reach_the_source(hpdb: Path) -> None:
    add_arguments, make = SOURCES["biwi"]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [
        str(hpdb),
        "--protocol",
        "70-30",
        "--split",
        "train",
        "--seed",
        "2",
        "--rgb-axes",
        "--head-radius-mm",
        "90",
    ]
    source = make(parser.parse_args(words))
    assert source.split == "train" and source.scope["axes"] == "rgb"
    assert source.scope["head_radius_mm"] == 90 and source.scope["seed"] == 2
