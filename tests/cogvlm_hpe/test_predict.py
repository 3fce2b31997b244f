"""Pictures in, poses out: the program as a user runs it, and every mistake as one line."""

import csv
import io
import json
import struct
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tiny_model import write_tiny_model
from tiny_source import TinySource

from cogvlm_hpe import HeadPose, cli, draw, headpose, pictures, predict
from cogvlm_hpe.evaluate import metrics
from launcher.comm import single
from launcher.errors import UsageError, UserError
from shards import pose
from shards.index import open_set
from shards.write import build


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model that knows its eight images, their shard set); the things in them are called heads too."""
    place = tmp_path_factory.mktemp("taught")
    build(TinySource(samples=8), place / "set", single(), 5)
    return write_tiny_model(place / "base", place / "set", steps=200), place / "set"


@pytest.fixture
def folder(tmp_path: Path, taught: tuple[Path, Path]) -> Path:
    """A folder with the first three images, a text and a picture that is none."""
    for number in range(3):
        stored = open_set(taught[1]).read(number)
        (tmp_path / f"{number}.jpg").write_bytes(stored.image)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


@pytest.mark.slow
def test_poses_are_printed_as_json_and_drawn(
    folder: Path, taught: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    head = open_set(taught[1]).record(0).heads[0]
    box = ",".join(f"{v:.2f}" for v in head.bbox)
    image = str(folder / "0.jpg")
    words = [image, "--box", box, "--box", "0,0,4,4", "--model", str(taught[0])]
    capsys.readouterr()  # what the libraries said while the model was made
    assert cli.main(["predict", *words, "--out", str(folder / "a.png")]) == 0
    known, other = json.loads(capsys.readouterr().out)
    assert known["reason"] is None and known["image"] == image
    said = pose.rotation_from_pose(known["yaw"], known["pitch"], known["roll"])
    assert pose.geodesic_deg(said, head.matrix) < 10.0
    assert set(other) == {"image", "box", "answer", "yaw", "pitch", "roll", "reason"}
    assert cli.main(["predict", *words[:3], "--model", str(taught[0]), "--decode", "expectation"]) == 0
    [expected] = json.loads(capsys.readouterr().out)
    mean = pose.rotation_from_pose(expected["yaw"], expected["pitch"], expected["roll"])
    assert pose.geodesic_deg(mean, head.matrix) < 10.0
    assert 0.5 < expected["confidence"] <= 1.0
    before, after = (np.array(Image.open(folder / name).convert("RGB")) for name in ("0.jpg", "a.png"))
    assert before.shape == after.shape and (before != after).any()


@pytest.mark.slow
def test_a_folder_is_read_with_the_models_own_boxes(
    folder: Path, taught: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    thing = open_set(taught[1]).record(0).objects[0]
    words = ["predict", str(folder), "--detect", thing.expression, "--model", str(taught[0])]
    capsys.readouterr()
    assert cli.main([*words, "--out", str(folder / "drawn"), "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    first = next(row for row in rows if row["image"].endswith("0.jpg"))
    found = np.array([float(first[side]) for side in ("x0", "y0", "x1", "y1")])
    assert metrics.iou(found, np.array(thing.bbox)) > 0.5  # the model was taught where this thing is
    assert sorted(p.name for p in (folder / "drawn").iterdir()) == ["0.png", "1.png", "2.png"]
    (folder / "3.jpg").write_text("not a picture")
    assert cli.main([*words, "--format", "json"]) == 1  # said, and the others are read all the same
    said = capsys.readouterr()
    assert len(json.loads(said.out)) == len(rows) and "3.jpg: not an image that can be read" in said.err
    model = HeadPose.from_pretrained(taught[0])
    assert model.detect(folder / "0.jpg", thing.expression)[0] == pytest.approx(tuple(found))
    one = model(Image.open(folder / "0.jpg"), expression=thing.expression)
    assert one[0].answer == first["answer"] and one == model(folder / "0.jpg", [one[0].box])


@pytest.mark.slow
def test_frames_of_a_video(folder: Path, taught: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    cv2 = pytest.importorskip("cv2", reason="SKIPPED: no OpenCV here (extra video)")
    frames = [pictures.read_image(folder / f"{number}.jpg") for number in (0, 1, 2, 0, 1)]
    height, width = frames[0].shape[:2]
    video = cv2.VideoWriter(str(folder / "v.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5.0, (width, height))
    for frame in frames:
        video.write(frame[..., ::-1])
    video.release()
    read = list(pictures.read(folder / "v.avi", 2))
    assert [picture.frame for picture in read] == [0, 2, 4] and pictures.count(folder / "v.avi", 2) == 3
    assert abs(read[1].pixels.astype(int) - frames[2]).mean() < 6.0  # colours in the right order
    words = ["--box", "0,0,9,9", "--every", "2", "--model", str(taught[0]), "--out", str(folder / "drawn")]
    capsys.readouterr()
    assert cli.main(["predict", str(folder / "v.avi"), *words]) == 0
    assert [row["frame"] for row in json.loads(capsys.readouterr().out)] == [0, 2, 4]
    assert sorted(p.name for p in (folder / "drawn").iterdir()) == ["v-000000.png", "v-000002.png", "v-000004.png"]
    (folder / "broken.avi").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"broken\.avi: not a video"):
        list(pictures.read(folder / "broken.avi"))


def test_an_answer_that_was_cut_off_keeps_its_whole_boxes() -> None:
    assert headpose._boxes("[[100,100,200,200;300,300,400,400;5") == [(0.1, 0.1, 0.2, 0.2), (0.3, 0.3, 0.4, 0.4)]
    assert headpose._boxes("[[100,100,200,200;100,100,200,200]]") == [(0.1, 0.1, 0.2, 0.2)]
    assert headpose._boxes("a head") == headpose._boxes("[[100,100,20") == []


def test_pictures_of_one_name_are_drawn_into_files_of_their_own() -> None:
    apart, alike, places = (
        [Path("d/a.jpg"), Path("d/b.png")],
        [Path("d/a.jpg"), Path("d/a.png")],
        ["d/a.jpg", "e/a.jpg"],
    )
    assert list(pictures.names(apart).values()) == ["a", "b"]
    assert list(pictures.names(alike).values()) == ["a.jpg", "a.png"]
    assert list(pictures.names([Path(place) for place in places]).values()) == ["d-a.jpg", "e-a.jpg"]
    assert pictures.names([apart[0], apart[0]]) == {apart[0]: "a"}


def test_the_number_format_may_be_chosen() -> None:
    model = HeadPose.from_pretrained("tiny", device="cpu", dtype="bf16").loaded.model
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_a_pixel_array_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="uint8 is needed"):
        HeadPose(None)(np.zeros((4, 4)), [])  # type: ignore[arg-type]


def test_pictures_of_more_than_8_bits_are_refused_not_whitened(tmp_path: Path) -> None:
    deep = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    deep.save(tmp_path / "deep.png")
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tif")
    for name, mode in (("deep.png", "I;16"), ("float.tif", "F")):
        with pytest.raises(UserError, match=rf"{name}: not an image that can be read \(.*mode {mode}, of more than 8"):
            pictures.read_image(tmp_path / name)
    with pytest.raises(ValueError, match="more than 8 bits"):
        headpose._pixels(deep)


def test_a_frame_turned_from_bgr_is_taken() -> None:
    frame = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    pixels = headpose._pixels(frame[..., ::-1])
    assert (pixels == frame[..., ::-1]).all() and pixels.flags.c_contiguous and pixels.flags.writeable


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.jpg", "b.jpg", "--box", "0,0,1,1"], "boxes are of one image"),
        (["a.jpg", "--detect", "--every", "0"], "--every 0: must be at least 1"),
        (["a.jpg", "b.jpg", "--detect", "--out", "a.jpg"], "several pictures need a folder"),
        (["a.jpg", "--detect", "--out", "a.jpg"], r"would draw over .*a\.jpg, which is read"),
        ([".", "--detect", "--out", "."], r"would draw over .*c\.png, which is read"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path: Path, words: list[str], said: str) -> None:
    for name in ("a.jpg", "b.jpg", "c.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    words = [str(tmp_path / word) if word.endswith((".jpg", ".")) else word for word in words]
    parser = ArgumentParser()
    predict.add_arguments(parser)
    with pytest.raises(UsageError, match=said):
        predict.run(parser.parse_args([*words, "--model", "m"]))


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ("1,2,3", "four numbers"),
        ("a,b,c,d", "four numbers"),
        ("1,2,3,4,5", "four numbers"),
        ("5,5,5,9", "x0 < x1 and y0 < y1"),
        ("nan,0,5,5", "x0 < x1 and y0 < y1"),
    ],
)
def test_a_malformed_box_is_a_usage_error(box: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        predict.parse_box(box)


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, 0, 41, 5), (0, 0, 5, 31)])
def test_a_box_outside_the_image_is_a_usage_error(box: headpose.Box) -> None:
    with pytest.raises(UsageError, match="outside the image, which is 40 x 30 pixels"):
        predict.check_inside(box, 40, 30)


def test_no_image_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty").mkdir()
    for name, said in (
        ("none.jpg", "no such file"),
        ("text.jpg", "not an image that can be read"),
        ("empty", "no image and no video"),
    ):
        assert cli.main(["predict", str(tmp_path / name), "--box", "0,0,1,1", "--model", "m"]) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_a_picture_without_an_ending_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    parser = ArgumentParser()
    predict.add_arguments(parser)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    with pytest.raises(UsageError, match="needs an ending"):
        predict.run(
            parser.parse_args(
                [str(tmp_path / "a.jpg"), "--box", "0,0,1,1", "--model", "m", "--out", str(tmp_path / "plain")]
            )
        )


def test_a_picture_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        predict.write_picture(tmp_path / "no" / "a.png", np.zeros((4, 4, 3), np.uint8), [])


def test_sideways_photographs_are_read_as_viewers_show_them(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # turned a quarter
    image.save(tmp_path / "a.jpg", exif=exif)
    assert pictures.read_image(tmp_path / "a.jpg").shape == (40, 20, 3)


def test_all_orientations_are_those_of_pillow_and_tags_of_a_wrong_type_do_no_harm(tmp_path: Path) -> None:
    corners = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(corners).save(tmp_path / "a.png", exif=exif)
        with Image.open(tmp_path / "a.png") as image:
            wanted = np.array(ImageOps.exif_transpose(image))
        assert (pictures.read_image(tmp_path / "a.png") == wanted).all()
    # One more tag than a turned photograph needs: its number of pixels as a text.
    tags = struct.pack(">HHHIHHHHIHHI", 2, 0x0112, 3, 1, 6, 0, 0x0100, 2, 4, 0x6161, 0x6100, 0)
    Image.fromarray(corners).save(tmp_path / "b.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08" + tags)
    with Image.open(tmp_path / "b.jpg") as image, pytest.raises(Exception):  # noqa: B017, PT011
        ImageOps.exif_transpose(image)
    assert pictures.read_image(tmp_path / "b.jpg").shape == (4, 2, 3)


def test_the_blue_axis_points_out_of_the_face() -> None:
    grey = np.full((100, 100, 3), 128, np.uint8)
    left = pose.rotation_from_pose(90.0, 0.0, 0.0)  # yaw > 0 looks to the image's left
    for dashed in (False, True):
        drawn = draw.draw_pose(grey, (30, 30, 70, 70), left, dashed=dashed)
        blue = np.argwhere((drawn == (60, 110, 255)).all(axis=2))
        assert len(blue) and blue[:, 1].max() <= 52 and blue[:, 1].min() < 30


def test_a_head_at_the_border_keeps_its_scale() -> None:
    image = np.full((50, 50, 3), 255, np.uint8)
    tile = draw.head_tile(image, (0, 0, 20, 20), None, None, side_px=64)
    assert tile.shape == (64, 64, 3) and (tile[:8] == 0).all() and (tile[32:, 32:] == 255).all()
