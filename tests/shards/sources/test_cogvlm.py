"""CogVLM's images/ and labels/: which words of a conversation name which box, and thousandths back to pixels."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sourcing import named_in, records_of, source_of

from cogvlm_hpe.dialogue import format_box
from launcher.errors import UsageError, UserError
from shards.record import Image, Object, Record, from_json
from shards.sources.cogvlm import _pixels
from shards.sources.cogvlm.talk import named_boxes
from shards.sources.fixtures import cogvlm as fixture
from shards.sources.fixtures import drawing

BOX = "[[100,200,300,999]]"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    fixture.write(tmp_path / "set")
    return tmp_path / "set"


def test_what_conversations_name(folder: Path) -> None:
    source = source_of("cogvlm", folder, "--licence", "CC-BY-NC-4.0")
    blue = pytest.approx(fixture.BLUE, abs=0.13)
    assert named_in(source) == {
        "00000001": [
            ("red block", pytest.approx(fixture.RED, abs=0.13)),
            ("block in front of the blue wall", blue),
            ("blue block that is on the right", blue),
        ],
        "00000003": [("tall block", pytest.approx((12, 9, 48, 90), abs=0.13))],
    }
    assert source.scope["dropped"] == {
        "answer without a box": 2,
        "box out of range": 2,
        "boxes in a text": 1,
        "expression of two things": 2,
        "image without label": 1,
        "image without objects": 2,
        "question not understood": 1,
        "several boxes": 1,
    }
    assert source.licence == "CC-BY-NC-4.0"
    assert [record.image.subject for record in records_of(source)] == ["set/00000001", "set/00000003"]


NAMES = ["the man in the red shirt and blue hat", "third giraffe from the left, behind the tree", "dog and its puppy"]
QUESTIONS = [
    "Where is {}?",
    "Where is {} in the image?",
    "Where is {}? answer in [[x0,y0,x1,y1]] format.",
    "Question: where are {}?",
    "Please find {} and give me its bounding box.",
    "In the photo, could you find and tell me the bounding boxes of {}?",
    "Point out {} in the picture by giving its coordinates, please.",
    "I would like to know the position of {} within the given image.",
    "Can you locate {} in and share the bounding boxes with me?",
    "What location does {} hold in the picture?",
    "The coordinates of {}, can you help me with that?",
    "Let me know the location of {} in the form of bounding boxes.",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("question", QUESTIONS)
def test_questions_for_a_place(question: str, name: str) -> None:
    dropped: Counter = Counter()
    said = list(named_boxes([("user", question.format(name)), ("assistant", BOX)], dropped))
    assert [(one.expression, one.box) for one in said] == [(name, (100, 200, 300, 999))]
    assert not dropped


@pytest.mark.parametrize(
    ("question", "answer", "why"),
    [
        (f"What is at {BOX}?", "red cube", None),
        (f"Can you give me a description of the region {BOX} in image?", "A man who is holding a cup.", None),
        (f"Describe the area with the coordinates {BOX}.", "the dog", None),
        (f"What is at {BOX}?", "There is a red cube.", "question not understood"),
        (f"What is at {BOX}?", "A man. He is old.", "question not understood"),
        (f"How many dogs are in the region {BOX}?", "two dogs", "question not understood"),
        (f"Is {BOX} the dog?", "the dog", "question not understood"),
        (f"What colour is the box {BOX}?", "dark red", "question not understood"),
        (f"What touches {BOX}?", BOX, "boxes in question and answer"),
        ("Describe the image with coordinates.", f"A man {BOX} and a dog {BOX}.", "boxes in a text"),
        ("Where is the cup?", "I cannot see it.", "answer without a box"),
        ("Where are the cups?", "[[1,2,3,4;5,6,7,8]]", "several boxes"),
        ("Where is the cup?", "[[300,2,3,4]]", "box out of range"),
        ("Where is the cup?", "[[1,2,3,1001]]", "box out of range"),
    ],
)
def test_answers_that_name_a_box_and_others(question: str, answer: str, why: str | None) -> None:
    dropped: Counter = Counter()
    said = list(named_boxes([("user", question), ("assistant", answer)], dropped))
    assert [one.expression for one in said] == ([answer] if why is None else [])
    assert dropped == Counter([why] if why else [])


def test_a_question_belongs_to_the_next_answer_only() -> None:
    dropped: Counter = Counter()
    turns = [("user", "Where is the cup?"), ("assistant", BOX), ("assistant", BOX), ("caption", f"a cup {BOX}")]
    assert len(list(named_boxes(turns, dropped))) == 1
    assert dropped == {"boxes in a text": 2}


@given(
    st.lists(
        st.tuples(st.sampled_from(["user", "assistant", "caption"]), st.text("[],;0123 whereisthof?.", max_size=60))
    )
)
def test_any_conversation_is_read(turns: list[tuple[str, str]]) -> None:
    dropped: Counter = Counter()
    said = list(named_boxes(turns, dropped))
    assert len(said) + dropped.total() == sum(role != "user" for role, _ in turns)


@given(st.integers(50, 5000), st.integers(50, 5000), st.tuples(*[st.integers(0, 999)] * 4))
def test_boxes_come_back_as_the_same_thousandths(width: int, height: int, corners: tuple[int, ...]) -> None:
    (x0, x1), (y0, y1) = sorted((corners[0], corners[2])), sorted((corners[1], corners[3]))
    if x0 == x1 or y0 == y1:
        return
    box = _pixels((x0, y0, x1, y1), width, height)
    stored = Record(Image(width, height, "cogvlm", "1", "s"), [], [Object("it", box)])
    again = from_json(stored.to_json()).objects[0].bbox
    assert format_box(again, width, height) == f"[[{x0:03d},{y0:03d},{x1:03d},{y1:03d}]]"


def test_the_far_edge_stays_in_the_image() -> None:
    assert _pixels((0, 0, 1000, 1000), 640, 480) == pytest.approx((0.32, 0.24, 640, 480))


def test_shares_deal_images_out_once(folder: Path) -> None:
    for number in range(10, 30):
        label = {"conversations": [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": BOX}]}
        (folder / "labels" / f"{number}.json").write_text(json.dumps(label))
        drawing.save(folder / "images" / f"{number}.png", drawing.picture((40, 30)), "PNG")
    words = ["--shares", "train=0.5,val=0.5", "--seed", "3", "--split"]
    train, val = (named_in(source_of("cogvlm", folder, *words, split)) for split in ("train", "val"))
    assert train and val and not set(train) & set(val)
    assert set(train) | set(val) == set(named_in(source_of("cogvlm", folder)))
    with pytest.raises(UsageError, match="--split test"):
        source_of("cogvlm", folder, *words, "test")


def test_labels_and_images_that_do_not_fit_are_named(folder: Path) -> None:
    label = folder / "labels/00000001.json"
    for text in ("[]", '{"conversations": [{"role": "user"}]}', '{"conversations": 3}', '{"captions": ["A dog."]}'):
        label.write_text(text)
        with pytest.raises(UserError, match=r"00000001\.json: no conversations or captions of CogVLM's"):
            source_of("cogvlm", folder)
    (folder.parent / "again").mkdir()
    fixture.write(folder.parent / "again")
    (folder.parent / "again/images/00000001.jpg").unlink()
    with pytest.raises(UserError, match=r"00000001\.json: there is no image 00000001 in .*again/images"):
        source_of("cogvlm", folder.parent / "again")
    with pytest.raises(UserError, match="images: not there; FOLDER must hold the folders images and labels"):
        source_of("cogvlm", folder / "labels")
