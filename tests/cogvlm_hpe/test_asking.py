"""What is asked about a record, and the answers."""

from cogvlm_hpe.asking import questions
from cogvlm_hpe.dialogue import DEFAULT_PROMPTS, Task
from shards.pose import rotation_from_pose
from shards.record import Head, Image, Object, Record

LEFT, RIGHT, CUBE = (0.0, 0.0, 40.0, 50.0), (50.0, 10.0, 80.0, 60.0), (10.0, 70.0, 30.0, 90.0)


def head(bbox: tuple[float, float, float, float], yaw_deg: float, pitch_deg: float = 0.0) -> Head:
    return Head(bbox, tuple(rotation_from_pose(yaw_deg, pitch_deg, 0.0).reshape(9).tolist()))


RECORD = Record(
    Image(100, 100, "test", "1", "1"),
    [head(LEFT, 40.0), head(RIGHT, 24.0)],
    [Object("red cube", CUBE), Object("left head", LEFT), Object("largest head", LEFT), Object("right head", RIGHT)],
)


def answers(task: Task) -> list[str]:
    return [q.answer for q in questions(RECORD, [task], DEFAULT_PROMPTS, "offset")]


def test_where_is_asked_of_every_expression() -> None:
    assert answers("where") == [
        "[[100,700,300,900]]",
        "[[000,000,400,500]]",
        "[[000,000,400,500]]",
        "[[500,100,800,600]]",
    ]


def test_a_head_is_a_head_whatever_its_neighbours() -> None:
    assert answers("what") == ["red cube", "head", "head"]


def test_tags_are_the_words_of_an_object_in_double_braces() -> None:
    [asked] = questions(RECORD, ["tags"], DEFAULT_PROMPTS, "offset")
    assert (asked.query, asked.answer) == ("Tags of [[100,700,300,900]]?", "{{red,cube}}")


def test_facing_is_asked_where_one_word_alone_is_right() -> None:
    # 24 degrees lie beside the edge between front and front left, at 22.5.
    assert answers("facing") == ["front left"]
    tilted = Record(RECORD.image, [head(LEFT, 0.0, 14.0), head(RIGHT, 0.0, 25.0)], [])
    assert len(questions(tilted, ["facing"], DEFAULT_PROMPTS, "offset")) == 1


def test_heads_hardly_seen_are_not_asked_about() -> None:
    hidden = Record(RECORD.image, [Head(LEFT, RECORD.heads[0].rotation, visible=0.3)], [])
    assert questions(hidden, ["pose", "facing"], DEFAULT_PROMPTS, "offset") == []


def test_a_thing_without_a_name_is_not_asked_about() -> None:
    nameless = Record(RECORD.image, [], [Object(" ", CUBE), RECORD.objects[0]])
    asked = questions(nameless, ["where", "what", "tags"], DEFAULT_PROMPTS, "offset")
    assert [question.number for question in asked] == [1, 1, 1]


def test_heads_without_a_rotation_are_not_asked_about() -> None:
    known = Head((50.0, 0.0, 100.0, 50.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
    record = Record(Image(100, 100, "test", "1", "1"), [Head((0.0, 0.0, 50.0, 50.0), None), known])
    asked = questions(record, ["pose", "facing"], DEFAULT_PROMPTS, "offset")
    assert [(question.task, question.number) for question in asked] == [("pose", 1), ("facing", 1)]
