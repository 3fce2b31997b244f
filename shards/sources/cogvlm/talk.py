"""Conversations about boxes in CogVLM's way, read for what they say: which name belongs to which box.

A box is `[[x0,y0,x1,y1]]` in thousandths of the image, several share brackets with `;`. CogVLM's templates ask where a
named thing is, or what is at a box; others have boxes strewn through a description, where no rule tells how far back
the name of a box begins: those are not read.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Thousandths = tuple[int, int, int, int]

_NUMBERS = r"\s*\d{1,4}\s*(?:,\s*\d{1,4}\s*){3}"
_BOXES = re.compile(rf"\[\[({_NUMBERS}(?:;{_NUMBERS})*)\]\]")

_WHERE = r"(?:\s+located|\s+as it appears)?(?:\s+(?:in|within)(?:\s+the(?:\s+\w+)?\s+(?:image|picture|photo\w*))?)?"
_REQUEST = (
    r"(?:provid|giv|tell|shar|let me|know|disclos|stat|show|can you|could you|please|answer|return|report|inform|output"
    r"|coordinates|(?:its |the )?(?:bounding|box|bbox|coordinates|position|location))"
)
_THEN = r"(?:and|by|as|then|in the form of)"
_ASKS_MORE = rf"(?:[.?!]\s.*|(?:,\s+(?:{_THEN}\s+)*|\s+(?:{_THEN}\s+)+){_REQUEST}.*)"
_END = rf"(?P<name>\S.*?){_WHERE}(?:{_ASKS_MORE})?[.?!\s]*"
_PLACE = r"(?:bounding box(?:es)?|bbox|coordinates|position|location|place)"
_VERB = r"(?:locat(?:e|ing)|find(?:ing)?|point (?:out|to)|pinpoint|trace|spot|detect|identify|ground)"
# In this order: "find and tell me the bounding boxes of X" is a question about X.
_ASKED = [
    re.compile(pattern, re.IGNORECASE | re.DOTALL)
    for pattern in (
        rf"(?:.*?\b)?where(?: in)? (?:is|are) {_END}",
        rf".*?\b{_PLACE} of (?!(?:where|it|its)\b){_END}",
        r".*?\bwhat (?:location|position|place) does (?P<name>\S.*?) (?:hold|have|take)\b.*",
        rf".*?\b{_VERB} {_END}",
    )
]
_REGION = re.compile(
    r"\b(?:region|area|section|portion|rectangle|box|bbox|coordinates|marked as|enclosed by|defined by"
    r"|what is (?:at|in))(?: of| by| as| with| the| coordinates)* ?$",
    re.IGNORECASE,
)
_OTHER_QUESTION = re.compile(r"\b(?:colou?rs?|how|why|when|who|which|whose|does it|is (?:this|that|there|it))\b", re.I)
_SENTENCE = re.compile(r"\b(?:is|are|was|were|has|have|can|there|you|i)\b|[.!?;:]\s", re.IGNORECASE)
_RELATIVE = re.compile(r"\b(?:that|who|which)\s+(?:is|are|was|were|has|have|can)\b", re.IGNORECASE)
_MOST_WORDS = 15
_LONGEST_QUESTION = 400


class Said(NamedTuple):
    """One box and its name."""

    expression: str
    box: Thousandths


def named_boxes(turns: Sequence[tuple[str, str]], dropped: Counter) -> Iterator[Said]:
    """What a conversation names, from its turns (role, content); `dropped` counts the answers not used, by reason.

    A user's turn and the assistant's after it belong together; any other turn stands alone.
    """
    question = ""
    for role, content in turns:
        if role == "user":
            question = content
            continue
        found = _answered(question, content)
        if isinstance(found, str):
            dropped[found] += 1
        else:
            yield found
        question = ""


def _answered(question: str, answer: str) -> Said | str:
    """The box named by a question and its answer, or why there is none."""
    asked, told = _BOXES.findall(question), _BOXES.findall(answer)
    if not asked and not told:
        return "answer without a box"
    if asked and told:
        return "boxes in question and answer"
    name = _described(question, answer) if asked else _asked_for(question)
    if name is None:
        return "boxes in a text" if told else "question not understood"
    boxes = ";".join(asked or told).split(";")
    if len(boxes) > 1:
        return "several boxes"
    box = tuple(map(int, boxes[0].split(",")))
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= 1000 and 0 <= y0 < y1 <= 1000):
        return "box out of range"
    return Said(name, (x0, y0, x1, y1))


def _asked_for(question: str) -> str | None:
    """The name in "Where is X? answer in [[x0,y0,x1,y1]] format." and the like."""
    for pattern in _ASKED if len(question) <= _LONGEST_QUESTION else ():
        match = pattern.fullmatch(question.strip())
        if match:
            return match["name"]
    return None


def _described(question: str, answer: str) -> str | None:
    """The answer to "What is in the region [[…]]?", if it is a name and no sentence."""
    before = question[: question.index("[[")]
    if not _REGION.search(before) or _OTHER_QUESTION.search(before):
        return None
    words = _RELATIVE.sub("", answer).strip().rstrip(".")
    if _SENTENCE.search(words) or not 2 <= len(answer.split()) <= _MOST_WORDS:
        return None
    return answer
