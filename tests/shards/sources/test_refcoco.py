"""RefCOCO, RefCOCO+ and RefCOCOg: sentences and boxes, splits, pickles of Python 2 and pickles that attack."""

import json
import os
import pickle
from pathlib import Path

import pytest
from sourcing import fills_its_box, named_in, pixels_of, records_of, source_of

from launcher.comm import single
from launcher.errors import UsageError, UserError
from shards.sources.fixtures import drawing
from shards.sources.fixtures import refcoco as fixture
from shards.verify import verify
from shards.write import build

RED, BLUE, GREEN = (10, 12, 40, 52), (50, 8, 86, 32), (40, 40, 60, 56)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fixture.write(tmp_path)
    return tmp_path


def test_sentences_that_name_one_thing_with_their_boxes(folder: Path) -> None:
    source = source_of("refcoco", folder)
    assert named_in(source) == {
        "COCO_train2014_000000000009": [
            ("red block", RED),
            ("left block", RED),
            ("blue block", BLUE),
            ("block on the right", BLUE),
        ],
        "COCO_train2014_000000000025": [("reddest thing", RED), ("green one", GREEN)],
    }
    assert source.scope["dropped"] == {
        "box too small or outside": 1,
        "crowd": 1,
        "expression of two things": 4,
        "expression said before": 1,
        "expression without words": 1,
        "image without objects": 1,
    }
    assert [record.image.subject for record in records_of(source)] == ["coco-9", "coco-25"]
    assert (source.name, source.split, source.scope["by"]) == ("refcoco", "train", "unc")


def test_boxes_lie_on_what_the_pixels_show(folder: Path) -> None:
    source = source_of("refcoco", folder)
    pixels = pixels_of(source.sample(0).image)
    for thing in source.sample(0).record.objects:
        colour = "red" if thing.bbox == RED else "blue"
        assert fills_its_box(pixels, thing.bbox, drawing.COLOURS[colour])


@pytest.mark.parametrize(
    ("words", "subjects"),
    [
        (["--split", "val"], ["coco-30"]),
        (["--split", "testA"], ["coco-31"]),
        (["--split", "testB"], ["coco-32"]),
        (["--split", "test"], ["coco-31", "coco-32"]),
        (["--by", "google", "--split", "test"], ["coco-30"]),
        (["--dataset", "refcoco+"], ["coco-9"]),
        (["--dataset", "refcocog", "--split", "test"], ["coco-32"]),
        (["--dataset", "refcocog", "--by", "google", "--split", "val"], ["coco-9"]),
    ],
)
def test_every_data_set_and_split_of_the_download(folder: Path, words: list[str], subjects: list[str]) -> None:
    source = source_of("refcoco", folder, *words)
    assert [record.image.subject for record in records_of(source)] == subjects
    assert source.split == (words[words.index("--split") + 1] if "--split" in words else "train")


def test_text_of_python_2_is_read_as_latin_1(folder: Path) -> None:
    source = source_of("refcoco", folder, "--dataset", "refcocog", "--split", "test")
    assert source.sample(0).record.objects[0].expression == "café-blue block"


def test_googles_splits_share_images_so_names_are_compared_across_them(folder: Path) -> None:
    words = ["--dataset", "refcocog", "--by", "google", "--split"]
    assert named_in(source_of("refcoco", folder, *words, "val")) == {
        "COCO_train2014_000000000009": [("blue block", BLUE)]
    }
    with pytest.raises(UserError, match="split train: no image with an object .*expression of two things 1"):
        source_of("refcoco", folder, *words, "train")


def test_small_boxes_are_kept_on_request(folder: Path) -> None:
    found = named_in(source_of("refcoco", folder, "--least-px", "1"))["COCO_train2014_000000000025"]
    assert ("tiny thing", (90, 60, 93, 62)) in found


def test_images_elsewhere(folder: Path, tmp_path: Path) -> None:
    (folder / "images/mscoco/images/train2014").rename(tmp_path / "coco")
    assert len(source_of("refcoco", folder, "--images", tmp_path / "coco")) == 2


def test_options_that_do_not_fit_the_download(folder: Path) -> None:
    with pytest.raises(UsageError, match="--by umd: refcoco was split by unc and google only"):
        source_of("refcoco", folder, "--by", "umd")
    with pytest.raises(UsageError, match="--split testC: the splits of these refs are testA, testB, train, val"):
        source_of("refcoco", folder, "--split", "testC")


def test_a_pickle_that_attacks_is_refused_and_has_done_nothing(folder: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "taken"),))

    (folder / "refcoco/refs(unc).p").write_bytes(pickle.dumps([Attack()]))
    with pytest.raises(UserError, match=r"refs\(unc\)\.p: refused, it asks for posix\.mkdir"):
        source_of("refcoco", folder)
    assert not (tmp_path / "taken").exists()


def test_files_of_another_kind_are_named(folder: Path) -> None:
    refs, instances = folder / "refcoco/refs(unc).p", folder / "refcoco/instances.json"
    whole = json.loads(instances.read_text())
    for value in ([1, 2], {"a": 1}, [{"image_id": 9}]):
        refs.write_bytes(fixture.python2_pickle(value))
        with pytest.raises(UserError, match=r"refs\(unc\)\.p: no list of RefCOCO's refs"):
            source_of("refcoco", folder)
    fixture.write(folder)
    instances.write_text("[]")
    with pytest.raises(UserError, match=r"instances\.json: not COCO's instances"):
        source_of("refcoco", folder)
    instances.write_text(json.dumps(whole | {"annotations": whole["annotations"][1:]}))
    with pytest.raises(UserError, match=r"instances\.json: no annotation 91, which the refs name"):
        source_of("refcoco", folder)
    instances.unlink()
    with pytest.raises(UserError, match=r"instances\.json: not there; FOLDER must hold"):
        source_of("refcoco", folder)


def test_the_fixtures_pickles_are_those_of_python_2(folder: Path) -> None:
    for name, refs in fixture.REFS.items():
        data = (folder / name).read_bytes()
        assert data.isascii() and data.startswith(b"(l")  # the text form, which has no header
        found = pickle.loads(data, encoding="latin1")
        assert [ref["split"] for ref in found] == [split for _, _, split, _ in refs]
        assert found[0]["sentences"][0]["sent"] == refs[0][3][0]


def test_a_photo_in_two_data_sets_is_found_as_a_leak(folder: Path, tmp_path: Path) -> None:
    words = {"one": ["--split", "testA"], "other": ["--dataset", "refcocog", "--split", "val"]}
    for name, chosen in words.items():
        build(source_of("refcoco", folder, *chosen), tmp_path / name, single())
    findings = verify([tmp_path / name for name in words], single())
    assert len(findings) == 1 and "share 1 subjects: coco-31" in findings[0]
