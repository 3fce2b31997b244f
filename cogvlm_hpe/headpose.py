"""Head poses in a few lines: `HeadPose.from_pretrained(path)(image, boxes)`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cogvlm_hpe import dialogue, pictures
from shards.pixels import check_mode

if TYPE_CHECKING:
    from PIL import Image

    from cogvlm_hpe.dialogue import Parsed
    from cogvlm_hpe.evaluate.answer import Answer, Decode
    from cogvlm_hpe.model.load import Loaded

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the image."""

REASONS = {
    "box": "the model answered with a box, not with a pose",
    "blended": "the answer mixes box and pose formats",
    "out_of_range": "the answer is written as a pose, but its numbers are no angles",
    "other": "the answer is no pose",
}
_QUESTIONS_AT_ONCE = 64
_DETECT_TOKENS = 512  # about 30 boxes


@dataclass(frozen=True)
class Reading:
    """One head: its box, the model's answer, and the pose in degrees, or nulls and the reason why.

    `confidence`, 0..1, is there with expectation decoding only.
    """

    box: Box
    answer: str
    yaw: float | None
    pitch: float | None
    roll: float | None
    reason: str | None
    confidence: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; without a confidence where there is none."""
        value = asdict(self) | {"box": list(self.box)}
        if self.confidence is None:
            del value["confidence"]
        return value


class HeadPose:
    """A model that reads the pose of heads in whole images."""

    def __init__(self, loaded: "Loaded", decode: "Decode" = "greedy") -> None:
        self.loaded, self.decode = loaded, decode

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        adapter: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        tokenizer: str | Path | None = None,
        decode: "Decode" = "greedy",
    ) -> "HeadPose":
        """A base, adapter (it names its base) or merged model. Raises UserError where it cannot be read.

        device: `auto` (a GPU if there is one), `cpu` or `cuda`.
        dtype: `auto` (bf16 on a GPU, fp32 on the CPU), `fp32` or `bf16`, which needs half the memory.
        decode: `expectation` reads a pose as the mean over the distribution of its digits, and gives a confidence.
        """
        from cogvlm_hpe.evaluate.command import device_of, dtype_of
        from cogvlm_hpe.model.load import DTYPES, load

        where = device_of(device)
        kind = DTYPES[dtype_of(dtype, where)]
        return cls(load(path, adapter, device=where, dtype=kind, tokenizer=tokenizer), decode)

    def __call__(
        self,
        image: "str | Path | Image.Image | np.ndarray",
        boxes: Sequence[Sequence[float]] | None = None,
        *,
        expression: str = "head",
    ) -> list[Reading]:
        """A reading for each box (x0, y0, x1, y1 in pixels); without boxes, for each `expression` the model finds.

        image: a path, a PIL image, or (H, W, 3) uint8 RGB. Raises UserError where a path holds no image.
        """
        pixels = _pixels(image)
        prefix = self._see(pixels)
        found = self._find(pixels, prefix, expression) if boxes is None else [_box(box) for box in boxes]
        height, width = pixels.shape[:2]
        notes = self.loaded.notes
        asked = [dialogue.ask("pose", notes["prompts"], box=dialogue.format_box(b, width, height)) for b in found]
        readings = []
        for start in range(0, len(asked), _QUESTIONS_AT_ONCE):
            answers = self._ask(prefix, "pose", asked[start : start + _QUESTIONS_AT_ONCE])
            readings += [
                _reading(box, given, dialogue.parse(given.text, notes["answer_format"]))
                for box, given in zip(found[start:], answers, strict=False)
            ]
        return readings

    def detect(self, image: "str | Path | Image.Image | np.ndarray", expression: str = "head") -> list[Box]:
        """Where the model itself sees `expression`, by its own grounding; in the order of its answer."""
        pixels = _pixels(image)
        return self._find(pixels, self._see(pixels), expression)

    def _see(self, pixels: np.ndarray) -> Any:
        from cogvlm_hpe.evaluate.answer import encode
        from cogvlm_hpe.model.pixels import normalise
        from shards.pixels import resize

        weight = next(self.loaded.model.parameters())
        side_px = self.loaded.model.config.vision_config["image_size"]
        return encode(self.loaded, normalise(resize(pixels, side_px)[None]).to(weight.device, weight.dtype))

    def _find(self, pixels: np.ndarray, prefix: Any, expression: str) -> list[Box]:
        question = dialogue.ask("where", self.loaded.notes["prompts"], expression=expression)
        # Asked as a question in words, whose answer may be as long as it takes: there may be many heads.
        [given] = self._ask(prefix, "what", [question], _DETECT_TOKENS)
        height, width = pixels.shape[:2]
        return [(x0 * width, y0 * height, x1 * width, y1 * height) for x0, y0, x1, y1 in _boxes(given.text)]

    def _ask(self, prefix: Any, task: dialogue.Task, questions: list[str], max_new_tokens: int = 48) -> "list[Answer]":
        from cogvlm_hpe.evaluate.answer import Decoding, answer

        n = len(questions)
        decoding = Decoding(max_new_tokens, decode=self.decode if task == "pose" else "greedy")
        return answer(self.loaded, None, [0] * n, [task] * n, questions, decoding, prefix=prefix)


def _boxes(text: str) -> list[Box]:
    """The boxes of an answer, each once; an answer that was cut off keeps those that are whole."""
    return list(dict.fromkeys(dialogue.parse(dialogue.whole_boxes(text)).boxes))


def _pixels(image: "str | Path | Image.Image | np.ndarray") -> np.ndarray:
    if isinstance(image, str | Path):
        return pictures.read_image(Path(image))
    if not isinstance(image, np.ndarray):
        check_mode(image.mode)
        image = np.array(image.convert("RGB"))
    # torch takes neither reversed nor read-only arrays, such as OpenCV's frames turned from BGR are.
    pixels = np.require(image, requirements=["C", "W"])
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"image: (height, width, 3) uint8 is needed, not {pixels.shape} {pixels.dtype}")
    return pixels


def _box(box: Sequence[float]) -> Box:
    x0, y0, x1, y1 = map(float, box)
    return (x0, y0, x1, y1)


def _reading(box: Box, given: "Answer", parsed: "Parsed") -> Reading:
    yaw, pitch, roll = given.pose_deg or parsed.pose_deg or (None, None, None)
    confidence = None if given.confidence is None else round(given.confidence, 4)
    return Reading(box, given.text, yaw, pitch, roll, REASONS.get(parsed.kind), confidence)
