"""300W-LP and AFLW2000: poses against the geometry of the landmarks, boxes by the published rules, what is dropped."""

import argparse
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat
from scipy.spatial.transform import Rotation

from launcher.errors import UserError
from shards.cli import main
from shards.index import open_set
from shards.sources import SOURCES
from shards.sources.files import Part
from shards.sources.fixtures import aflw2000 as aflw2000_fixture
from shards.sources.fixtures import build_words, faces
from shards.sources.fixtures import w300lp as w300lp_fixture
from shards.sources.w300lp import source as w300lp
from shards.write import Sample, Source

TRAIN, TEST = Part("train", {"train": 1.0}), Part("test", {"test": 1.0})


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "300W_LP"
    w300lp_fixture.write(folder)
    return folder


@pytest.fixture(scope="module")
def aflw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "AFLW2000"
    aflw2000_fixture.write(folder)
    return folder


def samples(source: Source) -> dict[str, Sample]:
    return {sample.record.image.id: sample for sample in map(source.sample, range(len(source)))}


def test_poses_are_those_of_the_landmarks_in_space(aflw: Path) -> None:
    """AFLW2000's pt3d_68 have x right, y down, z towards the viewer: with z turned round they are in camera axes."""
    for name, sample in samples(w300lp.aflw2000(aflw, TEST)).items():
        fields = loadmat(aflw / f"{name}.mat")
        if "pt3d_68" not in fields:
            continue
        seen = fields["pt3d_68"] * [[1], [1], [-1]]
        model = faces.landmarks()
        to_camera, _ = Rotation.align_vectors(
            (seen - seen.mean(axis=1, keepdims=True)).T, (model - model.mean(axis=1, keepdims=True)).T
        )
        rotation = to_camera.as_matrix() @ np.diag([1, -1, -1])  # M of a head that looks into the camera is 1
        np.testing.assert_allclose(sample.record.heads[0].matrix, rotation, atol=1e-5)


def test_yaw_pitch_and_roll_are_pose_para_in_degrees(tree: Path) -> None:
    found = samples(w300lp.w300lp(tree, TRAIN))
    for name, angles_deg in w300lp_fixture.FACES.items():
        if max(map(abs, angles_deg)) <= 99:
            np.testing.assert_allclose(found[name].record.heads[0].pose_deg, angles_deg, atol=1e-4)


def test_mirrored_pictures_hold_mirrored_records(tree: Path) -> None:
    found = samples(w300lp.w300lp(tree, TRAIN))
    name = "IBUG/IBUG_image_052_1_8"
    mirrored = found[name].record.mirrored().heads[0]
    np.testing.assert_allclose(found["IBUG_Flip/IBUG_image_052_1_8"].record.heads[0].matrix, mirrored.matrix, atol=1e-6)


def test_boxes_follow_the_published_rules(tree: Path, aflw: Path) -> None:
    """Worked by hand: landmarks of 10 x 20 px from (100, 200)."""
    points = np.array([[100.0, 110.0, 104.0], [205.0, 200.0, 220.0]])
    assert w300lp.CROPS["aflw2000"].box(points) == pytest.approx((96.0, 192.0, 115.6, 223.36))
    assert w300lp.CROPS["300w-lp"].box(points) == pytest.approx((98.2, 188.0, 112.124, 225.76))
    for source in (w300lp.w300lp(tree, TRAIN), w300lp.aflw2000(aflw, TEST)):
        for sample in samples(source).values():
            x0, y0, x1, y1 = sample.record.heads[0].bbox
            assert 0 <= x0 < x1 <= sample.record.image.width and 0 <= y0 < y1 <= sample.record.image.height


def test_hidden_landmarks_do_not_stretch_the_box(aflw: Path) -> None:
    box = samples(w300lp.aflw2000(aflw, TEST))["image00014"].record.heads[0].bbox
    seen = loadmat(aflw / "image00014.mat")["pt2d"]
    assert (seen == -1).any() and box[0] > 5
    assert box[0] <= seen[0][seen[0] != -1].min() and box[2] >= seen[0].max()


def test_what_is_dropped_is_counted(tree: Path, aflw: Path) -> None:
    lp, test = w300lp.w300lp(tree, TRAIN), w300lp.aflw2000(aflw, TEST)
    assert len(lp) == 14 and lp.scope["dropped"] == {"an angle beyond 99 deg": 2}
    assert len(test) == 4
    assert test.scope["dropped"] == {"an angle beyond 99 deg": 2, "landmarks span less than 8 px of the image": 1}
    assert len(w300lp.w300lp(tree, TRAIN, max_angle_deg=360)) == 16
    assert len(w300lp.w300lp(tree, TRAIN, flips=False)) == 7
    assert set(samples(w300lp.w300lp(tree, TRAIN, ["LFPW"]))) == {
        "LFPW/LFPW_image_train_0737_0",
        "LFPW_Flip/LFPW_image_train_0737_0",
    }


def test_all_pictures_of_a_photo_are_one_subject(tree: Path) -> None:
    subjects = {name: sample.record.image.subject for name, sample in samples(w300lp.w300lp(tree, TRAIN)).items()}
    assert set(subjects.values()) == {
        "300w-lp/AFW_134212",
        "300w-lp/HELEN_1269874180",
        "300w-lp/IBUG_image_052",
        "300w-lp/LFPW_image_train_0737",
    }
    assert w300lp.photo("LFPW_Flip/LFPW_image_test_0001_4") == "LFPW_image_test_0001"
    shares = {"train": 0.5, "val": 0.5}
    train, val = (set(samples(w300lp.w300lp(tree, Part(s, shares, 1)))) for s in ("train", "val"))
    assert train and val and train | val == set(subjects)
    assert not {subjects[name] for name in train} & {subjects[name] for name in val}


def test_missing_and_broken_files_are_named(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"AFW: not there; here belongs a folder of 300W_LP\.zip"):
        w300lp.w300lp(tmp_path, TRAIN)
    with pytest.raises(UserError, match=r"no image\*\.mat; name the folder AFLW2000"):
        w300lp.aflw2000(tmp_path, TEST)
    broken = tmp_path / "tree"
    shutil.copytree(tree / "IBUG", broken / "IBUG")
    mat = broken / "IBUG" / "IBUG_image_052_1_8.mat"
    whole = mat.read_bytes()
    for data in (b"", whole[: len(whole) // 2], b"MATLAB 7.3 MAT-file" + bytes(105) + b"\x00\x02IM" + bytes(400)):
        mat.write_bytes(data)
        with pytest.raises(UserError, match=r"IBUG_image_052_1_8\.mat: not a readable MATLAB file") as caught:
            w300lp.w300lp(broken, TRAIN, ["IBUG"], flips=False)
        assert "\n" not in str(caught.value)
    savemat(mat, {"Pose_Para": np.array([[0.0, np.nan, 0.0]])})
    with pytest.raises(UserError, match="Pose_Para does not hold numbers"):
        w300lp.w300lp(broken, TRAIN, ["IBUG"], flips=False)
    mat.write_bytes(whole)
    mat.with_suffix(".jpg").unlink()
    with pytest.raises(UserError, match=r"IBUG_image_052_1_8\.jpg: not there, but the labels name it"):
        w300lp.w300lp(broken, TRAIN, ["IBUG"], flips=False)


@pytest.mark.parametrize("name", ["300w-lp", "aflw2000"])
def test_built_sets_verify(name: str, tree: Path, aflw: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = {"300w-lp": tree, "aflw2000": aflw}[name]
    out = tmp_path / "set"
    assert main([*build_words(name, folder), "--out", str(out)]) == 0
    assert main(["verify", str(out)]) == 0
    assert "good" in capsys.readouterr().out
    built = open_set(out)
    assert built.info["split"] == {"300w-lp": "train", "aflw2000": "test"}[name]
    assert built.info["scope"]["dropped"]["an angle beyond 99 deg"] == 2


def test_options_reach_the_source(tree: Path) -> None:
    add_arguments, make = SOURCES["300w-lp"]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [str(tree), "--subsets", "AFW", "--no-flips", "--crop", "aflw2000", "--max-angle-deg", "30"]
    source = make(parser.parse_args(words))
    assert len(source) == 2 and source.scope["crop"] == "aflw2000" and source.scope["flips"] is False
