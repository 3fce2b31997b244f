"""Questions on images to answers: greedy text, and on request the expected pose behind its digits."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cogvlm_hpe import dialogue
from cogvlm_hpe.dialogue import AnswerFormat, Task
from launcher.comm import Comm
from launcher.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from cogvlm_hpe.model.load import Loaded
    from cogvlm_hpe.model.modeling import Prefix

Decode = Literal["greedy", "expectation"]
_LONGEST: dict[Task, str] = {"pose": "{{-180,-90,-180}}", "where": "[[999,999,999,999]]"}


@dataclass(frozen=True)
class Decoding:
    """How answers are made: at most `max_new_tokens` each, `questions` at a time (this bounds memory).

    `decode` expectation reads a valid pose as the mean over the distribution of its digits, not as its likeliest text.
    """

    max_new_tokens: int = 48
    questions: int = 64
    decode: Decode = "greedy"


@dataclass(frozen=True)
class Answer:
    """Greedy text; with expectation decoding, for a valid pose, also the expected pose and a confidence in 0..1.

    `cut`: the text was ended by our limit, not by the model.
    """

    text: str
    pose_deg: tuple[float, float, float] | None = None
    confidence: float | None = None
    cut: bool = False


def answer(
    loaded: "Loaded",
    pixel_values: Any,
    image_index: Sequence[int],
    tasks: Sequence[Task],
    queries: Sequence[str],
    decoding: Decoding,
    comm: Comm | None = None,
    prefix: "Prefix | None" = None,
) -> list[Answer]:
    """Answers to `queries`; `pixel_values` (I, 3, S, S) normalised, `image_index[r]` the image of query r.

    `prefix` is what `encode` gave for these images, where that is known already.
    With `comm` its ranks decode step by step together, as a model split by ZeRO-3 needs; greedy text only.
    Raises UsageError where expectation is asked of a model whose answers are not of fixed length.
    """
    import torch

    from cogvlm_hpe.model.decoding import greedy

    answer_format: AnswerFormat = loaded.notes["answer_format"]
    if decoding.decode == "expectation" and answer_format != "offset":
        raise UsageError(f"expectation decoding: needs answer_format offset, this model's is {answer_format}")
    model, tokenizer = loaded.model, loaded.tokenizer
    prompts = [tokenizer.encode(query, add_special_tokens=False).ids for query in queries]
    limits = [longest_answer(tokenizer, task, decoding.max_new_tokens) for task in tasks]
    with torch.no_grad():
        prefix = encode(loaded, pixel_values) if prefix is None else prefix
        tokens = greedy(model, prefix, image_index, prompts, limits, comm)
        answers = [
            Answer(tokenizer.decode(ids, skip_special_tokens=True).strip(), cut=len(ids) >= limit)
            for ids, limit in zip(tokens, limits, strict=True)
        ]
        if decoding.decode == "expectation":
            _expect(loaded, prefix, image_index, prompts, tokens, answers)
    return answers


def encode(loaded: "Loaded", pixel_values: Any) -> "Prefix":
    """What all questions on these images (I, 3, S, S) share; with scope `text` also all adapters on one base."""
    import torch

    with torch.no_grad():
        return loaded.model.model.encode_prefix(pixel_values, adapted=loaded.model.adapter_scope == "all")


def longest_answer(tokenizer: "Tokenizer", task: Task, at_most: int) -> int:
    """Tokens after which an answer is cut: twice what the grammar needs, so that a blend of formats is still seen."""
    if task not in _LONGEST:
        return at_most
    longest = max(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in _LONGEST.values())
    return min(at_most, 2 * longest + 1)


def _expect(
    loaded: "Loaded",
    prefix: Any,
    image_index: Sequence[int],
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
    answers: list[Answer],
) -> None:
    from cogvlm_hpe.model.decoding import code_distributions, find_numbers

    ids_of_digits = [loaded.tokenizer.token_to_id(str(digit)) for digit in range(10)]
    digits = [number for number in ids_of_digits if number is not None]
    if len(digits) < 10:
        raise UsageError("expectation decoding: needs a tokenizer in which every digit is a token of its own")
    poses = [
        row
        for row, (ids, given) in enumerate(zip(tokens, answers, strict=True))
        if dialogue.parse(given.text, "offset").kind == "pose"
        and [len(number) for number in re.findall(r"\d+", given.text)] == [3, 3, 3]  # 0180 is a pose, and no such code
        and len(find_numbers(ids, 0, digits)) == 3
    ]
    if not poses:
        return
    found = code_distributions(
        loaded.model,
        prefix,
        [image_index[row] for row in poses],
        [prompts[row] for row in poses],
        [tokens[row] for row in poses],
        digits,
    )
    for row, probabilities in zip(poses, found.cpu().double().numpy(), strict=True):
        pose_deg, confidence = expected_pose(probabilities)
        answers[row] = replace(answers[row], pose_deg=pose_deg, confidence=confidence)


def expected_pose(probabilities: np.ndarray) -> tuple[tuple[float, float, float], float]:
    """Probabilities (3, 361) of the codes of yaw, pitch and roll (offset format) to degrees and a confidence in 0..1.

    Yaw and roll are circular means, for codes 001 and 359 are two degrees apart; pitch, which does not wrap, is a
    plain mean over codes 000-180. The confidence is the product of the three mean resultant lengths (Mardia & Jupp,
    Directional Statistics, 2.3): 1 when all weight lies on one code.
    """
    codes = np.arange(probabilities.shape[1])
    pitch = np.where(codes <= 180, probabilities[1], 0.0)
    weights = np.stack([probabilities[0], pitch / pitch.sum(), probabilities[2]])
    resultant = weights @ np.exp(1j * np.deg2rad(codes))
    # The code is angle + 180: turning back by half a circle is a change of sign. 180 - (-x % 360) lies in (-180, 180].
    yaw_deg, roll_deg = (180.0 - float(-np.rad2deg(np.angle(-z)) + 180.0) % 360.0 for z in resultant[[0, 2]])
    pitch_deg = float(weights[1] @ codes - 90.0)
    return (yaw_deg, pitch_deg, roll_deg), float(np.prod(np.abs(resultant)))
