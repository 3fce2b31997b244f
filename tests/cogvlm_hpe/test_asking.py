"""What a record can be asked."""

from cogvlm_hpe import asking
from cogvlm_hpe.dialogue import Task
from shards.record import Head, Image, Record

PROMPTS: dict[Task, str] = {"pose": "Pose of {box}?", "facing": "Facing of {box}?"}


def test_heads_without_a_rotation_are_not_asked_about() -> None:
    known = Head((50.0, 0.0, 100.0, 50.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
    record = Record(Image(100, 100, "test", "1", "1"), [Head((0.0, 0.0, 50.0, 50.0), None), known])
    asked = asking.questions(record, ["pose", "facing"], PROMPTS, "offset")
    assert [(question.task, question.number) for question in asked] == [("pose", 1), ("facing", 1)]
