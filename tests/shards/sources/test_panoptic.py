"""Panoptic's sequences and DirectMHP's JSON of them: the poses that the fixture was made with, through every camera."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from sourcing import pixels_of, records_of, source_of

from launcher.errors import UsageError, UserError
from shards import pose
from shards.cli import main
from shards.record import Record
from shards.sources.fixtures import panoptic as fixture
from shards.sources.panoptic import SPLITS

VAL = "171026_pose3"


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("panoptic")
    fixture.write(folder)
    return folder


def val(folder: Path, *words: object) -> Any:
    """The validation sequence, whose damaged image is smaller than 2 kB and whose others are not."""
    return source_of("panoptic", folder, "--split", "val", "--least-image-kb", 2, *words)


def train(folder: Path, *words: object) -> Any:
    return source_of("panoptic", folder, "--split", "train", "--least-image-kb", 2, *words)


def expected(person: fixture.Person, node: int) -> np.ndarray:
    """M of a head in an HD camera: turn from camera 0's axes to the camera's, times the M that was asked for."""
    yaw, pitch, roll = person.pose_deg
    asked = Rotation.from_euler("zyx", [roll, yaw, -pitch], degrees=True)
    turn = Rotation.from_matrix(fixture.camera(node)[0]) * Rotation.from_matrix(fixture.camera(0)[0]).inv()
    return (turn * asked).as_matrix()


def place(record: Record) -> tuple[str, int, int]:
    """Sequence, camera, frame."""
    sequence, _, name = record.image.id.partition("/")
    _, node, frame = name.split("_")
    return sequence, int(node), int(frame)


def test_every_camera_sees_the_pose_it_must(official: Path) -> None:
    seen = 0
    for record in records_of(val(official)) + records_of(train(official)):
        sequence, node, frame = place(record)
        for head in record.heads:
            number = int(head.subject.rpartition("/")[2])
            wanted = expected(fixture.FRAMES[sequence][frame][number], node)
            assert pose.geodesic_deg(head.matrix, wanted) < 1e-3
            if node == 0:
                truth = fixture.FRAMES[sequence][frame][number].pose_deg
                np.testing.assert_allclose(head.pose_deg, truth, atol=1e-3)
            seen += 1
    assert seen == 22


def test_seven_sure_landmarks_are_enough_and_six_lose_the_image(official: Path) -> None:
    source = train(official)
    frames = [place(record)[1:] for record in records_of(source)]
    assert frames == [(0, 120), (0, 180), (5, 120), (5, 180), (16, 120), (16, 180)]
    assert all(len(record.heads) == 2 for record in records_of(source) if place(record)[2] == 180)
    lost, empty = "image with a face that tells no pose", "image without a head left"
    assert source.scope["dropped"] == {lost: 3, empty: 3}


def test_a_head_rolled_beyond_90_loses_the_image_and_one_out_of_view_only_itself(official: Path) -> None:
    source = val(official)
    by_place = {place(record)[1:]: record for record in records_of(source)}
    people = fixture.FRAMES[VAL][180]
    rolls = {node: pose.pose_from_rotation(expected(people[0], node))[2] for node in fixture.NODES}
    assert [node for node, roll in rolls.items() if abs(roll) >= 90] == [16]
    assert (0, 180) in by_place and (5, 180) in by_place and (16, 180) not in by_place
    assert [len(by_place[node, 0].heads) for node in fixture.NODES] == [1, 2, 1]
    assert fixture.DAMAGED[1:] not in by_place and (0, 120) in by_place
    assert source.scope["dropped"] == {
        "outside the image": 2,
        "image file too small (damaged)": 1,
        "image with a face that tells no pose": 1,
    }
    with pytest.raises(UsageError, match="--every 0: it must be 1 or more"):
        val(official, "--every", 0)


def test_boxes_are_the_sphere_as_the_lens_shows_it(official: Path) -> None:
    """200,000 points of the sphere through OpenCV's formula, all five coefficients."""
    k1, k2, p1, p2, k3 = -0.2326, 0.1925, -0.000253, 0.000418, -0.0112
    sphere = np.random.default_rng(0).normal(size=(200_000, 3))
    sphere *= 14.9 * 0.93 / np.linalg.norm(sphere, axis=1, keepdims=True)
    for record in records_of(val(official)):
        sequence, node, frame = place(record)
        rotation, shift = fixture.camera(node)
        for head in record.heads:
            person = fixture.FRAMES[sequence][frame][int(head.subject.rpartition("/")[2])]
            x, y, z = ((sphere + person.centre_cm) @ rotation.T + shift).T
            x, y = x / z, y / z
            r2 = x * x + y * y
            bend = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
            u = 93.03 * (x * bend + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)) + 63.4
            v = 92.82 * (y * bend + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y) + 37.6
            box = (max(u.min(), 0), max(v.min(), 0), min(u.max(), 128), min(v.max(), 72))
            assert head.bbox == pytest.approx(box, abs=0.03)


def test_cameras_subjects_and_bytes(official: Path) -> None:
    source = val(official)
    sample = source.sample(0)
    assert sample.key == f"{VAL}/00_00_00000000" and sample.extension == "jpg"
    assert sample.image == (official / VAL / "hdImgs" / "00_00" / "00_00_00000000.jpg").read_bytes()
    image = sample.record.image
    assert (image.width, image.height, image.subject) == (128, 72, f"panoptic/{VAL}")
    assert image.camera is not None and (image.camera.fx, image.camera.cy) == (93.03, 37.6)
    assert sample.record.heads[0].subject == f"panoptic/{VAL}/0"


def test_frames_and_cameras_are_chosen(official: Path, tmp_path: Path) -> None:
    def frames(source: Any) -> set[tuple[int, int]]:
        return {place(record)[1:] for record in records_of(source)}

    assert {frame for _, frame in frames(val(official))} == {0, 60, 120, 180}
    assert {frame for _, frame in frames(val(official, "--every", 45))} == {0, 90, 180}
    assert {node for node, _ in frames(val(official, "--cameras", 16, 5, 5))} == {5, 16}
    with pytest.raises(UsageError, match=r"--cameras \[31\]: the HD cameras are 0 to 30"):
        val(official, "--cameras", 31)
    # More than 5 minutes: one frame in 180.
    shutil.copytree(official / VAL, tmp_path / VAL)
    faces = tmp_path / VAL / "hdFace3d"
    shutil.copy(faces / "faceRecon3D_hd00000000.json", faces / "faceRecon3D_hd00009001.json")
    assert {frame for _, frame in frames(val(tmp_path))} == {0, 180}


def test_splits_are_those_of_cmu_hpe_and_sequences_can_be_named(official: Path) -> None:
    assert len(SPLITS["train"]) == 9 and len(SPLITS["val"]) == 8 and not set(SPLITS["train"]) & set(SPLITS["val"])
    assert val(official).scope["sequences"] == [VAL] and val(official).scope["sequences_left"] == ["171204_pose3"]
    both = val(official, "--sequences", "171204_pose3", VAL)
    assert both.scope["sequences"] == [VAL, "171204_pose3"] and both.split == "val"
    with pytest.raises(UserError, match="no sequence 170101_none1, only 171026_pose3, 171204_pose3"):
        val(official, "--sequences", "170101_none1")


def test_sequences_of_another_split_are_said_so(official: Path, tmp_path: Path) -> None:
    shutil.copytree(official / "171204_pose3", tmp_path / "171204_pose3")
    with pytest.raises(UserError, match=r"no sequence of val, only 171204_pose3; the split is 171026_pose3, "):
        val(tmp_path)


def test_directmhps_json_gives_its_angles_in_their_order(official: Path) -> None:
    for split, sequence, pose_deg in (("train", "171204_pose3", (35, 12, -8)), ("val", VAL, (-45, 0, 0))):
        source = source_of("panoptic", official / "directmhp", "--split", split)
        (record,) = records_of(source)
        np.testing.assert_allclose(record.heads[0].pose_deg, pose_deg, atol=1e-3)
        assert record.image.subject == f"panoptic/{sequence}" and record.image.camera is None
    path = official / "directmhp" / "annotations" / "coco_style_sampled_train.json"
    assert json.loads(path.read_text())["annotations"][0]["euler_angles"] == [12.0, 35.0, -8.0]


@pytest.mark.parametrize(
    "words",
    [
        *(("--sequences", VAL), ("--cameras", 3), ("--every", 5), ("--least-image-kb", 2), ("--video",)),
        ("--reference", "face.npy"),
    ],
)
def test_options_of_sequences_are_refused_where_the_json_is_read(official: Path, words: tuple[object, ...]) -> None:
    with pytest.raises(UsageError, match=f"{words[0]}: has no effect on DirectMHP's JSON.*; leave it out, or move "):
        source_of("panoptic", official / "directmhp", *words)


def test_json_without_seq_is_told_by_its_numbers(official: Path, tmp_path: Path) -> None:
    shutil.copytree(official / "directmhp", tmp_path / "set")
    path = tmp_path / "set" / "annotations" / "coco_style_sampled_val.json"
    value = json.loads(path.read_text())
    del value["images"][0]["seq"]
    path.write_text(json.dumps(value))
    (record,) = records_of(source_of("panoptic", tmp_path / "set", "--split", "val"))
    assert record.image.subject == f"panoptic/{VAL}"
    value["images"][0]["id"] = value["annotations"][0]["image_id"] = 12
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match="image 12 has neither seq nor an id of CMU-HPE"):
        source_of("panoptic", tmp_path / "set", "--split", "val")
    (path.parent / "coco_style_sampled_val_v2.json").write_text("{}")
    with pytest.raises(UserError, match="coco_style_sampled_val.json, coco_style_sampled_val_v2.json; choose one"):
        source_of("panoptic", tmp_path / "set", "--split", "val")


def test_missing_and_broken_files_are_named(official: Path, tmp_path: Path) -> None:
    def broken(said: str, name: str, text: str | None = None) -> None:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(official / VAL, copy / VAL)
        target = copy / VAL / name
        if text is not None:
            target.write_text(text)
        elif target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink()
        with pytest.raises(UserError, match=said):
            val(copy)

    calibration, face = f"calibration_{VAL}.json", "hdFace3d/faceRecon3D_hd00000060.json"
    known = json.loads((official / VAL / calibration).read_text())
    broken(r"copy: no SEQ/calibration_SEQ\.json; the sequences of the Panoptic Toolbox", calibration)
    broken("calibration_171026_pose3.json: not JSON", calibration, "{")
    broken(r"not a calibration of Panoptic \(KeyError: 'cameras'\)", calibration, "{}")
    known["cameras"][2]["R"][0][0] += 0.5
    broken("R of camera 0 is no rotation", calibration, json.dumps(known))
    known["cameras"][2]["R"] = [[1, 0], [0, 1]]
    broken("not a calibration of Panoptic .ValueError", calibration, json.dumps(known))
    broken("hdFace3d: not there; hdFace3d of the sequence", "hdFace3d")
    broken("hdImgs: not there; images of the HD cameras .*--video", "hdImgs")
    broken(r"hd00000060\.json: not a face file of Panoptic .KeyError: 'people'", face, "{}")
    short = {"people": [{"id": 0, "face70": {"landmarks": [1.0] * 30, "averageScore": [1.0] * 70}}]}
    broken(r"hd00000060\.json: not a face file of Panoptic .IndexError", face, json.dumps(short))
    with pytest.raises(UserError, match="nowhere: not there; the sequences of the Panoptic Toolbox"):
        val(tmp_path / "nowhere")


def test_images_of_another_size_are_refused(official: Path, tmp_path: Path) -> None:
    shutil.copytree(official / VAL, tmp_path / VAL)
    path = tmp_path / VAL / f"calibration_{VAL}.json"
    path.write_text(path.read_text().replace("[128, 72]", "[1920, 1080]"))
    source = val(tmp_path)
    with pytest.raises(UserError, match="128x72, but its labels are for 1920x1080"):
        source.sample(0)


def test_without_opencv_videos_are_refused_in_one_line(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(official / VAL, tmp_path / VAL)
    with pytest.raises(UserError, match="hdVideos: not there"):
        val(tmp_path, "--video")
    (tmp_path / VAL / "hdVideos").mkdir()
    (tmp_path / VAL / "hdVideos" / "hd_00_00.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r'opencv is not there; .*pip install -c constraints.txt -e "\.\[video\]", or '):
        val(tmp_path, "--video")


def test_videos_are_not_read_in_a_shuffled_order(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["build", "panoptic", str(official), "--split", "val", "--video", "--out", str(tmp_path / "set")]
    assert main([*words, "--shuffle", "0"]) == 2
    assert "--video with --shuffle: " in (said := capsys.readouterr().err) and "extract hdImgs first" in said
    assert main(words) == 1
    assert "hdVideos: not there" in capsys.readouterr().err


def grey(frame: int) -> int:
    """Of every pixel of a frame of the test's videos; neighbours differ by 7."""
    return 20 + frame * 7 % 200


def write_video(path: Path, frames: int, size: tuple[int, int] = fixture.SIZE_PX) -> None:
    cv2 = pytest.importorskip("cv2")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 29.97, size)
    for frame in range(frames):
        writer.write(np.full((size[1], size[0], 3), grey(frame), np.uint8))
    writer.release()


def test_frames_of_videos_are_the_ones_of_their_number(official: Path, tmp_path: Path) -> None:
    shutil.copytree(official / VAL, tmp_path / VAL, ignore=shutil.ignore_patterns("hdImgs"))
    write_video(tmp_path / VAL / "hdVideos" / "hd_00_00.mp4", 181)
    write_video(tmp_path / VAL / "hdVideos" / "hd_00_05.mp4", 100)
    source = val(tmp_path, "--video")
    places = [place(record)[1:] for record in records_of(source)]
    assert places == [(0, 0), (0, 60), (0, 120), (0, 180), (5, 0), (5, 60)]
    assert source.scope["frames"] == "hdVideos" and source.scope["least_image_kb"] is None
    first = [source.sample(i) for i in range(len(source))]
    for i in (3, 1, 5, 0, 2, 4):
        sample = source.sample(i)
        assert sample == first[i], "a sample does not depend on what was read before"
        assert pixels_of(sample.image).mean() == pytest.approx(grey(places[i][1]), abs=3)
    images = val(official)
    by_id = {record.image.id: record for record in records_of(images)}
    for sample in first:
        assert sample.record.heads == by_id[sample.record.image.id].heads


def test_damaged_videos_are_named(official: Path, tmp_path: Path) -> None:
    shutil.copytree(official / VAL, tmp_path / VAL, ignore=shutil.ignore_patterns("hdImgs"))
    path = tmp_path / VAL / "hdVideos" / "hd_00_00.mp4"
    write_video(path, 100, (64, 64))
    with pytest.raises(UserError, match=r"hd_00_00\.mp4: 64x64, not 128x72 as calibrated"):
        val(tmp_path, "--video").sample(0)
    path.write_bytes(b"no video")
    with pytest.raises(UserError, match=r"hd_00_00\.mp4: no readable video"):
        val(tmp_path, "--video")


def test_a_built_set_verifies_and_splits_share_nobody(official: Path, tmp_path: Path) -> None:
    sets = [str(tmp_path / split) for split in SPLITS]
    for split, out in zip(SPLITS, sets, strict=True):
        words = ["--split", split, "--least-image-kb", "2", "--out", out]
        assert main(["build", "panoptic", str(official), *words]) == 0
    assert main(["verify", *sets]) == 0
