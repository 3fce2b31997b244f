"""AGORA's tables and DirectMHP's JSON of it: the poses that the fixture was made with, through the whole reader."""

import json
import pickle
import shutil
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from sourcing import records_of, source_of

from launcher.errors import UsageError, UserError
from shards import pose
from shards.cli import main
from shards.record import Record
from shards.sources.agora import scenes
from shards.sources.face import SMPLX, reference
from shards.sources.fixtures import agora as fixture
from shards.sources.fixtures.pandas_pickle import frame_bytes
from shards.sources.unpickle import read_frame

KEPT = {
    split: [[person for person in shot.people if not person.dropped] for shot in shots]
    for split, shots in (("validation", fixture.VALIDATION), ("train", fixture.TRAIN))
}


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agora")
    fixture.write(folder)
    return folder


def poses(record: Record) -> np.ndarray:
    """(heads, 3) yaw, pitch, roll, decoded by scipy and the range rule of docs/angles.md."""
    triples = []
    for head in record.heads:
        minus_pitch, yaw, roll = Rotation.from_matrix(head.matrix).as_euler("XYZ", degrees=True)
        if abs(minus_pitch) > 90:
            minus_pitch, yaw, roll = (
                minus_pitch - np.copysign(180, minus_pitch),
                180 - yaw,
                roll - np.copysign(180, roll),
            )
        triples.append([(yaw + 180) % 360 - 180, -minus_pitch, roll])
    return np.array(triples)


def rewritten(folder: Path, split: str, without: tuple[str, ...] = (), **columns: Any) -> Path:
    """A copy of the data set whose table lacks some columns and has others."""
    table = read_frame(folder / "Cam" / f"{split}_Cam" / f"{split}_0_withjv.pkl")
    again = {name: table.column(name) for name in table.names if name not in without} | columns
    path = folder / "changed" / "Cam" / f"{split}_0.pkl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(frame_bytes(again))
    return path.parent


@pytest.mark.parametrize("split", ["validation", "train"])
def test_tables_give_the_poses_they_were_made_with(official: Path, split: str) -> None:
    records = records_of(source_of("agora", official, "--split", split))
    wanted = [people for people in KEPT[split] if people]
    assert len(records) == len(wanted)
    for record, people in zip(records, wanted, strict=True):
        truth = np.array([person.pose_deg for person in people], dtype=float)
        np.testing.assert_allclose(poses(record), truth, atol=1e-3)
        shares = [1 - person.occlusion / 100 for person in people]
        assert [head.visible for head in record.heads] == pytest.approx(shares)


PATCH = ("gt_joints_3d", "cam_j3d", "camR", "camT", "camK")


@pytest.mark.parametrize(
    "without",
    [("gt_joints_3d",), ("gt_joints_3d", "camR", "camT", "camK"), PATCH[1:]],
    ids=["by camR and camT", "by the scene", "camera coordinates"],
)
def test_every_form_of_the_joints_leads_to_the_same_heads(
    official: Path, tmp_path: Path, without: tuple[str, ...]
) -> None:
    shutil.copytree(official, tmp_path / "set")
    cams = rewritten(tmp_path / "set", "train", without)
    known = records_of(source_of("agora", official, "--split", "train"))
    again = records_of(source_of("agora", official, "--split", "train", "--cams", cams))
    for one, other in zip(known, again, strict=True):
        for head, same in zip(one.heads, other.heads, strict=True):
            assert pose.geodesic_deg(head.matrix, same.matrix) < 1e-6
            assert head.bbox == pytest.approx(same.bbox, abs=1e-6)


@pytest.mark.parametrize("word", ["hdri", "cam00", "cam01", "cam02", "cam03", "ag2", "flowers"])
def test_cameras_are_those_of_the_published_projection(word: str) -> None:
    """p_cam = Rx(pitch) · Ry(-camYaw) · (Ry(Yaw - 90) · diag(1, -1, -1) · p + place - camera), by rotation vectors."""
    table = {
        "hdri": (50, (0, 0, 170), 0, 0, 0.0),
        "cam00": (18, (400, -275, 265), 135, 30, 0.0),
        "cam01": (18, (400, 225, 265), -135, 30, 0.0),
        "cam02": (18, (-490, 170, 265), -45, 30, 0.0),
        "cam03": (18, (-490, -275, 265), 45, 30, 0.0),
        "ag2": (28, (0, 0, 170), 0, 15, 0.0),
        "flowers": (28, (1000.0, -200.0, 150.0), 77.0, 0, -1.7),
    }
    focal, camera_cm, camera_yaw, pitch, ground = table[word]
    row = {"camX": 1000.0, "camY": -200.0, "camZ": 150.0, "camYaw": 77.0}
    name, yaw, place_cm = f"ag_trainset_{word}_5_10_00001", 33.0, (300.0, -120.0, 10.0)
    points = np.random.default_rng(0).normal(size=(20, 3))

    def about(axis: list[float], angle_deg: float) -> Rotation:
        return Rotation.from_rotvec(np.array(axis) * np.radians(angle_deg))

    def forward(cm: tuple[float, ...]) -> np.ndarray:
        return np.roll(cm, 2) * [1, -1, 1] / 100

    world = about([0, 1, 0], yaw - 90).apply(points * [1, -1, -1]) + forward(place_cm)
    seen = about([0, 1, 0], -camera_yaw).apply(world - forward(camera_cm) - [0, ground, 0])
    seen = about([1, 0, 0], pitch).apply(seen)
    rotation, shift = scenes.person_to_camera(scenes.scene_of(name, row), yaw, place_cm)
    np.testing.assert_allclose(points * [1, -1, -1] @ rotation.T + shift, seen, atol=1e-12)
    camera = scenes.camera_of(name, (1280, 720))
    assert (camera.fx, camera.fy) == pytest.approx((focal / 36 * 1280, focal / 20.25 * 720))
    assert (camera.cx, camera.cy) == (640, 360)


def test_boxes_hold_the_face_and_are_the_published_size(official: Path) -> None:
    table = read_frame(official / "Cam" / "validation_Cam" / "validation_0_withjv.pkl")
    records = records_of(source_of("agora", official, "--split", "validation"))
    scale = fixture.SIZE_PX[0] / 3840
    for record, points, people in zip(records, table.column("gt_joints_2d"), fixture.VALIDATION, strict=False):
        for head, k in zip(record.heads, (k for k, p in enumerate(people.people) if not p.dropped), strict=True):
            x0, y0, x1, y1 = head.bbox
            inside = points[k][list(SMPLX)] * scale
            assert (inside > (x0, y0)).all() and (inside < (x1, y1)).all()
            # The fixture's faces are 0.95 of our reference: a sphere of 0.0095 · 14.9 m.
            camera, depth = record.image.camera, people.people[k].centre_m[2]
            assert camera is not None
            assert x1 - x0 == pytest.approx(2 * camera.fx * 0.0095 * reference().radius / depth, rel=0.05, abs=0.5)


def test_what_is_left_out_is_counted_by_reason(official: Path) -> None:
    for split, shots in (("validation", fixture.VALIDATION), ("train", fixture.TRAIN)):
        reasons: dict[str, int] = {}
        for person in (person for shot in shots for person in shot.people if person.dropped):
            reasons[person.dropped] = reasons.get(person.dropped, 0) + 1
        empty = sum(not people for people in KEPT[split])
        wanted = reasons | ({"image without a head left": empty} if empty else {})
        assert source_of("agora", official, "--split", split).scope["dropped"] == wanted
    strict = source_of("agora", official, "--split", "validation", "--max-occlusion", 30)
    assert strict.scope["dropped"]["occluded"] == 3
    with pytest.raises(UsageError, match="--max-occlusion 0"):
        source_of("agora", official, "--max-occlusion", 0)


def test_subjects_are_sequences_and_scans_and_cameras_are_stored(official: Path) -> None:
    source = source_of("agora", official, "--split", "validation")
    first, second = records_of(source)
    assert first.image.subject == "agora/ag_validationset_renderpeople_bfh_hdri_50mm_5_10"
    assert second.image.subject == "agora/ag_validationset_3dpeople_bfh_archviz_5_10"
    scan = "agora/GT_fits/smplx_gt/validationset_renderpeople_adults_bfh/3dp_kim_posed_007"
    assert second.heads[0].subject == scan
    assert second.image.camera == scenes.Camera(64.0, 64.0, 64.0, 36.0)
    sample = source.sample(1)
    assert sample.key == "ag_validationset_3dpeople_bfh_archviz_5_10_cam02_00001" and sample.extension == "png"
    assert sample.image == next((official / "images").rglob("*cam02_00001_1280x720.png")).read_bytes()


def test_directmhps_json_gives_its_angles_in_their_order(official: Path) -> None:
    for split in ("train", "validation"):
        source = source_of("agora", official / "directmhp", "--split", split)
        wanted = [people for people in KEPT[split] if people]
        for record, people in zip(records_of(source), wanted, strict=True):
            np.testing.assert_allclose(poses(record), [p.pose_deg for p in people], atol=1e-3)
        assert source.scope["labels"] == "directmhp" and source.sample(0).extension == "jpg"
    value = json.loads((official / "directmhp" / "annotations" / "coco_style_validation.json").read_text())
    assert value["annotations"][0]["euler_angles"] == [10.0, 30.0, -5.0]
    x, y, width, height = value["annotations"][0]["bbox"]
    record = records_of(source)[0]
    assert record.heads[0].bbox == (x, y, x + width, y + height)


def test_both_ways_agree_on_subjects_and_cameras(official: Path) -> None:
    for split in ("train", "validation"):
        ours = records_of(source_of("agora", official, "--split", split))
        theirs = records_of(source_of("agora", official / "directmhp", "--split", split))
        for one, other in zip(ours, theirs, strict=True):
            assert one.image.subject == other.image.subject and one.image.camera == other.image.camera


def edited(official: Path, tmp_path: Path, change: Mapping[str, Any], part: str, k: int) -> Path:
    """DirectMHP's folder with one entry of its JSON changed."""
    folder = tmp_path / "edited"
    shutil.copytree(official / "directmhp", folder, dirs_exist_ok=True)
    path = folder / "annotations" / "coco_style_validation.json"
    value = json.loads((official / "directmhp" / "annotations" / path.name).read_text())
    value[part][k] = {key: v for key, v in (value[part][k] | change).items() if v is not None}
    path.write_text(json.dumps(value))
    return folder


def test_older_json_and_impossible_labels(official: Path, tmp_path: Path) -> None:
    def read(change: Mapping[str, Any], part: str = "annotations", k: int = 0) -> Any:
        return source_of("agora", edited(official, tmp_path, change, part, k), "--split", "validation")

    older = read({"bbox": None, "head_bbox": [1, 2, 30, 40]})
    assert older.sample(0).record.heads[0].bbox == (1, 2, 31, 42)
    assert read({"bbox": [-5, -5, 20, 20]}).sample(0).record.heads[0].bbox == (0, 0, 15, 15)
    assert read({"bbox": [5, 5, 0, 20]}).scope["dropped"] == {"box or angles that are none": 1}
    assert read({"euler_angles": [float("nan"), 0, 0]}).scope["dropped"] == {"box or angles that are none": 1}
    assert read({"bbox": [500, 5, 10, 20]}).scope["dropped"] == {"outside the image": 1}
    assert read({"seq_key": None}, "images").sample(0).record.image.subject == "agora/20001"
    with pytest.raises(UserError, match="image 7 has neither seq_key nor an id of ten digits"):
        read({"seq_key": None, "id": 7}, "images")
    with pytest.raises(UserError, match=r"not DirectMHP's COCO-style JSON \(KeyError: 'euler_angles'\)"):
        read({"euler_angles": None})
    with pytest.raises(UserError, match="leaves the folder of images"):
        read({"file_name": "../../secret.jpg"}, "images")
    with pytest.raises(UserError, match=r"other\.jpg: not there, nor are 0 more of 2 images"):
        read({"file_name": "other.jpg"}, "images")
    folder = edited(official, tmp_path, {"file_name": "other.jpg"}, "images", 0)
    allowed = source_of("agora", folder, "--split", "validation", "--allow-missing")
    assert len(allowed) == 1 and allowed.scope["dropped"] == {"image not there": 1}
    wrong = read({"width": 1280, "height": 720}, "images")
    with pytest.raises(UserError, match="128x72, but its labels are for 1280x720 pixels"):
        wrong.sample(0)


def test_another_reference_turns_every_head_alike(official: Path, tmp_path: Path) -> None:
    points = np.zeros((58, 3))
    tilt = Rotation.from_euler("x", -4, degrees=True)
    points[[38, 34, 33, 29, 13, 17, 25, 21, 54, 50, 43, 39, 45, 6]] = tilt.apply(reference().points)
    np.save(tmp_path / "reference.npy", points)
    words = ("--split", "train", "--reference", tmp_path / "reference.npy")
    ours, theirs = source_of("agora", official, "--split", "train"), source_of("agora", official, *words)
    assert (ours.scope["reference"], theirs.scope["reference"]) == ("ours", "reference.npy")
    for one, other in zip(records_of(ours), records_of(theirs), strict=True):
        for head, same in zip(one.heads, other.heads, strict=True):
            assert pose.geodesic_deg(head.matrix, same.matrix) == pytest.approx(4, abs=1e-6)


def test_missing_parts_are_named(official: Path, tmp_path: Path) -> None:
    def broken(said: str, *words: object) -> None:
        with pytest.raises(UserError, match=said):
            source_of("agora", *words)

    broken("Cam: not there; the Camera tables with SMPL-X joints", tmp_path)
    broken(r"no train_\*\.pkl", tmp_path, "--cams", official / "images")
    broken("images: not there; AGORA's images", tmp_path, "--cams", official / "Cam")
    cams = rewritten(official, "train", PATCH)
    broken(r"train_0\.pkl: no joints .* project_joints", official, "--cams", cams)
    few = tmp_path / "few"
    shutil.copytree(official / "images" / "validation", few)
    next(few.glob("*hdri*")).unlink()
    words = (official, "--split", "validation", "--images", few)
    broken("few: 1 of 2 images of the tables are not there, as ag_validationset_renderpeople", *words)
    assert len(source_of("agora", *words, "--allow-missing")) == 1
    with pytest.raises(UsageError, match="--annotations and --cams"):
        source_of("agora", official, "--annotations", few, "--cams", few)


@pytest.mark.parametrize("words", [("--reference", "face.npy"), ("--max-occlusion", 50)])
def test_options_of_tables_are_refused_where_the_json_is_read(official: Path, words: tuple[object, ...]) -> None:
    with pytest.raises(UsageError, match=rf"{words[0]}: has no effect on DirectMHP's JSON.*annotations\); leave it"):
        source_of("agora", official / "directmhp", *words)


def test_tables_of_another_kind_are_one_line(official: Path, tmp_path: Path) -> None:
    shutil.copytree(official, tmp_path / "set")
    joints = read_frame(official / "Cam" / "train_Cam" / "train_0_withjv.pkl").column("gt_joints_3d")
    smpl = [[person[:45] for person in people] for people in joints]
    cams = rewritten(tmp_path / "set", "train", gt_joints_3d=smpl)
    with pytest.raises(UserError, match=r"train_0\.pkl, row 0: .*joints of shape \(45, 3\), SMPL-X has \(127, 3\)"):
        source_of("agora", official, "--cams", cams)
    hole = [[np.full((127, 3), np.nan) for _ in people] for people in joints]
    source = source_of("agora", official, "--cams", rewritten(tmp_path / "set", "train", gt_joints_3d=hole))
    assert len(source) == 0 and source.scope["dropped"]["landmarks without a pose"] == 4
    cams = rewritten(tmp_path / "set", "train", occlusion=[[0.0], [0.0]])
    assert sum(source_of("agora", official, "--cams", cams).scope["dropped"].values()) == 0
    cams = rewritten(tmp_path / "set", "train", gt_joints_3d=[[], []])
    with pytest.raises(UserError, match=r"row 0: not as AGORA's tables are \(IndexError"):
        source_of("agora", official, "--cams", cams)


def test_an_attack_in_a_table_is_refused_and_did_not_happen(official: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "touched",)

    shutil.copytree(official / "images", tmp_path / "images")
    (tmp_path / "Cam").mkdir()
    (tmp_path / "Cam" / "train_0_withjv.pkl").write_bytes(pickle.dumps(Attack(), 4))
    with pytest.raises(UserError, match=r"train_0_withjv\.pkl: refused, it asks for"):
        source_of("agora", tmp_path)
    assert not (tmp_path / "touched").exists()
    pickle.loads((tmp_path / "Cam" / "train_0_withjv.pkl").read_bytes())
    assert (tmp_path / "touched").exists(), "the attack is a real one"


def test_vertices_stay_in_the_file(official: Path, tmp_path: Path) -> None:
    """Tables of the true size hold a quarter of a MB of vertices a person; here 40 MB in all."""
    table = fixture.columns("train", fixture.TRAIN * 5)
    table["gt_verts"] = [[np.full((83_333, 3), 0.5) for _ in people] for people in table["gt_verts"]]
    path = tmp_path / "train_0.pkl"
    path.write_bytes(frame_bytes(table))
    assert path.stat().st_size > 38e6
    read_frame(path)
    tracemalloc.start()
    columns = read_frame(path)
    joints = columns.column("gt_joints_3d")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2e6
    assert joints[0][0].shape == (127, 3)
    vertices = columns.column("gt_verts")
    assert vertices[-1][0].shape == (83_333, 3) and vertices[-1][0][-1, 2] == 0.5


def test_a_built_set_verifies_and_splits_share_nobody(official: Path, tmp_path: Path) -> None:
    sets = [str(tmp_path / split) for split in ("train", "validation")]
    for split, out in zip(("train", "validation"), sets, strict=True):
        assert main(["build", "agora", str(official), "--split", split, "--out", out]) == 0
    assert main(["verify", *sets]) == 0
