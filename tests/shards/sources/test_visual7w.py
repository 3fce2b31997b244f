"""Visual7W's pointing questions: the right box, and the name in a question."""

import json
from pathlib import Path

import pytest
from sourcing import fills_its_box, named_in, pixels_of, records_of, source_of

from launcher.errors import UserError
from shards.sources.fixtures import drawing
from shards.sources.fixtures import visual7w as fixture
from shards.sources.visual7w import ANNOTATIONS, name_in

RED, BLUE = (10, 10, 40, 60), (50, 20, 90, 50)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fixture.write(tmp_path)
    return tmp_path


def test_questions_become_names_of_their_right_boxes(folder: Path) -> None:
    source = source_of("visual7w", folder)
    assert named_in(source) == {
        "v7w_1": [("block that is farther from the right edge", RED), ("blue block", BLUE)],
        "v7w_2": [("corner that is at the top left", (0, 0, 20, 30))],
    }
    assert source.scope["dropped"] == {
        "box too small or outside": 1,
        "expression of two things": 2,
        "question that makes no name": 2,
    }
    assert [record.image.subject for record in records_of(source)] == ["visual-genome-1", "visual-genome-2"]
    assert [(record.image.width, record.image.height) for record in records_of(source)] == [(96, 72), (64, 64)]


def test_boxes_lie_on_what_the_pixels_show(folder: Path) -> None:
    sample = source_of("visual7w", folder).sample(0)
    for thing, colour in zip(sample.record.objects, ("red", "blue"), strict=True):
        assert fills_its_box(pixels_of(sample.image), thing.bbox, drawing.COLOURS[colour])


def test_the_official_splits(folder: Path) -> None:
    assert named_in(source_of("visual7w", folder, "--split", "val")) == {
        "v7w_3": [("one of the blocks that is red", RED)]
    }
    assert named_in(source_of("visual7w", folder, "--split", "test")) == {
        "v7w_4": [("block that is blue", (50, 20, 80, 50))]
    }


@pytest.mark.parametrize(
    ("question", "name"),
    [
        ("Which pillow is farther from the window?", "pillow that is farther from the window"),
        ("Which is the small computer in the corner?", "the small computer in the corner"),
        ("which doughnut has multicolored sprinkles ?", "doughnut that has multicolored sprinkles"),
        ("Which man's hat was knitted?", "man's hat that was knitted"),
        ("Which of the men wears a tie?", "one of the men that wears a tie"),
        ("Which giraffe is the one eating grass?", "giraffe that is the one eating grass"),
        ("Which dog is sleeping on the bed?", "dog that is sleeping on the bed"),
        ("Which ball is the boy kicking?", None),
        ("Which bag is he carrying?", None),
        ("Which step leads to the tub?", None),
        ("Which is taller?", None),
        ("Which man who is sitting is old?", None),
        ("What is the man holding?", None),
        ("Which", None),
        ("", None),
    ],
)
def test_names_in_questions(question: str, name: str | None) -> None:
    assert name_in(question) == name


def test_files_of_another_kind_are_named(folder: Path) -> None:
    path = folder / ANNOTATIONS
    whole = json.loads(path.read_text())
    wrong = [
        [],
        {"images": whole["images"]},
        whole | {"boxes": whole["boxes"][1:]},
        whole | {"boxes": [{"box_id": 100, "x": 1}]},
        whole | {"images": [{"split": "train"}]},
    ]
    for value in wrong:
        path.write_text(json.dumps(value))
        with pytest.raises(UserError, match=rf"{ANNOTATIONS}: not Visual7W's pointing questions"):
            source_of("visual7w", folder)
    path.unlink()
    with pytest.raises(UserError, match=rf"{ANNOTATIONS}: not there; FOLDER must hold"):
        source_of("visual7w", folder)


def test_a_missing_image_is_named_at_once(folder: Path) -> None:
    (folder / "images/v7w_2.jpg").unlink()
    with pytest.raises(UserError, match=r"v7w_2\.jpg: not there"):
        source_of("visual7w", folder)
    (folder / "images").rename(folder / "elsewhere")
    with pytest.raises(UserError, match=r"images: not there; unpack visual7w_images\.zip"):
        source_of("visual7w", folder)
