"""What the sources of named boxes share: names, what may be named, images that must fit their labels."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sourcing import source_of

from launcher.errors import UserError
from shards.sources import grounding
from shards.sources.fixtures import drawing, refcoco
from shards.sources.grounding import Named, expression_of, one_name_each

SIZE_PX = (100, 80)


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("The red cube.", "red cube"),
        ("  A  man \n in the hat ", "man in the hat"),
        ("an umbrella?", "umbrella"),
        ("Thesaurus on the desk", "thesaurus on the desk"),
        ("TV on the left", "TV on the left"),
        ("A Chinese man 's blue , green shirt", "Chinese man's blue, green shirt"),
        ("the", "the"),
        ("a", "a"),
        (" ?! ", ""),
    ],
)
def test_expressions_fit_behind_an_article(text: str, expression: str) -> None:
    assert expression_of(text) == expression


def kept(named: list[Named], strict: bool = False, rivals: tuple[Named, ...] = ()) -> tuple[list[str], Counter]:
    dropped: Counter = Counter()
    return [one.expression for one in one_name_each(named, SIZE_PX, 4, dropped, rivals, strict)], dropped


def named(thing: str, *expressions: str, box: tuple[float, ...] = (1, 1, 20, 20)) -> list[Named]:
    return [Named(thing, text, box) for text in expressions]  # type: ignore[arg-type]


def test_a_name_of_two_things_is_dropped_for_both() -> None:
    found = [*named("a", "The man", "left man"), *named("b", "man", "right man")]
    assert kept(found) == (["left man", "right man"], Counter({"expression of two things": 2}))


def test_rivals_take_a_name_away_and_are_not_counted() -> None:
    assert kept(named("a", "man", "left man"), rivals=tuple(named("b", "Man."))) == (
        ["left man"],
        Counter({"expression of two things": 1}),
    )


def test_the_same_name_again_for_the_same_thing_is_kept_once() -> None:
    assert kept(named("a", "man", "A man.", "Man")) == (["man"], Counter({"expression said before": 2}))


def test_strictly_a_name_must_not_be_part_of_another_things_name() -> None:
    found = [*named("a", "man", "tall man"), *named("b", "a man in a hat")]
    assert kept(found)[0] == ["man", "tall man", "man in a hat"]
    assert kept(found, strict=True) == (["tall man", "man in a hat"], Counter({"expression of two things": 1}))


def test_boxes_are_clipped_and_counted_where_nothing_is_left() -> None:
    dropped: Counter = Counter()
    found = [*named("a", "edge", box=(-9, 70, 12, 99)), *named("b", "gone", box=(120, 1, 140, 30))]
    assert one_name_each(found, SIZE_PX, 4, dropped) == (Named("a", "edge", (0, 70, 12, 80)),)
    assert dropped == {"box too small or outside": 1}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.text("tT he.?man", max_size=8)), max_size=8), st.booleans())
def test_every_candidate_is_kept_or_counted_and_kept_names_are_unique(
    candidates: list[tuple[str, str]], strict: bool
) -> None:
    found, dropped = kept([Named(thing, text, (1, 1, 20, 20)) for thing, text in candidates], strict)
    assert len(found) + dropped.total() == len(candidates)
    assert len({text.lower() for text in found}) == len(found)


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a/b.jpg", "", "..", "."])
def test_names_of_images_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no plain file name"):
        grounding.place(tmp_path, name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    refcoco.write(tmp_path)
    return tmp_path


def test_missing_images_are_found_before_anything_is_built(folder: Path) -> None:
    images = folder / "images/mscoco/images/train2014"
    for number in (9, 25):
        (images / f"COCO_train2014_{number:012d}.jpg").unlink()
    with pytest.raises(
        UserError, match=r"000009\.jpg: not there \(2 images are missing\); unpack COCO's train2014.zip"
    ):
        source_of("refcoco", folder)


def test_images_of_another_size_than_their_labels_are_refused(folder: Path) -> None:
    source = source_of("refcoco", folder)
    path = folder / "images/mscoco/images/train2014/COCO_train2014_000000000009.jpg"
    drawing.save(path, drawing.picture((48, 32)))
    with pytest.raises(UserError, match="is 48x32, its labels are for 96x64"):
        source.sample(0)


def test_images_are_taken_byte_for_byte(folder: Path) -> None:
    source = source_of("refcoco", folder)
    path = folder / "images/mscoco/images/train2014/COCO_train2014_000000000009.jpg"
    assert source.sample(0).image == path.read_bytes() and source.sample(0).extension == "jpg"
    drawing.save(path, drawing.picture((96, 64)), "PNG")
    assert source.sample(0).extension == "png"
