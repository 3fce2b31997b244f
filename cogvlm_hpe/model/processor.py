"""Images, text and boxes to what the model takes, and its answers to boxes and poses, in the manner of transformers.

Shapes: B rows, R questions, I images, S image side in px, L tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from cogvlm_hpe import dialogue
from cogvlm_hpe.dialogue import AnswerFormat, Parsed
from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.folders import NOTES_FILE, base_of, is_adapter, read_notes, tokenizer_folder
from cogvlm_hpe.model.pixels import normalise
from cogvlm_hpe.model.tokenizer import FILE_NAME, SENTENCEPIECE_NAME, SPECIAL_TOKENS, load_tokenizer
from cogvlm_hpe.model.weights import read_config
from launcher.errors import UserError
from shards.pixels import check_mode, resize

Template = Literal["base", "chat", "vqa"]
Side = Literal["left", "right"]
Box = Sequence[float]
"""x0, y0, x1, y1 in pixels of the image as it is given."""
History = Sequence[tuple[str, str]]
"""Questions and answers before this one."""

BOX_MARK = "{box}"
_ANSWER_WORDS: dict[str, str | None] = {"base": None, "chat": "Answer:", "vqa": "Short answer:"}
_PROCESSOR_FILE = "processor_config.json"


def write_prompt(query: str, template: Template = "base", history: History = ()) -> str:
    """The text that asks `query`: as it is (base: the base and grounding checkpoints), or as chat or vqa ask.

    Raises ValueError for a template there is not, and for a history where the template has no form for one.
    """
    words = _answer_words(template)
    if words is None:
        if history:
            raise ValueError("template 'base' asks one question alone; leave history out, or take 'chat'")
        return query
    before = "".join(f"Question: {asked} {words} {answered}\n" for asked, answered in history)
    return f"{before}Question: {query} {words}"


def _answer_words(template: str) -> str | None:
    if template not in _ANSWER_WORDS:
        raise ValueError(f"template {template!r}: not one of {', '.join(_ANSWER_WORDS)}")
    return _ANSWER_WORDS[template]


def fill_boxes(query: str, boxes: Sequence[Box], width: int, height: int) -> str:
    """Put boxes, in pixels of an image of that size, in the places of `{box}`, in order, as `[[x0,y0,x1,y1]]`.

    Raises ValueError where their number or a box is wrong.
    """
    parts = query.split(BOX_MARK)
    if len(parts) - 1 != len(boxes):
        raise ValueError(f"{len(boxes)} boxes for the {len(parts) - 1} {BOX_MARK} of {query!r}: give one for each")
    for box in boxes:
        if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(f"box {tuple(box)}: must be x0, y0, x1, y1 in pixels with x0 < x1 and y0 < y1")
    written = [dialogue.format_box(box, width, height) for box in boxes]
    return "".join(text + box for text, box in zip(parts, [*written, ""], strict=True))


def to_array(image: Any) -> np.ndarray:
    """A PIL image, an (H, W, 3) uint8 array or a (3, H, W) uint8 tensor, all RGB, to (H, W, 3) uint8.

    An image is taken as it is stored: turn it first (PIL's ImageOps.exif_transpose) if its boxes were read off a
    viewer. Raises TypeError or ValueError for anything else, pictures of more than 8 bits a colour too.
    """
    if isinstance(image, Image.Image):
        check_mode(image.mode)
        return np.array(image.convert("RGB"))
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"image tensor {tuple(image.shape)} {image.dtype}: must be (3, H, W) uint8, RGB")
        image = image.cpu().permute(1, 2, 0).numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image of type {type(image).__name__}: give a PIL image, an array or a tensor")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image array {image.shape} {image.dtype}: must be (H, W, 3) uint8, RGB")
    # torch takes neither reversed nor read-only arrays.
    return np.require(image, requirements=["C", "W"])


class CogVLMTokenizer(PreTrainedTokenizerFast):
    """`load_tokenizer`'s tokenizer as transformers knows tokenizers; it adds no token of itself to a text."""

    vocab_files_names = {"vocab_file": SENTENCEPIECE_NAME, "tokenizer_file": FILE_NAME}
    model_input_names = ["input_ids", "attention_mask"]

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """What transformers calls with the files it found. tokenizer.model counts over tokenizer.json."""
        paths = [kwargs.pop(name, None) for name in cls.vocab_files_names]
        path = next((path for path in paths if path), None)
        if path is None:
            raise UserError(f"no {SENTENCEPIECE_NAME} or {FILE_NAME} there; name a folder that has one")
        return kwargs | _special_tokens() | {"tokenizer_object": load_tokenizer(path)}

    @classmethod
    def around(cls, tokenizer: Tokenizer) -> "CogVLMTokenizer":
        """The same tokenizer, wrapped."""
        return cls(tokenizer_object=tokenizer, **_special_tokens())


def _special_tokens() -> dict[str, Any]:
    unk, bos, eos = SPECIAL_TOKENS
    # split_special_tokens: text that reads "</s>" is text.
    return {
        "unk_token": unk,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": unk,
        "split_special_tokens": True,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }


class CogVLMProcessor(ProcessorMixin):
    """Images, text and boxes to a CogVLM's inputs; answers to boxes and poses.

    Pixels are resized and normalised by the functions that training uses, so they are bit for bit what it sees. From
    Pillow's bicubic they differ by 0.2 grey levels in the mean; one value in a thousand, at hard edges, by more than 1.
    """

    def __init__(
        self,
        tokenizer: CogVLMTokenizer,
        image_size: int = 490,
        patch_size: int = 14,
        template: Template = "base",
        answer_format: AnswerFormat = "offset",
    ) -> None:
        super().__init__(tokenizer)
        _answer_words(template)
        self.image_size, self.patch_size = image_size, patch_size
        self.template, self.answer_format = template, answer_format

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, tokenizer: str | Path | None = None, **kwargs: Any
    ) -> "CogVLMProcessor":
        """A saved processor, or that of a base or adapter folder.

        A base's config says sizes and template, an adapter names its base and the format of its answers; what was
        tuned here (hpe.json) is asked as it was trained, by the bare question. `tokenizer` is a folder, needed where
        neither the base has one nor the adapter names it. Raises UserError.
        """
        folder = Path(pretrained_model_name_or_path)
        if tokenizer is None and (folder / _PROCESSOR_FILE).is_file():
            return super().from_pretrained(folder, **kwargs)
        notes = read_notes(folder)
        base = base_of(folder) if is_adapter(folder) else folder
        config, tuned = read_config(base), is_adapter(folder) or (folder / NOTES_FILE).is_file()
        where = tokenizer or tokenizer_folder(base, notes)
        return cls(
            CogVLMTokenizer.around(load_tokenizer(where, config.vocab_size)),
            config.vision_config["image_size"],
            config.vision_config["patch_size"],
            "base" if tuned else cast(Template, config.template_version),
            notes["answer_format"],
        )

    @property
    def model_input_names(self) -> list[str]:
        """What a call returns."""
        return ["input_ids", "token_type_ids", "attention_mask", "pixel_values"]

    @property
    def image_tokens(self) -> int:
        """Tokens of one image, without boi and eoi."""
        return (self.image_size // self.patch_size) ** 2

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] = "",
        boxes: Sequence[Any] | None = None,
        *,
        history: Sequence[Any] | None = None,
        template: Template | None = None,
        padding_side: Side = "right",
        return_tensors: Literal["pt"] = "pt",
    ) -> BatchFeature:
        """Questions to the plain call: `bos | boi image eoi | text`, a row each, or `bos | text` without an image.

        `text` is one question or B of them; then `images` (None where a row has none), `boxes` (for each row those
        that stand in its `{box}`, in pixels) and `history` have B entries too. Gives `input_ids`, `token_type_ids` and
        `attention_mask` (B, L), padded on `padding_side` (left for generation), and `pixel_values` (I, 3, S, S)
        float32 of the rows that have an image. Raises ValueError for what does not fit together.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors {return_tensors!r}: torch tensors ('pt') are all there is")
        alone = isinstance(text, str)
        queries = [text] if isinstance(text, str) else list(text)
        if alone and isinstance(images, list | tuple) and len(images) == 1:
            images = images[0]
        pictures = _row_each("images", images, len(queries), alone)
        arrays = [None if picture is None else to_array(picture) for picture in pictures]
        prompts = self._prompts(
            queries, arrays, _row_each("boxes", boxes, len(queries), alone),
            _row_each("history", history, len(queries), alone), template,
        )  # fmt: skip
        rows, types = [], []
        for prompt, array in zip(prompts, arrays, strict=True):
            slots = 0 if array is None else self.image_tokens + 2
            rows.append([self.tokenizer.bos_token_id, *[self.tokenizer.pad_token_id] * slots, *prompt])
            types.append([0, *[1] * slots, *[0] * len(prompt)])
        data = {
            "input_ids": _pad(rows, self.tokenizer.pad_token_id, padding_side),
            "token_type_ids": _pad(types, 0, padding_side),
            "attention_mask": _pad([[1] * len(row) for row in rows], 0, padding_side),
        }
        if given := [array for array in arrays if array is not None]:
            data["pixel_values"] = self._pixels(given)
        return BatchFeature(data)

    def branches(
        self,
        images: Any,
        text: Sequence[str],
        image_index: Sequence[int] | None = None,
        boxes: Sequence[Sequence[Box]] | None = None,
        *,
        template: Template | None = None,
    ) -> BatchFeature:
        """Questions to the branch call, where all questions about an image share its prefix.

        `images` is one image or a list of I; `image_index[r]` says which one question r is about (the only one, when
        left out). Gives `pixel_values` (I, 3, S, S), `image_index` (R,), `branch_input_ids` and `branch_attention_mask`
        (R, L). Raises ValueError for what does not fit together.
        """
        arrays = [to_array(image) for image in (images if isinstance(images, list | tuple) else [images])]
        index = [0] * len(text) if image_index is None else [int(number) for number in image_index]
        if len(index) != len(text) or (image_index is None and len(arrays) != 1):
            raise ValueError(f"image_index: name one of the {len(arrays)} images for each of {len(text)} questions")
        if not all(0 <= number < len(arrays) for number in index):
            raise ValueError(f"image_index {index}: must lie in 0..{len(arrays) - 1}, the images given")
        about = [arrays[number] for number in index]
        no_history: list[History] = [()] * len(text)
        rows = self._prompts(text, about, _row_each("boxes", boxes, len(text), False), no_history, template)
        return BatchFeature(
            {
                "pixel_values": self._pixels(arrays),
                "image_index": torch.tensor(index),
                "branch_input_ids": _pad(rows, self.tokenizer.pad_token_id, "right"),
                "branch_attention_mask": _pad([[1] * len(row) for row in rows], 0, "right"),
            }
        )

    def parse_answers(
        self,
        answers: Sequence[str] | Sequence[Sequence[int]] | Tensor,
        sizes_px: Sequence[tuple[int, int]] | None = None,
    ) -> list[Parsed]:
        """Answers, as text or as token ids after the prompt, to boxes and poses; never raises on what a model says.

        Boxes are in 0..1, or in pixels where `sizes_px` gives each answer's image size (width, height).
        """
        texts = [a if isinstance(a, str) else self.tokenizer.decode(a, skip_special_tokens=True) for a in answers]
        parsed = [dialogue.parse(text.strip(), self.answer_format) for text in texts]
        if sizes_px is None:
            return parsed
        return [
            replace(found, boxes=[(x0 * width, y0 * height, x1 * width, y1 * height) for x0, y0, x1, y1 in found.boxes])
            for found, (width, height) in zip(parsed, sizes_px, strict=True)
        ]

    def _prompts(
        self,
        queries: Sequence[str],
        arrays: Sequence[np.ndarray | None],
        boxes: Sequence[Sequence[Box] | None],
        histories: Sequence[History | None],
        template: Template | None,
    ) -> list[list[int]]:
        out = []
        for query, array, row_boxes, history in zip(queries, arrays, boxes, histories, strict=True):
            if row_boxes and array is None:
                raise ValueError(f"boxes for {query!r}, which has no image: leave them out, or give the image")
            height, width = (1, 1) if array is None else array.shape[:2]
            filled = fill_boxes(query, row_boxes or [], width, height)
            prompt = write_prompt(filled, template or self.template, history or ())
            ids = self.tokenizer.encode(prompt, add_special_tokens=False)
            if not ids:
                raise ValueError("text is empty: ask something")
            out.append(ids)
        return out

    def _pixels(self, arrays: Sequence[np.ndarray]) -> Tensor:
        return normalise(torch.stack([resize(array, self.image_size) for array in arrays]))


def _row_each(name: str, given: Any, rows: int, alone: bool) -> list[Any]:
    """One entry a row. Raises ValueError where the number differs."""
    if given is None:
        return [None] * rows
    if alone:
        return [given]
    if not isinstance(given, list | tuple) or len(given) != rows:
        number = len(given) if isinstance(given, list | tuple) else "one"
        raise ValueError(f"{name}: {number} for {rows} texts; give a list with one entry (or None) for each")
    return list(given)


def _pad(rows: Sequence[Sequence[int]], value: int, side: Side) -> Tensor:
    length = max(len(row) for row in rows)
    blanks = [[value] * (length - len(row)) for row in rows]
    if side == "left":
        return torch.tensor([[*blank, *row] for blank, row in zip(blanks, rows, strict=True)])
    return torch.tensor([[*row, *blank] for blank, row in zip(blanks, rows, strict=True)])


AutoTokenizer.register(CogVLMConfig, tokenizer_class=CogVLMTokenizer, exist_ok=True)
AutoProcessor.register(CogVLMConfig, CogVLMProcessor, exist_ok=True)
