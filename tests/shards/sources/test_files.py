"""The helpers of the sources: images as they are, boxes, keys, splits, JSON with line numbers."""

import argparse
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from launcher.errors import UsageError, UserError
from shards.index import KEY
from shards.sources import files


def _picture(width: int = 24, height: int = 16) -> Image.Image:
    return Image.fromarray(np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_jpeg_and_png_are_kept_byte_for_byte_whatever_their_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture.bin"
    _picture().save(path, kind)
    data, extension = files.image_bytes(path)
    assert data == path.read_bytes() and extension == {"JPEG": "jpg", "PNG": "png"}[kind]
    assert files.image_size(path) == (24, 16)


def test_other_formats_become_png_with_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "picture.bmp"
    _picture().save(path)
    data, extension = files.image_bytes(path)
    assert extension == "png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(_picture()))


def test_an_image_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(b"<html>not found</html>")
    for read in (files.image_size, files.image_bytes):
        with pytest.raises(UserError, match=r"picture\.jpg: no readable image .* download it again"):
            read(path)
        with pytest.raises(UserError, match=r"gone\.jpg: not there"):
            read(tmp_path / "gone.jpg")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_that_viewers_turn_is_refused_where_boxes_were_drawn_on_it(tmp_path: Path, kind: str) -> None:
    path, exif = tmp_path / "picture.bin", Image.Exif()
    for orientation in (1, 6):
        exif[0x0112] = orientation
        _picture().save(path, kind, exif=exif)
        assert files.image_size(path) == (24, 16)
        if orientation == 1:
            assert files.upright_size(path) == (24, 16)
    with pytest.raises(UserError, match=r"picture\.bin: EXIF orientation 6: .* turn the pixels .* remove the tag"):
        files.upright_size(path)
    _picture().save(path, "TIFF", exif=exif)
    stored = np.asarray(Image.open(io.BytesIO(files.image_bytes(path)[0])))
    assert files.upright_size(path) == (16, 24) == stored.shape[1::-1], "what becomes PNG is turned by Pillow"
    _picture().save(path, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\xff")
    assert files.upright_size(path) == (24, 16), "a damaged tag turns nothing"


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_images_of_more_than_8_bits_are_refused(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "picture.tif"
    Image.fromarray(np.full((16, 24), 300, dtype)).save(path)
    for read in (files.image_size, files.upright_size, files.image_bytes):
        with pytest.raises(UserError, match=r"picture\.tif: its pixels are of mode [IF].*, of more than 8 bits; make"):
            read(path)


def test_boxes_are_clipped_and_small_ones_dropped() -> None:
    assert files.clip_box((-5, 2, 30, 12), 24, 16, 8) == (0, 2, 24, 12)
    assert files.clip_box((-5, 2, 7, 12), 24, 16, 8) is None
    assert files.clip_box((30, 2, 40, 12), 24, 16, 0) is None
    assert files.clip_box((float("nan"), 2, 40, 12), 24, 16, 0) is None


@given(st.text(max_size=200))
def test_any_name_makes_a_key(text: str) -> None:
    assert KEY.fullmatch(files.key_of(text))


def test_names_that_differ_have_keys_that_differ() -> None:
    names = ["a.b", "a_b", "a,b", "a b", "x" * 90, "x" * 91, "x" * 92, "/a_b", "é", "è", ""]
    assert len({files.key_of(name) for name in names}) == len(names)
    assert files.key_of("AFW/AFW_134212_1_0") == "AFW/AFW_134212_1_0"


def test_splits_follow_their_shares_and_only_name_and_seed() -> None:
    shares = files.shares_of("train=0.7,val=0.1,test=0.2")
    splits = [files.split_of(f"person {k}", shares, 1) for k in range(5000)]
    for name, share in shares.items():
        assert abs(splits.count(name) / 5000 - share) < 0.03
    assert splits[:9] == [files.split_of(f"person {k}", shares, 1) for k in range(9)]
    assert splits != [files.split_of(f"person {k}", shares, 2) for k in range(5000)]
    assert {files.split_of(str(k), {"a": 0.0, "b": 1.0}, 0) for k in range(50)} == {"b"}


@pytest.mark.parametrize("text", ["", "train", "train=1,val=1", "train=-1,val=2", "train=x", "train=nan"])
def test_shares_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="shares"):
        files.shares_of(text)


def test_a_part_takes_its_subjects_and_parts_share_none() -> None:
    parser = argparse.ArgumentParser()
    files.add_split_arguments(parser, "train")
    subjects = [str(k) for k in range(200)]
    assert all(map(files.Part.from_args(parser.parse_args([])).holds, subjects))
    words = ["--shares", "train=0.5,val=0.5", "--seed", "3"]
    train = files.Part.from_args(parser.parse_args(words))
    val = files.Part.from_args(parser.parse_args([*words, "--split", "val"]))
    assert [train.holds(s) for s in subjects] == [not val.holds(s) for s in subjects]
    assert 60 < sum(map(train.holds, subjects)) < 140
    assert val.scope == {"shares": {"train": 0.5, "val": 0.5}, "seed": 3}
    with pytest.raises(UsageError, match="--split test: .* only fills train, val"):
        files.Part.from_args(parser.parse_args([*words, "--split", "test"]))


def test_json_errors_name_file_and_line(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.odgt", tmp_path / "bad.odgt"
    good.write_text('{"a": 1}\n\n[2]\n')
    assert list(files.read_json_lines(good)) == [(1, {"a": 1}), (3, [2])]
    bad.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(UserError, match=r"bad\.odgt, line 2: not JSON"):
        list(files.read_json_lines(bad))
    with pytest.raises(UserError, match=r"bad\.odgt: not JSON"):
        files.read_json(bad)
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"bad\.odgt: cannot be read \(not UTF-8 text\)"):
        files.read_json(bad)
    for read in (files.read_json, lambda path: list(files.read_json_lines(path))):
        with pytest.raises(UserError, match=r"gone: not there"):
            read(tmp_path / "gone")
    with pytest.raises(UserError, match=r"gone: not there; the images"):
        files.existing(tmp_path / "gone", "the images of the download belong there")
