"""Which questions are asked, and what is read from any answer."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvlm_hpe import dialogue
from cogvlm_hpe.evaluate import decode
from cogvlm_hpe.evaluate.answer import Answer
from shards import pose
from shards.record import Head, Image, Object, Record

NOTES = {"prompts": dict(dialogue.DEFAULT_PROMPTS), "answer_format": "offset"}


def head(yaw: float, **more: object) -> Head:
    return Head((10.0, 20.0, 30.0, 50.0), tuple(pose.rotation_from_pose(yaw, 10.0, -20.0).flat), **more)


RECORD = Record(
    Image(200, 100, "s", "0", "p"),
    [head(0.0), head(40.0, visible=0.4), head(80.0, weak=True), head(120.0, visible=0.5)],
    [Object("red ball", (50.0, 10.0, 90.0, 60.0))],
)


def test_weak_and_hidden_heads_are_not_asked_and_numbers_are_those_of_the_record() -> None:
    rows = decode.questions("k", RECORD, ["pose", "facing"], NOTES)
    assert [(row["task"], row["id"]) for row in rows] == [
        ("pose", "k/head-0"),
        ("pose", "k/head-3"),
        ("facing", "k/head-0"),
        ("facing", "k/head-3"),
    ]
    assert rows[1]["truth"] == {"yaw": 120.0, "pitch": 10.0, "roll": -20.0}
    assert rows[0]["question"] == "What is the pose of the head at [[050,200,150,500]]?"
    assert rows[0]["head_height"] == 0.3
    assert rows[2]["truth"] == "front"  # pitch 10: within the slope that counts as level


def test_objects_are_asked_both_ways() -> None:
    where, what = decode.questions("k", RECORD, ["where", "what"], NOTES)
    assert where["question"] == "Where is the red ball?" and where["truth"] == [50.0, 10.0, 90.0, 60.0]
    assert what["question"] == "What is at [[250,100,450,600]]?" and what["truth"] == "red ball"


@given(st.floats(-180, 180), st.floats(-89, 89), st.floats(-180, 180))
def test_a_right_answer_has_only_rounding_error(yaw: float, pitch: float, roll: float) -> None:
    row = {"task": "pose", "truth": {"yaw": yaw, "pitch": pitch, "roll": roll}}
    got = decode.judge(row, Answer(dialogue.format_pose(yaw, pitch, roll)), "offset")
    assert got["kind"] == "pose"
    assert all(got["errors"][angle] <= 0.5001 for angle in ("yaw", "pitch", "roll"))
    assert got["errors"]["geodesic"] <= 1.51


def test_a_right_box_overlaps_almost_wholly() -> None:
    where, _ = decode.questions("k", RECORD, ["where", "what"], NOTES)
    got = decode.judge(where, Answer(dialogue.format_box(RECORD.objects[0].bbox, 200, 100)), "offset")
    assert got["errors"]["iou"] > 0.99 and got["parsed"] == [[50.0, 10.0, 90.0, 60.0]]


def test_the_first_of_several_boxes_counts() -> None:
    where, _ = decode.questions("k", RECORD, ["where", "what"], NOTES)
    got = decode.judge(where, Answer("[[000,000,100,100;250,100,450,600]]"), "offset")
    assert got["errors"]["iou"] == 0.0 and len(got["parsed"]) == 2


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("[[000,000,100,100;250,100,450,600;30", 2),
        ("[[000,000,100,100;250,100,450,600;300,300,400,400]", 2),
        ("[[000,000,100,100]] [[250,100,450,600]] [[3", 2),
        ("[[000,000,100,100]] [", 1),
    ],
)
def test_whole_boxes_count_of_an_answer_that_our_limit_cut(text: str, boxes: int) -> None:
    where, _ = decode.questions("k", RECORD, ["where", "what"], NOTES)
    got = decode.judge(where, Answer(text, cut=True), "offset")
    assert got["kind"] == "box" and len(got["parsed"]) == boxes and got["text"] == text
    assert decode.judge(where, Answer(text), "offset")["kind"] == "other", "the model itself ended it there"


@pytest.mark.parametrize("text", ["[[000,000,100,100]] is where", "[[000,0", "[[000,000,100,100;1 {{", "a; 1"])
def test_what_else_was_cut_stays_as_it_is(text: str) -> None:
    where, _ = decode.questions("k", RECORD, ["where", "what"], NOTES)
    assert decode.judge(where, Answer(text, cut=True), "offset")["kind"] in ("other", "blended")


@pytest.mark.parametrize(
    ("text", "kind"),
    [("{{090,090,180}} [[1,2,3,4]]", "blended"), ("[[100,100,200,200]]", "box"), ("left", "other"), ("", "other")],
)
def test_a_pose_answer_in_another_format_has_no_errors_to_average(text: str, kind: str) -> None:
    row = decode.questions("k", RECORD, ["pose"], NOTES)[0]
    got = decode.judge(row, Answer(text), "offset")
    assert (got["kind"], got["parsed"], got["errors"], got["text"]) == (kind, None, None, text)


@given(st.lists(st.integers(0, 90), max_size=20), st.integers(1, 64))
def test_a_crowd_does_not_give_all_images_memory_for_as_many_answers(heads: list[int], questions: int) -> None:
    asked = [(image, {"n": n}) for image, count in enumerate(heads) for n in range(count)]
    parts = decode._parts(asked, questions)
    assert [pair for part in parts for pair in part] == asked
    for part in parts:
        images = [image for image, _ in part]
        assert 0 < len(part) <= questions
        assert len(set(images)) * max(map(images.count, images)) <= 4 * questions


def test_images_alike_are_decoded_in_full_parts() -> None:
    asked = [(image, {}) for image in range(16) for _ in range(10)]
    assert [len(part) for part in decode._parts(asked, 64)] == [64, 64, 32]


@given(st.text(max_size=40), st.sampled_from(dialogue.TASKS))
def test_any_text_is_judged_and_can_be_stored(text: str, task: str) -> None:
    for row in decode.questions("k", RECORD, [task], NOTES):
        got = decode.judge(row, Answer(text), "offset")
        assert got["kind"] in ("pose", "box", "blended", "out_of_range", "other")
        assert json.loads(json.dumps(got, allow_nan=False))["errors"] == got["errors"]


def test_words_must_match_exactly_but_for_spaces() -> None:
    _, what = decode.questions("k", RECORD, ["where", "what"], NOTES)
    assert decode.judge(what, Answer(" red  ball "), "offset")["errors"] == {"exact": True}
    assert decode.judge(what, Answer("Red ball"), "offset")["errors"] == {"exact": False}


def test_signed_answers_are_read_where_the_adapter_says_so() -> None:
    row = decode.questions("k", RECORD, ["pose"], NOTES)[0]
    assert decode.judge(row, Answer("{{-90,10,-20}}"), "signed")["parsed"] == {
        "yaw": -90.0,
        "pitch": 10.0,
        "roll": -20.0,
    }
    assert decode.judge(row, Answer("{{-90,10,-20}}"), "offset")["parsed"] is None


def test_errors_are_rounded_the_same_way_everywhere() -> None:
    row = decode.questions("k", RECORD, ["pose"], NOTES)[0]
    value = decode.judge(row, Answer("{{181,101,161}}"), "offset")["errors"]["geodesic"]
    assert value == round(value, 4) and np.isfinite(value)
