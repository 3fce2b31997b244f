"""One image in, poses out: the program as a user runs it, and every mistake as one line."""

import json
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_model import write_tiny_model

from cogvlm_hpe import cli, draw, predict
from launcher.errors import UsageError, UserError
from shards import pose
from shards.index import open_set


@pytest.mark.slow
def test_poses_are_printed_as_json_and_drawn(
    tmp_path: Path, tiny_set: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shard_set = tiny_set(samples=8)
    model = write_tiny_model(tmp_path / "base", shard_set, steps=200)
    stored = open_set(shard_set).read(0)
    (tmp_path / "a.jpg").write_bytes(stored.image)
    head = open_set(shard_set).record(0).heads[0]
    box = ",".join(f"{v:.2f}" for v in head.bbox)
    words = [str(tmp_path / "a.jpg"), "--box", box, "--box", "0,0,4,4", "--model", str(model)]
    capsys.readouterr()  # what the libraries said while the model was made
    assert cli.main(["predict", *words, "--out", str(tmp_path / "a.png")]) == 0
    taught, other = json.loads(capsys.readouterr().out)
    assert taught["reason"] is None
    said = pose.rotation_from_pose(taught["yaw"], taught["pitch"], taught["roll"])
    assert pose.geodesic_deg(said, head.matrix) < 10.0
    assert set(other) == {"box", "answer", "yaw", "pitch", "roll", "reason"}
    assert cli.main(["predict", *words[:3], "--model", str(model), "--decode", "expectation"]) == 0
    [expected] = json.loads(capsys.readouterr().out)
    mean = pose.rotation_from_pose(expected["yaw"], expected["pitch"], expected["roll"])
    assert pose.geodesic_deg(mean, head.matrix) < 10.0
    assert 0.5 < expected["confidence"] <= 1.0
    before, after = (np.array(Image.open(tmp_path / name).convert("RGB")) for name in ("a.jpg", "a.png"))
    assert before.shape == after.shape and (before != after).any()


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
def test_a_box_outside_the_image_is_a_usage_error(box: predict.Box) -> None:
    with pytest.raises(UsageError, match="outside the image, which is 40 x 30 pixels"):
        predict.check_inside(box, 40, 30)


def test_no_image_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.jpg").write_text("not a picture")
    for name, said in (
        ("none.jpg", "no such file"),
        ("text.jpg", "not an image that can be read"),
        (".", "not an image"),
    ):
        assert cli.main(["predict", str(tmp_path / name), "--box", "0,0,1,1", "--model", "m"]) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_a_picture_without_an_ending_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    parser = ArgumentParser()
    predict.add_arguments(parser)
    with pytest.raises(UsageError, match="needs an ending"):
        predict.run(parser.parse_args(["a.jpg", "--box", "0,0,1,1", "--model", "m", "--out", str(tmp_path / "plain")]))


def test_a_picture_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        predict.write_picture(tmp_path / "no" / "a.png", np.zeros((4, 4, 3), np.uint8), [])


def test_sideways_photographs_are_read_as_viewers_show_them(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # turned a quarter
    image.save(tmp_path / "a.jpg", exif=exif)
    assert predict.read_image(tmp_path / "a.jpg").shape == (40, 20, 3)


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
