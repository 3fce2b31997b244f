"""Tables: CSV and JSONL say the same, every convention is turned into ours, every mistake names its line."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage
from scipy.spatial.transform import Rotation

from launcher.errors import UsageError, UserError
from shards.cli import main
from shards.record import Head
from shards.sources import SOURCES
from shards.sources.fixtures import build_words, faces
from shards.sources.fixtures import table as fixture
from shards.sources.table.rows import Row
from shards.sources.table.source import Table

CELLS = [f"r{row}{column}" for row in range(3) for column in range(3)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "table"
    fixture.write(folder)
    return folder


def heads(source: Table) -> dict[str, list[Head]]:
    return {s.record.image.id: s.record.heads for s in map(source.sample, range(len(source)))}


@pytest.mark.parametrize("name", ["heads.csv", "heads.jsonl"])
def test_lines_become_heads(tree: Path, name: str) -> None:
    source = Table(tree / name, tree)
    found = heads(source)
    assert list(found) == ["pictures/park.jpg", "pictures/café, night.png"]
    anna, ben = found["pictures/park.jpg"]
    assert anna.bbox == (10, 10, 40, 50) and (anna.subject, anna.weak, anna.confidence) == ("anna", False, 1.0)
    assert (ben.subject, ben.weak, ben.confidence, ben.visible) == ("ben", True, 0.6, 1.0)
    np.testing.assert_allclose(anna.pose_deg, [30, -10, 5], atol=1e-9)
    np.testing.assert_allclose(ben.pose_deg, [-150, 20.5, -15], atol=1e-9)
    assert found["pictures/café, night.png"][1].bbox == (100, 60, 120, 90)
    assert source.scope["ignored_columns"] == ["camera"]
    assert source.scope["dropped"] == {"image without heads": 1, "less than 8 px of the head in the image": 1}
    first, second = map(source.sample, range(2))
    assert first.key == "pictures/park" and first.extension == "jpg" and second.extension == "png"
    assert first.record.image.subject == "pictures/park.jpg"
    assert list(heads(Table(tree / name, tree, split="test"))) == ["pictures/test.jpg"]


def row(**cells: Any) -> Row:
    return Row(Path("heads.csv"), 7, cells)


def matrix(cells: np.ndarray) -> dict[str, float]:
    return dict(zip(CELLS, cells.ravel().tolist(), strict=True))


@pytest.mark.parametrize("angles", [(30.0, -10.0, 5.0), (-75.0, 40.0, -60.0), (150.0, 20.0, -15.0)])
def test_conventions_agree(angles: tuple[float, float, float]) -> None:
    """Each written from its own definition: the products of elementary matrices that their code forms."""
    yaw, pitch, roll = angles
    ours = Rotation.from_euler("zyx", [roll, yaw, -pitch], degrees=True).as_matrix()
    rx, ry, rz = (
        Rotation.from_euler(a, v, degrees=True).as_matrix() for a, v in zip("xyz", (pitch, yaw, roll), strict=True)
    )
    given = {
        "hpe-v1": {"yaw": yaw, "pitch": pitch, "roll": roll},
        "300w-lp": dict(zip(("yaw", "pitch", "roll"), np.radians(angles).tolist(), strict=True)),
        "rotation": matrix(ours),
        "6drepnet": matrix(rz @ ry @ rx),
        "3ddfa": matrix(rx.T @ ry.T @ rz.T),
        "head-to-camera": matrix(ours @ np.diag([1, -1, -1])),
    }
    for convention, cells in given.items():
        got = row(**cells).rotation(convention)
        np.testing.assert_allclose(got, ours, atol=1e-12, err_msg=convention)
        np.testing.assert_array_equal(row(**cells, convention=convention).rotation("none"), got)
    as_list = np.round(ours, 3).tolist()
    rounded = row(rotation=as_list).rotation("rotation")
    np.testing.assert_allclose(rounded, ours, atol=2e-3)
    np.testing.assert_allclose(rounded @ rounded.T, np.eye(3), atol=1e-12)
    assert row().rotation("none") is None


def test_boxes_of_corner_and_size() -> None:
    assert row(x="5", y="6", width="10", height="20").box("xywh") == (5, 6, 15, 26)
    assert row(box=[5, 6, 10, 20]).box("xywh") == (5, 6, 15, 26)
    assert row(box=[5, 6, 10, 20]).box("xyxy") == (5, 6, 10, 20)


HEADER = "image,x0,y0,x1,y1,yaw,pitch,roll,weak,confidence"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a.jpg,1,2,30,40,1,2,x,,", "roll 'x' is no number"),
        ("a.jpg,1,2,30,40,1,2,nan,,", "roll 'nan' is no number"),
        ("a.jpg,1,2,30,40,1,,3,,", "no 'pitch'; convention hpe-v1 needs it"),
        ("a.jpg,1,2,30,,1,2,3,,", "no 'y1'; a box xyxy needs it"),
        (",1,2,30,40,1,2,3,,", "no 'image'; every line needs one"),
        ("a.jpg,30,2,1,40,1,2,3,,", "box 30, 2, 1, 40 is empty; see --box"),
        ("a.jpg,1,2,30,40,361,2,3,,", "yaw 361 is more than a turn"),
        ("a.jpg,1,2,30,40,1,2,3,maybe,", "weak 'maybe': write true or false"),
        ("a.jpg,1,2,30,40,1,2,3,,1.5", r"confidence 1.5 is outside \[0, 1\]"),
        ("a.jpg,1,2,30,40,1,2,3", "not as many cells as the first line has columns"),
        ("a.jpg,1,2,30,40,1,2,3,,,,", "not as many cells as the first line has columns"),
        ('"a.jpg"x,1,2,30,40,1,2,3,,', "not CSV"),
    ],
)
def test_mistakes_in_csv_name_the_line(tmp_path: Path, line: str, said: str) -> None:
    table = tmp_path / "heads.csv"
    table.write_text(f"{HEADER}\na.jpg,1,2,30,40,1,2,3,,\n\n{line}\n")
    with pytest.raises(UserError, match=rf"heads\.csv, line 4: .*{said}") as caught:
        Table(table, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"image": "a.jpg", "box": [1, 2, 3]}, r"box \[1, 2, 3\]: not a list of 4 numbers"),
        ({"image": "a.jpg", "box": "1 2 3 4"}, "not a list of 4 numbers"),
        ({"image": "a.jpg", "box": [1, 2, 3, True]}, "box True is no number"),
        ({"image": "a.jpg", "box": [1, 2, 3, 4], "rotation": [1] * 9}, "no rotation matrix"),
        ({"image": "a.jpg", "box": [1, 2, 3, 4], "convention": "euler"}, "convention 'euler': choose one of hpe-v1,"),
        ({"image": "a.jpg", "box": [1, 2, 3, 4], "convention": "300w-lp", "yaw": 40, "pitch": 0, "roll": 0}, "radians"),
        ([1], "not an object in braces"),
    ],
)
def test_mistakes_in_jsonl_name_the_line(tmp_path: Path, line: Any, said: str) -> None:
    table = tmp_path / "heads.jsonl"
    table.write_text(f"\n{json.dumps(line)}\n")
    with pytest.raises(UserError, match=rf"heads\.jsonl, line 2: .*{said}"):
        Table(table, tmp_path, convention="rotation")


def test_mistakes_of_a_whole_table(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"heads\.xlsx: tables end in \.csv"):
        Table(tmp_path / "heads.xlsx", tmp_path)
    with pytest.raises(UserError, match=r"gone\.csv: cannot be read \(No such file"):
        Table(tmp_path / "gone.csv", tmp_path)
    with pytest.raises(UserError, match="nothing is in split 'val', only in test, train"):
        Table(tree / "heads.csv", tree, split="val")
    with pytest.raises(UsageError, match="--least-px"):
        Table(tree / "heads.csv", tree, least_px=0)
    with pytest.raises(UserError, match=r"park\.jpg: not there, but the labels name it"):
        Table(tree / "heads.csv", tmp_path)
    table = tmp_path / "heads.csv"
    table.write_text("image,x0,x0\na,1,2\n")
    with pytest.raises(UserError, match="two columns of one name"):
        Table(table, tmp_path)
    table.write_bytes(b"image\n\xff\xfe\n")
    with pytest.raises(UserError, match="not UTF-8 text"):
        Table(table, tmp_path)
    table.write_text("image,split,x0,y0,x1,y1\na,train,1,2,3,4\na,test,1,2,3,4\n")
    with pytest.raises(UserError, match="line 3: image a is in test and train"):
        Table(table, tmp_path, convention="none")


def test_subjects_stay_in_one_split(tree: Path, tmp_path: Path) -> None:
    """Without a column split: an image is dropped where its people fall into different ones."""
    name = "pictures/park.jpg"
    lines = [f"{name},1,2,30,40,p{k}" for k in (1, 2)]
    for k in range(40):
        (tmp_path / f"{k}.jpg").write_bytes((tree / name).read_bytes())
        lines += [f"{k}.jpg,1,2,30,40,p{(k + extra) % 7}" for extra in range(1 + k % 2)]
    (tmp_path / "pictures").mkdir()
    (tmp_path / name).write_bytes((tree / name).read_bytes())
    table = tmp_path / "heads.csv"
    table.write_text("\ufeffimage,x0,y0,x1,y1,subject\n" + "\n".join(lines) + "\n", encoding="utf-8")
    train, val = (
        Table(table, tmp_path, convention="none", split=split, shares="train=0.5,val=0.5", seed=1)
        for split in ("train", "val")
    )
    subjects = [{h.subject for own in heads(source).values() for h in own} for source in (train, val)]
    assert subjects[0] and subjects[1] and not subjects[0] & subjects[1]
    mixed = train.scope["dropped"]["image with subjects of several splits"]
    assert mixed > 0 and mixed == val.scope["dropped"]["image with subjects of several splits"]
    assert len(train) + len(val) + mixed == 41
    assert all(head.rotation is None for own in heads(train).values() for head in own)


def test_keys_keep_endings_where_names_differ_only_there(tree: Path, tmp_path: Path) -> None:
    for name in ("a.jpg", "a.jpeg"):
        (tmp_path / name).write_bytes((tree / "pictures" / "park.jpg").read_bytes())
    table = tmp_path / "heads.csv"
    table.write_text("image,x0,y0,x1,y1\na.jpg,1,2,30,40\na.jpeg,1,2,30,40\n")
    source = Table(table, tmp_path, convention="none")
    assert len({source.sample(i).key for i in range(2)}) == 2


def test_a_built_set_verifies(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "set"
    assert main([*build_words("table", tree), "--out", str(out)]) == 0
    assert main(["verify", str(out)]) == 0
    assert "good" in capsys.readouterr().out


def test_a_corrected_table_or_other_boxes_are_another_set(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(faces.encoded(faces.picture((120, 90), [], 0), "JPEG"))
    table, out = tmp_path / "heads.jsonl", str(tmp_path / "set")
    words = ["build", "table", str(table), "--convention", "none", "--out", out]
    table.write_text('{"image": "a.jpg", "box": [10, 10, 40, 50]}')
    assert main(words) == 0 and main(words) == 0
    assert main([*words, "--box", "xywh"]) == 1
    table.write_text('{"image": "a.jpg", "box": [10, 10, 40, 60]}')
    assert main(words) == 1


def test_boxes_on_images_that_viewers_turn_are_refused(tmp_path: Path) -> None:
    exif = PillowImage.Exif()
    exif[0x0112] = 8
    PillowImage.new("RGB", (120, 90)).save(tmp_path / "a.jpg", exif=exif)
    table = tmp_path / "heads.csv"
    table.write_text("image,x0,y0,x1,y1\na.jpg,1,2,30,40\n")
    with pytest.raises(UserError, match=r"a\.jpg: EXIF orientation 8"):
        Table(table, tmp_path, convention="none")


def test_options_reach_the_source(tree: Path) -> None:
    add_arguments, make = SOURCES["table"]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [str(tree / "heads.jsonl"), "--split", "test", "--least-px", "3", "--licence", "ours", "--seed", "4"]
    source = make(parser.parse_args(words))
    assert len(source) == 1 and source.licence == "ours" and source.split == "test"
    assert source.scope["least_px"] == 3 and source.scope["seed"] == 4
