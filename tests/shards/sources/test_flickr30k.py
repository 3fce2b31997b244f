"""Flickr30k Entities: phrases, chains and boxes counted from 1; what cannot be asked for; XML that attacks."""

from pathlib import Path

import pytest
from sourcing import fills_its_box, named_in, pixels_of, records_of, source_of

from launcher.errors import UserError
from shards.sources import flickr30k
from shards.sources.fixtures import drawing
from shards.sources.fixtures import flickr30k as fixture

RED, BLUE, BLACK, WHITE = (10, 20, 30, 60), (50, 10, 90, 40), (14, 4, 25, 20), (59, 49, 90, 80)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fixture.write(tmp_path)
    return tmp_path


def test_phrases_that_name_one_box(folder: Path) -> None:
    source = source_of("flickr30k", folder)
    assert named_in(source) == {
        "1000092795": [
            ("man in red", RED),
            ("man in blue", BLUE),
            ("black hat", BLACK),
            ("Asian boy's brother", RED),
            ("tall hat", BLACK),
        ],
        "10002456": [("white car", WHITE), ("car", WHITE), ("café's white, clean car", WHITE)],
    }
    assert source.scope["dropped"] == {
        "box too small or outside": 1,
        "expression of two things": 1,
        "image without objects": 1,
        "needs its caption": 2,
        "no box": 2,
        "not visual": 1,
        "scene": 2,
        "several boxes": 1,
        "unrelated caption": 1,
    }
    assert [record.image.subject for record in records_of(source)] == ["flickr30k-1000092795", "flickr30k-10002456"]


def test_boxes_lie_on_what_the_pixels_show(folder: Path) -> None:
    source = source_of("flickr30k", folder)
    pixels = pixels_of(source.sample(0).image)
    colours = {RED: "red", BLUE: "blue"}
    for thing in source.sample(0).record.objects:
        if thing.bbox in colours:
            assert fills_its_box(pixels, thing.bbox, drawing.COLOURS[colours[thing.bbox]])


def test_several_boxes_become_one_on_request(folder: Path) -> None:
    source = source_of("flickr30k", folder, "--several", "union")
    assert ("two dogs", (10, 20, 90, 80)) in named_in(source)["1000092795"]
    assert "several boxes" not in source.scope["dropped"]


def test_the_official_splits(folder: Path) -> None:
    assert named_in(source_of("flickr30k", folder, "--split", "val")) == {
        "1000268201": [("red poster", (0, 0, 100, 80))]
    }
    with pytest.raises(UserError, match=r"flickr30k, split test: no image with an object \(left out: nothing\)"):
        source_of("flickr30k", folder, "--split", "test")


def test_captions_are_only_left_out_where_the_authors_say_so(folder: Path) -> None:
    (folder / "UNRELATED_CAPTIONS").unlink()
    assert ("parked car", WHITE) in named_in(source_of("flickr30k", folder))["10002456"]
    (folder / "UNRELATED_CAPTIONS").write_text("10002456\n")
    with pytest.raises(UserError, match="UNRELATED_CAPTIONS: expected an image number and a caption number"):
        source_of("flickr30k", folder)


def test_captions_in_latin_1(folder: Path) -> None:
    (folder / "Sentences/1000268201.txt").write_bytes("[/EN#30/other A café] .\n".encode("latin-1"))
    assert named_in(source_of("flickr30k", folder, "--split", "val"))["1000268201"][0][0] == "café"


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        (
            "[/EN#1/people A man] and [/EN#22/body parts/other two hands] .",
            [("1", "A man"), ("22", "parts/other two hands")],
        ),
        ("[/EN#7/a/b/c The x]", [("7", "The x")]),
        ("[/EN#7 x]", [("7", "x")]),
        ("no [brackets] /EN#3/a x]", []),
    ],
)
def test_marked_phrases(caption: str, found: list[tuple[str, str]]) -> None:
    assert list(flickr30k.phrases(caption)) == found


BOMB = """<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">
<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">]><annotation><filename>&c;</filename></annotation>"""
OUTSIDE = """<?xml version="1.0"?><!DOCTYPE x [<!ENTITY secret SYSTEM "{path}">]>
<annotation><size><width>100</width><height>80</height></size><object><name>&secret;</name></object></annotation>"""
REMOTE = """<!DOCTYPE annotation SYSTEM "{path}"><annotation/>"""


@pytest.mark.parametrize("attack", [BOMB, OUTSIDE, REMOTE])
def test_xml_that_declares_entities_is_refused(folder: Path, tmp_path: Path, attack: str) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    path = folder / "Annotations/1000092795.xml"
    path.write_text(attack.replace("{path}", secret.as_uri()))
    with pytest.raises(UserError, match=r"1000092795\.xml: refused \(\w+Forbidden\)") as refused:
        source_of("flickr30k", folder)
    assert "the secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<annotation>", "no element found"),
        ("<annotation><size><width>9</width></size></annotation>", "no size/height"),
        ("<annotation><size><width>9</width><height>many</height></size></annotation>", "many"),
        (
            "<annotation><size><width>9</width><height>9</height></size>"
            "<object><name>1</name><bndbox><xmin>1</xmin></bndbox></object></annotation>",
            "no bndbox/ymin",
        ),
    ],
)
def test_annotations_that_are_none_are_named(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "1.xml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"1\.xml: no annotation of Flickr30k Entities .*{why}"):
        flickr30k.read_boxes(path)
    with pytest.raises(UserError, match=r"2\.xml: not there; FOLDER must hold"):
        flickr30k.read_boxes(tmp_path / "2.xml")
