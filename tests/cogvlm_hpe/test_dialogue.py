"""The text grammar, both ways."""

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvlm_hpe import dialogue
from cogvlm_hpe.dialogue import facing, format_box, format_pose, parse
from shards import pose

ANGLE = st.floats(-180, 180, exclude_min=True)


def test_boxes_are_floored_thousandths_within_the_image() -> None:
    assert format_box((0, 5.5, 99.99, 100), 100, 100) == "[[000,055,999,999]]"
    assert format_box((-3, -1, 250, 60), 200, 100) == "[[000,000,999,600]]"


def test_poses_are_offset_whole_degrees() -> None:
    assert format_pose(0, 0, 0) == "{{180,090,180}}"
    assert format_pose(-135.4, 19.6, 20.5) == "{{045,110,200}}"
    assert format_pose(180, 90, -179.7) == "{{000,180,000}}"
    assert format_pose(-135.4, 19.6, -3, "signed") == "{{-135,20,-3}}"


@pytest.mark.parametrize("answer_format", ["offset", "signed"])
@given(yaw=ANGLE, pitch=st.floats(-90, 90), roll=ANGLE)
def test_a_pose_comes_back_within_rounding(
    answer_format: dialogue.AnswerFormat, yaw: float, pitch: float, roll: float
) -> None:
    parsed = parse(format_pose(yaw, pitch, roll, answer_format), answer_format)
    assert parsed.kind == "pose"
    assert parsed.pose_deg is not None
    for said, true in zip(parsed.pose_deg, (yaw, pitch, roll), strict=True):
        assert abs(float(pose.wrap_deg(said - true))) <= 0.5 + 1e-9


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_a_box_comes_back_within_a_thousandth(values: list[float]) -> None:
    x0, x1 = sorted(values[:2])
    y0, y1 = sorted(values[2:])
    parsed = parse(format_box((x0, y0, x1, y1), 1, 1))
    if min(x1 - x0, y1 - y0) > 0.002 and max(x0, y0) < 0.997:
        assert parsed.kind == "box"
        assert max(abs(a - b) for a, b in zip(parsed.boxes[0], (x0, y0, x1, y1), strict=True)) <= 0.0011


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("{{180,090,180}}", "pose"),
        (" {{180,090,180}} ", "pose"),
        ("{{360,090,360}}", "pose"),
        ("{{361,090,180}}", "out_of_range"),
        ("{{180,181,180}}", "out_of_range"),
        ("{{180,090}}", "other"),
        ("{{180,090,180}} {{180,090,180}}", "other"),
        ("[[100,200,300,400]]", "box"),
        ("[[100,200,300,400;500,600,700,800]]", "box"),
        ("[[300,200,100,400]]", "out_of_range"),
        ("[[100,200,300]]", "other"),
        ("[[100,090,180}}", "blended"),
        ("{{100,200,300,400]]", "blended"),
        ("[[100,200,300,400]] {{180,090,180}}", "blended"),
        ("{{{{180,090,180}}", "other"),
        ("[[100,200,1000,400]]", "out_of_range"),
        ("[[100,200,300,400]] [[-1,200,300,400]]", "out_of_range"),
        ("[[100,200,300,400]] [[-1,200,300]]", "other"),
        ("{{12345,090,180}}", "other"),
        ("a red cube", "other"),
        ("", "other"),
    ],
)
def test_kinds(text: str, kind: str) -> None:
    assert parse(text).kind == kind


def test_360_is_read_as_000() -> None:
    assert parse("{{360,090,360}}") == parse("{{000,090,000}}")


MARKS = st.sampled_from(["[[", "]]", "{{", "}}", ",", ";", "1", "42", "999", "-7", " ", "x"])


@given(st.one_of(st.text(), st.lists(MARKS, max_size=14).map("".join)))
def test_no_text_raises_and_every_kind_keeps_its_promise(text: str) -> None:
    for answer_format in ("offset", "signed"):
        parsed = parse(text, answer_format)
        assert (parsed.pose_deg is not None) == (parsed.kind == "pose")
        assert bool(parsed.boxes) == (parsed.kind == "box")
        for x0, y0, x1, y1 in parsed.boxes:
            assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1


def _reference_kind(text: str, answer_format: str) -> str:
    """docs/answers.md read anew, with string methods instead of patterns."""
    box_marks, pose_marks = ("[[" in text or "]]" in text), ("{{" in text or "}}" in text)
    if box_marks and pose_marks:
        return "blended"
    body = text.strip()
    if pose_marks:
        numbers = _reference_numbers(body[2:-2]) if body[:2] == "{{" and body[-2:] == "}}" and len(body) > 4 else None
        if numbers is None or len(numbers) != 3:
            return "other"
        low, high = ((0, 0, 0), (360, 180, 360)) if answer_format == "offset" else ((-180, -90, -180), (180, 90, 180))
        fits = all(a <= value <= b for value, a, b in zip(numbers, low, high, strict=True))
        return "pose" if fits else "out_of_range"
    fits = True
    while body:
        inside, closing, rest = body[2:].partition("]]")
        if body[:2] != "[[" or not closing:
            return "other"
        for part in inside.split(";"):
            numbers = _reference_numbers(part)
            if numbers is None or len(numbers) != 4:
                return "other"
            x0, y0, x1, y1 = numbers
            fits = fits and 0 <= x0 < x1 <= 999 and 0 <= y0 < y1 <= 999
        body = rest.strip()
    return ("box" if fits else "out_of_range") if box_marks else "other"


def _reference_numbers(text: str) -> list[int] | None:
    words = [word.strip() for word in text.split(",")]
    digits = [word[1:] if word[:1] in ("+", "-") else word for word in words]
    return [int(word) for word in words] if all(d.isdecimal() and len(d) <= 4 for d in digits) else None


TOKENS = [
    "[[",
    "]]",
    "{{",
    "}}",
    "[",
    "]",
    "{",
    "}",
    ",",
    ";",
    "-",
    "+",
    " ",
    "\n",
    "0",
    "07",
    "42",
    "090",
    "180",
    "360",
]
TOKENS += ["361", "999", "1000", "12345", "x", "pose", "²", "١", "１", "\0", "\ud800", "{{180,090,180}}", "[[1,2,3,4]]"]


@pytest.mark.slow
def test_a_million_strings_have_the_kind_the_grammar_says() -> None:
    generator, seen = random.Random(20), Counter()
    for number in range(1_000_000):
        answer_format = "offset" if number % 2 else "signed"
        if number % 4:
            text = "".join(generator.choices(TOKENS, k=generator.randrange(12)))
        else:  # one edit away from a right answer
            text = generator.choice(("{{180,090,180}}", "{{-12,90,-180}}", "[[1,20,300,999]]", "[[1,2,3,4;5,6,7,8]]"))
            at = generator.randrange(len(text))
            text = text[:at] + generator.choice(TOKENS) + text[at + generator.randrange(3) :]
        kind = parse(text, answer_format).kind
        seen[kind] += 1
        if number % 10 < 2:
            assert kind == _reference_kind(text, answer_format), (text, answer_format)
    assert min(seen[kind] for kind in ("pose", "box", "blended", "out_of_range", "other")) > 10_000


@pytest.mark.parametrize(
    ("yaw", "pitch", "words"),
    [
        (0, 0, "front"),
        (90, 0, "left"),
        (-90, 0, "right"),
        (180, 0, "back"),
        (45, 30, "front left up"),
        (0, -30, "front down"),
        (-135, 0, "back right"),
    ],
)
def test_facing_in_words(yaw: float, pitch: float, words: str) -> None:
    direction = -pose.rotation_from_pose(yaw, pitch, 0)[:, 2]
    assert facing(direction.tolist()) == words


@given(yaw=ANGLE, pitch=st.floats(-80, 80))
def test_facing_mirrors_with_the_image(yaw: float, pitch: float) -> None:
    x, y, z = -pose.rotation_from_pose(yaw, pitch, 0)[:, 2]
    sector_deg = math.degrees(math.atan2(-x, -z)) % 45.0
    if abs(sector_deg - 22.5) > 1e-6:  # on a border between sectors rounding decides
        swapped = facing((-x, y, z)).replace("left", "LEFT").replace("right", "left").replace("LEFT", "right")
        assert swapped == facing((x, y, z))


def test_tags_are_neither_pose_nor_box() -> None:
    assert dialogue.format_tags("red cube") == "{{red,cube}}"
    assert parse("{{red,cube}}").kind == "other"
